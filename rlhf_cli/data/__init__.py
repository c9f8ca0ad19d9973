"""Rows of every kind: read, checked, tokenised once, and cut into batches."""
