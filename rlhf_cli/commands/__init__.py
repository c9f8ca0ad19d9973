"""What the command line offers besides stages: help, data, export, ls, cp, env and completion."""

SHORT = {"merge": "export"}
"""Another word for a command."""

COMMANDS = ("data", "export", *SHORT, "ls", "cp", "env", "completion")
