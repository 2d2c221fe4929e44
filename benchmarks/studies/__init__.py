"""Studies on the digits, each run by a command of its own from a checkout. Not part of the wheel."""
