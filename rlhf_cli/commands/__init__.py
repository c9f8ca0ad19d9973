"""What the command line offers besides stages: help, data, ls, cp, env and completion."""

COMMANDS = ("data", "ls", "cp", "env", "completion")
