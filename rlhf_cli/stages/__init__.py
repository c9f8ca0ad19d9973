"""One file per subcommand, each read from top to bottom. Only cli.py imports a stage."""
