"""What the command line runs, one file a subcommand. Puts the other parts together; only cli imports it."""
