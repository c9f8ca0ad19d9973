"""The life of a run: its folder and lock, checks before the start, provenance, resume points, session."""
