"""Patch: the XOR of two networks' bits and its positions, in memory and as a file. Format: docs/patch_files.md."""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import save_tensors
from ..hashing import state_hash
from ..mask import SaliencyMask
from ..ops import num_words, pack_bits
from ..records import SHA256, parse_object
from .positions import Code, Positions, decode, encode

FORMAT, VERSION = "pecker_fast.patch", "1"
# A hostile file must not make its reader allocate without end: bytes of the table, and entries in all.
MAX_TABLE, MAX_ENTRIES = 1 << 26, 1 << 36

_NAMES = (
    *(
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
    ),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Integers of the same size, to compare and change entries bit for bit: NaN equals NaN, and -0 differs from 0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Described(TypedDict):
    """The metadata of a patch file."""

    base: SHA256
    result: SHA256


def as_bits(value: Tensor) -> Tensor:
    """A view of a tensor of any strides as integers of the same size."""
    return value.detach().view(_BITS[value.element_size()])


@dataclass(frozen=True)
class PatchTensor:
    """A tensor of the networks that a patch is between.

    Parameters
    ----------
    name, dtype : str
        Its name in the state dict, and its dtype without "torch.".
    shape : tuple of int
        Its shape.
    code : Code
        How the positions of its changed entries are coded.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    code: Code

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.code.numel

    @property
    def count(self) -> int:
        """Number of entries that change."""
        return self.code.count

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return DTYPES[self.dtype].itemsize

    def fits(self, value: Tensor) -> bool:
        """Whether a tensor has this shape and dtype."""
        return tuple(value.shape) == self.shape and value.dtype == DTYPES[self.dtype]


@dataclass(frozen=True, eq=False)
class Patch:
    """The difference between a base network and its result, bit for bit.

    Made by ``Patch.between`` and ``Patch.load``.

    Parameters
    ----------
    tensors : tuple of PatchTensor
        All tensors of the networks, larger entries first, then by name.
    position_code, value_bytes : bytes
        Positions of the changed entries, and the XOR of their bits (little-endian), tensor after tensor.
    base, result : str
        sha256 of both networks (``hashing.state_hash``).
    metadata : dict
        JSON: what is known of the run, its request, its figures, how the result is sampled, the licence.
    """

    tensors: tuple[PatchTensor, ...]
    position_code: bytes = field(repr=False)
    value_bytes: bytes = field(repr=False)
    base: str
    result: str
    metadata: dict[str, Any] = field(default_factory=dict)

    # ---- what it holds

    @property
    def numel(self) -> int:
        """Entries of the network."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def count(self) -> int:
        """Entries that change."""
        return sum(tensor.count for tensor in self.tensors)

    @property
    def density(self) -> float:
        """Share of the entries that change, in [0, 1]."""
        return self.count / max(1, self.numel)

    @property
    def changed(self) -> tuple[PatchTensor, ...]:
        """The tensors of which entries change."""
        return tuple(tensor for tensor in self.tensors if tensor.count)

    @cached_property
    def _places(self) -> dict[str, tuple[PatchTensor, int, int]]:
        """Name to the tensor and to where its positions and values start."""
        codes = accumulate((tensor.code.bytes for tensor in self.tensors), initial=0)
        values = accumulate((tensor.count * tensor.itemsize for tensor in self.tensors), initial=0)
        return {tensor.name: (tensor, c, v) for tensor, c, v in zip(self.tensors, codes, values, strict=False)}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> PatchTensor:
        return self._places[name][0]

    def positions(self, name: str) -> Positions:
        """The changed entries of a tensor in row-major order, increasing, int64. ValueError if they are damaged."""
        tensor, start, _ = self._places[name]
        try:
            return decode(tensor.code, self.position_code[start : start + tensor.code.bytes])
        except ValueError as error:
            raise ValueError(f"the positions of {name} are damaged: {error}") from error

    def values(self, name: str) -> NDArray:
        """XOR of the bits of the changed entries of a tensor, unsigned integers in the order of ``positions``."""
        tensor, _, start = self._places[name]
        return np.frombuffer(self.value_bytes, f"<u{tensor.itemsize}", tensor.count, start)

    def mask(self) -> SaliencyMask:
        """The changed entries as a mask over all tensors of the network, by name. ValueError if they are damaged."""
        words = []
        for tensor in self.tensors:
            bits = torch.zeros(tensor.numel, dtype=torch.bool)
            bits[torch.from_numpy(self.positions(tensor.name))] = True
            words.append(pack_bits(bits) if tensor.count else torch.zeros(num_words(tensor.numel), dtype=torch.int32))
        joined = torch.cat(words) if words else torch.zeros(0, dtype=torch.int32)
        return SaliencyMask(joined, [tensor.shape for tensor in self.tensors], [t.name for t in self.tensors])

    # ---- use

    def switched(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the base as that of the result, or the other way around: a contiguous copy on its device."""
        bits = as_bits(value).contiguous().reshape(-1).clone()
        positions = torch.from_numpy(self.positions(name)).to(value.device)
        bits[positions] ^= torch.from_numpy(self.values(name).copy()).view(bits.dtype).to(value.device)
        return bits.view(value.dtype).view(value.shape)

    def switch_array(self, name: str, bits: NDArray) -> None:
        """``switched`` in place, on all entries of a tensor as unsigned integers in row-major order."""
        bits[self.positions(name)] ^= self.values(name)

    @classmethod
    def between(
        cls, base: Mapping[str, Tensor], result: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> "Patch":
        """The patch that turns ``base`` into ``result``, and back.

        Parameters
        ----------
        base, result : mapping of str to Tensor
            State dicts with the same names, shapes and dtypes. They are not changed.
        metadata : mapping, optional
            JSON to store in the file.

        Raises
        ------
        ValueError
            If the two are not of one architecture and dtype, or a dtype is not supported.
        """
        check_alike(base, result)
        tensors, codes, values = [], [], []
        for name in sorted(result, key=lambda name: (-result[name].element_size(), name)):
            before, after = (as_bits(state[name]).cpu().contiguous().reshape(-1) for state in (base, result))
            positions = (before != after).nonzero().view(-1)
            code, data = encode(positions.numpy(), before.numel())
            tensors.append(PatchTensor(name, NAMES[result[name].dtype], tuple(result[name].shape), code))
            codes.append(data)
            changes = before[positions] ^ after[positions]
            # Little-endian whatever the machine.
            values.append(changes.numpy().astype(f"<u{changes.element_size()}").tobytes())
        hashes = state_hash(base), state_hash(result)
        return cls(tuple(tensors), b"".join(codes), b"".join(values), *hashes, dict(metadata or {}))

    # ---- files

    def save(self, path: str | os.PathLike) -> None:
        """Write the patch as a safetensors file, all or nothing. TypeError if the metadata is not JSON."""
        described = json.dumps({"base": self.base, "result": self.result, **self.metadata}, ensure_ascii=False)
        table = zlib.compress(json.dumps([_row(t) for t in self.tensors], separators=(",", ":")).encode(), 9)
        parts = {"table": table, "positions": self.position_code, "values": self.value_bytes}
        digest = _digest(described, *parts.values())
        header = {"format": FORMAT, "version": VERSION, "patch": described, "sha256": digest}
        # A tensor over a bytearray, because torch warns of memory that cannot be written.
        content = {
            name: torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else torch.zeros(0, dtype=torch.uint8)
            for name, part in parts.items()
        }
        save_tensors(path, content, header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Patch":
        """Read a file that ``save`` wrote. Nothing in it is run.

        Raises
        ------
        ValueError
            If there is no such file, or it is something else, of another version, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            what = "it is a folder" if path.is_dir() else "there is no such file"
            raise ValueError(f"{path} is not a patch file: {what}")
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT or header.get("version") != VERSION:
                    raise ValueError(_refusal(header))
                if sorted(file.keys()) != ["positions", "table", "values"]:
                    raise ValueError("it has other tensors than table, positions and values")
                parts = [file.get_tensor(name) for name in ("table", "positions", "values")]
            if any(part.dtype != np.uint8 or part.ndim != 1 for part in parts):
                raise ValueError("table, positions and values are not rows of bytes")
            table, codes, values = (part.tobytes() for part in parts)
            if header.get("sha256") != _digest(header.get("patch", ""), table, codes, values):
                raise ValueError("its content does not match its sha256")
            metadata = parse_object(header.get("patch", ""), Described, "its metadata", fix="make the patch again")
            base, result = metadata.pop("base"), metadata.pop("result")
            patch = cls(_read_table(table), codes, values, base, result, metadata)
            patch._check()
        except (OSError, SafetensorError, ValueError, RecursionError, zlib.error) as error:
            raise ValueError(f"{path} is not a patch file, or is damaged: {error}") from error
        return patch

    def _check(self) -> None:
        """Raise ValueError unless all parts fit together."""
        if self.numel > MAX_ENTRIES:
            raise ValueError(f"it is for {self.numel} entries, at most {MAX_ENTRIES} are supported")
        if len(self._places) != len(self.tensors):
            raise ValueError("a name is in the table twice")
        for length, expected, what in (
            (len(self.position_code), sum(t.code.bytes for t in self.tensors), "positions"),
            (len(self.value_bytes), sum(t.count * t.itemsize for t in self.tensors), "values"),
        ):
            if length != expected:
                raise ValueError(f"there are {length} bytes of {what}, the table needs {expected}")
        for tensor in self.tensors:
            self.positions(tensor.name)
            if tensor.dtype == "bool" and (self.values(tensor.name) != 1).any():
                raise ValueError(f"the values of {tensor.name} are not those of bool")


def file_kind(path: str | os.PathLike) -> Literal["patch", "delta"] | None:
    """Whether a file is a patch, or a delta file of an earlier version; None if it is neither. It is not checked."""
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return "patch" if header.get("format") == FORMAT else "delta" if "delta" in header else None


def check_alike(base: Mapping[str, Tensor], result: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless two state dicts have the same names, shapes and supported dtypes."""
    if base.keys() != result.keys():
        names = sorted(base.keys() ^ result.keys())
        raise ValueError(f"the two networks differ in {len(names)} names of tensors, such as {names[0]}")
    for name in sorted(result):
        before, after = base[name], result[name]
        check_plain(name, before)
        check_plain(name, after)
        if after.shape != before.shape:
            raise ValueError(f"{name} has shape {tuple(after.shape)}, in the base {tuple(before.shape)}")
        if after.dtype != before.dtype:
            raise ValueError(
                f"{name} is {NAMES[after.dtype]}, in the base {NAMES[before.dtype]}: bits can only be compared in "
                'one dtype; with dtype "base" or "result" the other one is converted first'
            )


def check_plain(name: str, value: Tensor) -> None:
    """Raise ValueError if a tensor's bits cannot be changed: it is sharded, offloaded or of an unusual dtype."""
    if hasattr(value, "full_tensor"):
        raise ValueError(f"{name} is sharded over processes, expected whole tensors")
    if value.is_meta:
        raise ValueError(f"{name} is offloaded, expected its weights in memory: move the network to a device")
    if value.dtype not in NAMES:
        raise ValueError(f"{name} is {value.dtype}, expected one of {', '.join(DTYPES)}")


def _row(tensor: PatchTensor) -> list[Any]:
    row: list[Any] = [tensor.name, tensor.dtype, list(tensor.shape)]
    return [*row, tensor.count, tensor.code.k, tensor.code.unary] if tensor.count else row


def _read_table(data: bytes) -> tuple[PatchTensor, ...]:
    """The tensors, checked one by one. ValueError if the table is damaged."""
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, MAX_TABLE)
    if not inflater.eof or inflater.unused_data:
        raise ValueError(f"its table does not end, or has more than {MAX_TABLE} bytes")
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError("its table is not a list")
    return tuple(_tensor(row) for row in rows)


def _tensor(row: Any) -> PatchTensor:
    if not isinstance(row, list) or len(row) not in (3, 6):
        raise ValueError("a row of its table has not 3 or 6 items")
    name, dtype, shape, *numbers = row
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(shape, list):
        raise ValueError("a row of its table does not begin with a name, a dtype and a shape")
    if len(shape) > 64 or any(type(n) is not int or not 0 <= n <= MAX_ENTRIES for n in (*shape, *numbers)):
        raise ValueError(f"the numbers of {name} are out of range")
    numel = math.prod(shape)
    code = Code(numel, *(numbers or (0, 0, 0)))
    try:
        code.check()
    except ValueError as error:
        raise ValueError(f"the row of {name} is wrong: {error}") from error
    return PatchTensor(name, dtype, tuple(shape), code)


def _digest(described: str, *parts: bytes) -> str:
    digest = hashlib.sha256(described.encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _refusal(header: Mapping[str, str]) -> str:
    if "delta" in header:
        return "it is a delta file of an earlier version; make a patch of it: pecker-fast patch make BASE DELTA"
    return f"its format is {header.get('format')!r} {header.get('version')!r}, expected {FORMAT!r} {VERSION!r}"
