"""What the command line offers besides stages: data, export, slurm, ls, compare, cp, env, ..."""

SHORT = {"merge": "export"}
"""Another word for a command."""

COMMANDS = (
    "data",
    "export",
    *SHORT,
    "slurm",
    "ls",
    "compare",
    "report",
    "chat",
    "cp",
    "env",
    "completion",
)
