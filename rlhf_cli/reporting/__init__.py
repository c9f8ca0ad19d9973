"""What people see: lines, progress, tables on stderr, and metrics.jsonl."""
