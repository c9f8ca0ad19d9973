"""What the command line offers besides stages: help, data, export, slurm, ls, cp, env and
completion.
"""

SHORT = {"merge": "export"}
"""Another word for a command."""

COMMANDS = ("data", "export", *SHORT, "slurm", "ls", "cp", "env", "completion")
