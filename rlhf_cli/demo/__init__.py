"""The toy-shop task that ships with the tool: rows to learn from and a gold scorer to judge by."""
