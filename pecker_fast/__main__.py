"""``python -m pecker_fast`` is ``pecker-fast``."""

from .cli import main

main()
