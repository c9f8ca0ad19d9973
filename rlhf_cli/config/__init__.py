"""What a run is told: the schema, its composition from conf/, and the errors that users see."""
