"""What the command line offers besides stages: data, export, slurm, ls, watch, compare, ..."""

SHORT = {"merge": "export"}
"""Another word for a command."""

COMMANDS = (
    *("data", "export", *SHORT, "slurm", "ls", "watch", "compare", "rounds", "report", "chat"),
    *("cp", "env", "completion"),
)
