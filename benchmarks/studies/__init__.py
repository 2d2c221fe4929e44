"""Studies on the digits, each run by its own command from a checkout. Not part of the wheel."""
