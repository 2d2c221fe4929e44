"""The subcommands of ``pecker-fast``, one file each: parse, call the library, print. None imports another.

Every module has ``parse(words)``, which returns a call without arguments: parsing and running fail in different ways.
"""
