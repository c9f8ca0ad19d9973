"""Judging scorers by held-out rows, and reports, tables and samples of it."""
