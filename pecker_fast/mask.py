"""SaliencyMask: which entries of a list of tensors are salient, one bit each."""

import hashlib
import json
import math
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import ops
from .files import save_tensors
from .flat import FlatView
from .sharding import add_over, like, local, part_of, whole

FORMAT = "pecker_fast.saliency_mask"
FORMAT_VERSION = "1"
# All that a file's metadata may have: a changed name of a hash does not make it a file without one.
_FIELDS = {
    *("format", "version", "names", "shapes", "count", "density", "threshold", "nan_count"),
    *("sha256", "fields_sha256"),
}

# What DataParallel, DDP and torch.compile put in front of every name of a module.
_PREFIXES = ("module.", "_orig_mod.")


def _plain_name(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _unwrapped(names: list[str]) -> Iterator[list[str]]:
    """The names as they are, then without each prefix that all of them have."""
    yield names
    while names:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            return
        names = [name.removeprefix(prefix) for name in names]
        yield names


def match_names(wanted: Sequence[str], available: Sequence[str]) -> list[int | None]:
    """For each of the wanted names the position among ``available`` of the parameter it means; None if there is none.

    Names as they are come first: a child may be called "module". Then the prefixes of wrappers are taken off all names
    of one side or the other, and last off single names that have no partner yet.

    Raises
    ------
    ValueError
        If a name without its prefixes could mean several.
    """
    pairs = [
        (i + j, names, others)
        for i, names in enumerate(_unwrapped(list(wanted)))
        for j, others in enumerate(_unwrapped(list(available)))
    ]
    for _, names, others in sorted(pairs, key=lambda pair: pair[0]):
        if set(names) <= set(others) or set(others) <= set(names):
            index = {name: i for i, name in enumerate(others)}
            return [index.get(name) for name in names]
    index = {name: i for i, name in enumerate(available)}
    positions = [index.get(name) for name in wanted]
    free: dict[str, list[int]] = {}
    for i in set(index.values()).difference(positions):
        free.setdefault(_plain_name(available[i]), []).append(i)
    for w, name in enumerate(wanted):
        if positions[w] is None and (partners := free.get(_plain_name(name))):
            if len(partners) > 1:
                raise ValueError(f"{name} could be {' or '.join(available[i] for i in sorted(partners))}")
            positions[w] = partners[0]
    for i, count in Counter(position for position in positions if position is not None).items():
        if count > 1:
            names = [name for name, position in zip(wanted, positions, strict=True) if position == i]
            raise ValueError(f"{available[i]} could be {' or '.join(names)}")
    return positions


class SaliencyMask:
    """One bit for every entry of an ordered list of tensors, bit-packed. Immutable; made by ``saliency_mask``.

    Boolean indexing needs 8 times the memory of the words; ``mask[name]`` expands one tensor at a time.

    Parameters
    ----------
    words : Tensor
        int32 [W]. Bit i of word w of a tensor is its entry 32 w + i in row-major order. Every tensor starts on a word;
        bits past its end are 0.
    shapes : sequence of sequence of int
        Shapes of the tensors.
    names : sequence of str, optional
        Names of the tensors.
    threshold : Tensor, optional
        float32 [] or [number of tensors] (scope="tensor"): the smallest magnitude that is kept. None if unknown.
    nan_count : Tensor, optional
        int64 []: NaN entries seen by the selection. None counts as 0.
    params : sequence of Tensor, optional
        The parameters that the mask was made from, held weakly, to align it with an optimizer.

    Raises
    ------
    TypeError, ValueError
        If the words do not fit the shapes, or the names are not unique.
    """

    def __init__(
        self,
        words: Tensor,
        shapes: Sequence[Sequence[int]],
        names: Sequence[str] | None = None,
        *,
        threshold: Tensor | None = None,
        nan_count: Tensor | None = None,
        params: Sequence[Tensor] | None = None,
    ) -> None:
        self.shapes = tuple(shape if isinstance(shape, torch.Size) else torch.Size(shape) for shape in shapes)
        self.names = None if names is None else tuple(names)
        self.numels = tuple(math.prod(shape) for shape in self.shapes)
        self.word_offsets = tuple(ops.word_offsets(self.numels))
        if self.names is not None:
            if len(self.names) != len(self.shapes):
                raise ValueError(f"names has {len(self.names)} entries for {len(self.shapes)} shapes")
            if len(set(self.names)) != len(self.names):
                raise ValueError("names are not unique")
        if words.dtype != torch.int32:
            raise TypeError(f"words is {words.dtype}, expected int32")
        if words.shape != (self.word_offsets[-1],):
            raise ValueError(f"words has shape {tuple(words.shape)}, these shapes need ({self.word_offsets[-1]},)")
        self._words = words.contiguous()
        self._threshold = threshold
        self._nan_count = nan_count
        self._count: int | None = None
        self._tensor_counts: list[int] | None = None
        self._index = None if self.names is None else {name: i for i, name in enumerate(self.names)}
        self._params: list[weakref.ref] | None = None
        if params is not None:
            self.bind(params)

    @classmethod
    def from_bool(
        cls, tensors: Mapping[str, Tensor] | Iterable[Tensor], *, device: torch.device | None = None
    ) -> "SaliencyMask":
        """The mask of given bool tensors (for example one made by another program)."""
        names = list(tensors) if isinstance(tensors, Mapping) else None
        values = list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
        for i, value in enumerate(values):
            if value.dtype != torch.bool:
                raise TypeError(f"tensor {names[i] if names else i} is {value.dtype}, expected bool")
        device = device or (values[0].device if values else torch.device("cpu"))
        words = [ops.pack_bits(value.to(device).contiguous()) for value in values]
        words = torch.cat(words) if words else torch.zeros(0, dtype=torch.int32, device=device)
        return cls(words, [value.shape for value in values], names)

    # ---- what it holds

    @property
    def words(self) -> Tensor:
        """int32 [W], 32 entries a word; not to be written to."""
        return self._words

    @property
    def device(self) -> torch.device:
        return self._words.device

    @property
    def numel(self) -> int:
        """Entries in all, salient or not."""
        return sum(self.numels)

    @property
    def count(self) -> int:
        """Salient entries. The first use synchronises with the device."""
        if self._count is None:
            self._count = sum(self.tensor_counts())
        return self._count

    @property
    def density(self) -> float:
        """Share of salient entries, in [0, 1]."""
        return self.count / self.numel if self.numel else 0.0

    @property
    def threshold(self) -> float | dict[str | int, float] | None:
        """Smallest kept magnitude: a float, a mapping by tensor for scope="tensor", None after set algebra.

        inf where nothing is kept. The first use synchronises with the device.
        """
        if self._threshold is None:
            return None
        if self._threshold.dim() == 0:
            return self._threshold.item()
        return dict(zip(self._labels(), self._threshold.tolist(), strict=True))

    @property
    def nan_count(self) -> int:
        """NaN entries that the selection saw; they are never salient."""
        return 0 if self._nan_count is None else int(self._nan_count)

    def _labels(self) -> Sequence[str | int]:
        return self.names if self.names is not None else range(len(self.shapes))

    def tensor_counts(self) -> list[int]:
        """Salient entries of each tensor. The first use synchronises with the device."""
        if self._tensor_counts is None:
            blocks = ops.block_counts(self._words, self.word_offsets[:-1], self.numels).tolist()
            counts, start = [], 0
            for numel in self.numels:
                counts.append(sum(blocks[start : start + ops.num_blocks(numel)]))
                start += ops.num_blocks(numel)
            self._tensor_counts = counts
        return self._tensor_counts

    def _position(self, key: str | int) -> int:
        if isinstance(key, str):
            if self._index is None:
                raise KeyError(f"{key!r}: this mask has no names, index it with 0 to {len(self.shapes) - 1}")
            if key not in self._index:
                raise KeyError(f"{key!r} is not in this mask of {len(self.shapes)} tensors")
            return self._index[key]
        if not -len(self.shapes) <= key < len(self.shapes):
            raise IndexError(f"index {key} is out of range for a mask of {len(self.shapes)} tensors")
        return key % len(self.shapes)

    def tensor_words(self, key: str | int) -> Tensor:
        """The words of one tensor, a view."""
        i = self._position(key)
        return self._words[self.word_offsets[i] : self.word_offsets[i + 1]]

    def __getitem__(self, key: str | int) -> Tensor:
        """Bool tensor, True where salient, of the shape of the tensor named or numbered ``key``."""
        i = self._position(key)
        return ops.unpack_bits(self.tensor_words(i), self.numels[i]).view(self.shapes[i])

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"SaliencyMask({len(self.shapes)} tensors, {self.numel} entries, {self.device})"

    # ---- set algebra

    def _with_words(
        self, words: Tensor, threshold: Tensor | None = None, nan_count: Tensor | None = None
    ) -> "SaliencyMask":
        """Another mask of the same tensors."""
        # Not copy.copy, which leaves the parameters out as pickle does.
        mask = object.__new__(SaliencyMask)
        mask.__dict__.update(self.__dict__)
        mask._words, mask._threshold, mask._nan_count = words.contiguous(), threshold, nan_count
        mask._count = mask._tensor_counts = None
        return mask

    def _require_same_layout(self, other: "SaliencyMask") -> None:
        if not isinstance(other, SaliencyMask):
            raise TypeError(f"expected a SaliencyMask, got {type(other).__name__}")
        if self.shapes != other.shapes:
            raise ValueError("the masks are of tensors with different shapes")
        if self.names is not None and other.names is not None and self.names != other.names:
            raise ValueError("the masks are of tensors with different names")
        if self.device != other.device:
            raise ValueError(f"the masks are on {self.device} and {other.device}, move one with .to()")

    def __and__(self, other: "SaliencyMask") -> "SaliencyMask":
        self._require_same_layout(other)
        return self._with_words(self._words & other._words)

    def __or__(self, other: "SaliencyMask") -> "SaliencyMask":
        self._require_same_layout(other)
        return self._with_words(self._words | other._words)

    def __xor__(self, other: "SaliencyMask") -> "SaliencyMask":
        self._require_same_layout(other)
        return self._with_words(self._words ^ other._words)

    def __invert__(self) -> "SaliencyMask":
        words = ~self._words
        for numel, end in zip(self.numels, self.word_offsets[1:], strict=True):
            tail = numel % ops.WORD_BITS
            if tail:
                words[end - 1] &= (1 << tail) - 1
        return self._with_words(words)

    def equal(self, other: "SaliencyMask") -> bool:
        """Whether both masks have the same layout and the same bits."""
        self._require_same_layout(other)
        return torch.equal(self._words, other._words)

    def iou(self, other: "SaliencyMask") -> float:
        """Intersection over union, in [0, 1]; 1 for two empty masks."""
        union = (self | other).count
        return (self & other).count / union if union else 1.0

    # ---- use

    def bind(self, params: Sequence[Tensor]) -> None:
        """Makes ``params``, one for each tensor, those that ``align`` recognises by identity. Held weakly."""
        self._require_shapes([local(param).shape for param in params])
        self._params = [weakref.ref(param) for param in params]

    def align(self, params: Sequence[Tensor], names: Sequence[str] | None = None) -> list[int]:
        """For each of ``params`` the number of its tensor in this mask.

        By identity if the mask was made from a module and these are its parameters; else by name where both have
        names (``module.`` and ``_orig_mod.`` prefixes aside); else by order where the mask has no names.
        Of a sharded parameter (DTensor) the local part counts. Raises ValueError if a parameter is missing, a shape
        differs or the mask is on another device.
        """
        positions = self._align_by_identity(params)
        if positions is None:
            if self.names is not None and names is not None:
                positions = self._align_by_name(names)
            elif self.names is None:
                if len(params) != len(self.shapes):
                    raise ValueError(
                        f"mask has {len(self.shapes)} tensors without names, there are {len(params)} parameters"
                    )
                positions = list(range(len(params)))
            else:
                raise ValueError(
                    "mask has names, the parameters have none and are not those it was made from: "
                    "give the optimizer model.named_parameters()"
                )
        for i, (param, position) in enumerate(zip(map(local, params), positions, strict=True)):
            label = names[i] if names is not None else i
            if param.shape != self.shapes[position]:
                raise ValueError(
                    f"mask is of shape {tuple(self.shapes[position])} for parameter {label} "
                    f"of shape {tuple(param.shape)}: it was made for another model"
                )
            if param.device != self.device:
                raise ValueError(
                    f"mask is on {self.device}, parameter {label} on {param.device}: move it with mask.to()"
                )
        return positions

    def _align_by_identity(self, params: Sequence[Tensor]) -> list[int] | None:
        if self._params is None:
            return None
        positions = {id(ref()): i for i, ref in enumerate(self._params) if ref() is not None}
        found = [positions.get(id(param)) for param in params]
        return None if any(position is None for position in found) else found

    def _align_by_name(self, names: Sequence[str]) -> list[int]:
        positions = match_names(names, self.names)
        missing = [name for name, position in zip(names, positions, strict=True) if position is None]
        if missing:
            raise ValueError(
                f"mask has no tensor for parameter {missing[0]} ({len(missing)} of {len(names)} missing): "
                "it was made for another model"
            )
        return positions

    def apply_(self, tensors: nn.Module | Mapping[str, Tensor] | Iterable[Tensor]) -> None:
        """Sets the entries outside the mask to 0, in place (NaN too). Tensors may be any part of those of the mask.

        ``tensors``: a module (its .grad; None is skipped), a mapping by name, or all tensors in order.
        Raises ValueError as ``align`` does, before anything is changed.
        """
        if isinstance(tensors, nn.Module):
            named = [(name, param) for name, param in tensors.named_parameters() if param.requires_grad]
            positions = self.align([param for _, param in named], [name for name, _ in named])
            pairs = [(local(p.grad), i) for (_, p), i in zip(named, positions, strict=True) if p.grad is not None]
            values, positions = [grad for grad, _ in pairs], [i for _, i in pairs]
        else:
            names = list(tensors) if isinstance(tensors, Mapping) else None
            values = list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
            positions = self.align(values, names)
            values = [local(value) for value in values]
        with torch.no_grad():
            # A mask is in row-major order, so tensors in another order are copied, masked and copied back.
            flats = [value if value.is_contiguous() else value.contiguous() for value in values]
            ops.apply_mask_(flats, self._words, [self.word_offsets[i] for i in positions])
            for value, flat in zip(values, flats, strict=True):
                if value is not flat:
                    value.copy_(flat)

    def words_in_storage_order(self, key: str | int, view: FlatView) -> Tensor:
        """The words of one tensor in the order in which a dense, permuted tensor lies in memory (a copy)."""
        bits = self[key]
        return ops.pack_bits(view.flatten(bits))

    def to(self, device: torch.device | str) -> "SaliencyMask":
        """This mask with its words on ``device``; itself where they are there already."""
        device = torch.device(device)
        if self._words.device == device or (device.index is None and self._words.device.type == device.type):
            return self
        move = lambda tensor: None if tensor is None else tensor.to(device)  # noqa: E731
        mask = SaliencyMask(
            move(self._words), self.shapes, self.names, threshold=move(self._threshold), nan_count=move(self._nan_count)
        )
        mask._params, mask._count, mask._tensor_counts = self._params, self._count, self._tensor_counts
        return mask

    def whole(self, params: Sequence[Tensor]) -> "SaliencyMask":
        """The mask of all entries of sharded ``params`` (DTensor), one for each tensor in order, put together from the
        processes' parts, each of which has to call this."""
        self._require_shapes([local(param).shape for param in params])
        bits = (whole(like(self[i].to(torch.uint8), param)).bool() for i, param in enumerate(params))
        nans = None if self._nan_count is None else add_over(self._nan_count.clone(), params)
        return self._of_bits(bits, [param.shape for param in params], nans)

    def part(self, params: Sequence[Tensor]) -> "SaliencyMask":
        """This process's part of a mask of all entries of sharded ``params`` (DTensor), one for each tensor in order:
        the opposite of ``whole``. NaN are not counted any more."""
        self._require_shapes([param.shape for param in params])
        bits = (part_of(self[i], param) for i, param in enumerate(params))
        return self._of_bits(bits, [local(param).shape for param in params], None)

    def _require_shapes(self, shapes: list[torch.Size]) -> None:
        if shapes != list(self.shapes):
            raise ValueError("params do not have the shapes of the mask's tensors")

    def _of_bits(
        self, bits: Iterable[Tensor], shapes: Sequence[torch.Size], nan_count: Tensor | None
    ) -> "SaliencyMask":
        words = [self._words[:0], *(ops.pack_bits(value.contiguous()) for value in bits)]
        return SaliencyMask(torch.cat(words), shapes, self.names, threshold=self._threshold, nan_count=nan_count)

    def summary(self, what: str = "salient") -> str:
        """A table: for each tensor its shape, its salient entries and their share; the whole mask last.

        ``what`` heads the column of the entries that are set.
        """
        rows = [("tensor", "shape", what, "density")]
        for label, shape, count, numel in zip(
            self._labels(), self.shapes, self.tensor_counts(), self.numels, strict=True
        ):
            rows.append((str(label), "x".join(map(str, shape)) or "scalar", f"{count}", _percent(count, numel)))
        rows.append(
            (f"all {len(self.shapes)} tensors", f"{self.numel}", f"{self.count}", _percent(self.count, self.numel))
        )
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        if isinstance(self.threshold, float):
            lines.append(f"threshold {self.threshold:.6g}, NaN entries {self.nan_count}")
        return "\n".join(lines)

    # ---- files

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file: the words, and names, shapes, density and threshold in its metadata.

        The file appears whole or not at all: it is written under a temporary name, synced and renamed.
        """
        metadata = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "names": json.dumps(self.names),
            "shapes": json.dumps([list(shape) for shape in self.shapes]),
            "count": str(self.count),
            "density": repr(self.density),
            "threshold": json.dumps(None if self._threshold is None else self._threshold.tolist()),
            "nan_count": str(self.nan_count),
        }
        words = self._words.cpu()
        metadata["sha256"] = _sha256(metadata["names"], metadata["shapes"], words)
        metadata["fields_sha256"] = _fields_sha256(metadata)
        save_tensors(path, {"words": words}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> "SaliencyMask":
        """Reads a file that ``save`` wrote. Raises ValueError if it is truncated, damaged or something else."""
        from safetensors import SafetensorError, safe_open

        if os.path.isdir(path):
            raise ValueError(f"{path} is not a saliency mask: it is a folder")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a saliency mask: its format is {metadata.get('format')!r}")
                if metadata.get("version") != FORMAT_VERSION:
                    raise ValueError(
                        f"{path} has format version {metadata.get('version')!r}, this program reads {FORMAT_VERSION!r}"
                    )
                words = file.get_tensor("words")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        try:
            names, shapes = json.loads(metadata["names"]), json.loads(metadata["shapes"])
            threshold, nan_count = json.loads(metadata["threshold"]), int(metadata["nan_count"])
            count = int(metadata["count"])
            mask = cls(
                words,
                shapes,
                names,
                threshold=None if threshold is None else torch.tensor(threshold, dtype=torch.float32),
                nan_count=torch.tensor(nan_count),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged saliency mask: {error}") from error
        hashed = metadata.get("fields_sha256")
        if not metadata.keys() <= _FIELDS or hashed not in (None, _fields_sha256(metadata)):
            raise ValueError(f"{path} is a damaged saliency mask: its fields are not those that were saved")
        # Files of older versions have no hash of the fields, and those before them none at all.
        if "sha256" in metadata and metadata["sha256"] != _sha256(metadata["names"], metadata["shapes"], words):
            raise ValueError(f"{path} is a damaged saliency mask: names, shapes or words are not those that were saved")
        if mask.count != count or metadata.get("density") != repr(mask.density) or not mask.equal(~~mask):
            raise ValueError(
                f"{path} is a damaged saliency mask: it has {mask.count} salient entries, {count} were saved"
            )
        return mask.to(device)

    def __getstate__(self) -> dict:
        # Weak references can neither be pickled nor be right in a copy: names or order align those.
        return {**self.__dict__, "_params": None}


def _sha256(names: str, shapes: str, words: Tensor) -> str:
    """Of the names and shapes, as JSON, and the words."""
    digest = hashlib.sha256(f"{names}\n{shapes}\n".encode())
    digest.update(words.contiguous().numpy())
    return digest.hexdigest()


def _fields_sha256(metadata: Mapping[str, str]) -> str:
    """Of all fields, threshold and NaN count among them, as JSON."""
    fields = {key: value for key, value in metadata.items() if key != "fields_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _percent(count: int, numel: int) -> str:
    return f"{100 * count / numel:.2f}%" if numel else "-"
