"""sha256 of files. A leaf: everything may import it."""

import hashlib
import os


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of a file, in hexadecimal. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        # Python 3.10 has no hashlib.file_digest.
        digest = hashlib.sha256()
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
        return digest.hexdigest()
