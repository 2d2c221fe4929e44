"""Files of torch.save and pickles of tensors, read without running code in them and checked before they are read."""

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

# How torch names what it refuses, in the middle of advice to load the file unsafely.
_REFUSED = re.compile(r"(?:GLOBAL|function|class|Class) ([A-Za-z_][\w.]*\.\w+)")


def check_archive(source: str | os.PathLike | IO[bytes]) -> None:
    """Check a zip archive as torch.save writes it, before anything in it is unpacked; nothing for other files.

    torch stores its members uncompressed. A compressed one may unpack to any size. torch does not verify checksums, so
    a flipped bit would become a wrong weight.

    Raises
    ------
    ValueError
        If a member is compressed or encrypted, its checksum differs, or the members have more bytes than the file.
    OSError
        If there is no such file.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            check_archive(file)
        return
    size = source.seek(0, os.SEEK_END)
    try:
        if zipfile.is_zipfile(source):
            _check_members(source, size)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, OverflowError) as error:
        raise ValueError(f"it is a damaged archive: {error}") from error
    finally:
        source.seek(0)


def _check_members(source: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(source) as archive:
        members = archive.infolist()
        odd = next((m for m in members if m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1), None)
        if odd is not None:
            raise ValueError(f"its part {odd.filename} is compressed or encrypted, which torch.save never does")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its parts claim more bytes than the file has")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its part {damaged} is damaged: the checksum differs")


def load_plain(source: str | os.PathLike | IO[bytes]) -> Any:
    """Read a file of torch.save that has tensors, plain values and containers only.

    Parameters
    ----------
    source : path-like or binary file
        The file.

    Returns
    -------
    object
        Its content, with tensors on the CPU.

    Raises
    ------
    ValueError
        If it is damaged or has anything else; the message is one line without the file's name.
    """
    try:
        check_archive(source)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            # About the pickle's protocol, before it is refused.
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        # For damaged files torch raises almost anything: KeyError, TypeError, AttributeError, struct.error...
        match = _REFUSED.search(str(error))
        if match:
            raise ValueError(f"it refers to {match[1]}, and code in it is not run: save tensors only") from None
        raise ValueError("it is damaged, or has other objects than tensors and plain values") from None


def load_mapping(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read a file of torch.save with tensors by name. ValueError, without the file's name, if it has anything else."""
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    content = load_plain(path)
    if not isinstance(content, dict):
        raise ValueError(f"it has a {type(content).__name__}, expected tensors by name")
    wrong = next((k for k, v in content.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)), None)
    if wrong is not None:
        raise ValueError(f"it has {str(wrong)[:60]!r}, which is not a tensor with a name")
    return dict(content)
