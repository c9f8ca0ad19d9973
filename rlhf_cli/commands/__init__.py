"""What the command line offers besides stages: help, ls, cp, env and completion."""

COMMANDS = ("ls", "cp", "env", "completion")
