"""The processes that a run is shared among."""
