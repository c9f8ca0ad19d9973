"""Trackers of experiments, which hear what a run logs."""
