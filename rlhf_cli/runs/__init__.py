"""The life of a run: its folder and lock, its checks, where it came from, its resume points."""
