"""What the command line offers besides stages: help, data, export, ls, compare, cp, ..."""

SHORT = {"merge": "export"}
"""Another word for a command."""

COMMANDS = ("data", "export", *SHORT, "ls", "compare", "cp", "env", "completion")
