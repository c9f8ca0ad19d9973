"""The museum-guide task that ships with the tool: rows to learn from, a gold score to judge by."""
