"""The mask of scores that do not fit into memory together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .entries import take_entries
from .mask import SaliencyMask
from .scores import Ranked, ScoreTensors, relative_to_others


@dataclass(eq=False)
class _Candidates:
    """Entries of a tensor that may be among the largest: a mask, and what its entries are ranked by."""

    words: Tensor
    ranked: Ranked

    @property
    def count(self) -> int:
        return self.ranked.tensors[0].numel()

    def chosen(self, words: Tensor, count: int, numel: int) -> "_Candidates":
        """Those of the candidates that ``words`` has, a mask over them. The tensor has ``numel`` entries."""
        tensors, relative_to, damping = self.ranked
        values = [take_entries(tensor, words, count) for tensor in tensors]
        others = None if relative_to is None else [take_entries(tensor, words, count) for tensor in relative_to]
        bits = ops.unpack_bits(self.words, numel)
        bits = bits.masked_scatter(bits, ops.unpack_bits(words, self.count))
        return _Candidates(ops.pack_bits(bits), Ranked(values, others, damping))


class MaskInParts:
    """Makes the mask that ``saliency_mask(..., k=k)`` makes of all scores together, bit for bit, of a part at a time.

    Only entries that are among the k largest so far are kept, packed: 4 bytes each, or 8 with ``relative_to``.

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        Shapes of all tensors by name, in the order of the mask.
    k : int
        Entries to keep, from 1 to the number of all.
    damping : float
        As in ``saliency_mask``.
    device : torch.device or str
        Device of the scores.
    backend : str, optional
        As in ``saliency_mask``.

    Examples
    --------
    >>> parts = MaskInParts({"a": (2,), "b": (2,)}, k=1)
    >>> parts.add({"a": torch.tensor([1.0, 3.0])})
    >>> parts.add({"b": torch.tensor([2.0, 0.0])})
    >>> parts.mask()["a"].tolist()
    [False, True]
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        k: int,
        *,
        damping: float = 0.01,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> None:
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self._numels = {name: shape.numel() for name, shape in self._shapes.items()}
        if not 1 <= k <= sum(self._numels.values()):
            raise ValueError(f"k is {k}, expected 1 to the number of entries, {sum(self._numels.values())}")
        self.k, self.damping, self.backend = k, damping, backend
        self.device = torch.device(device)
        self._candidates: dict[str, _Candidates] = {}
        self._seen: set[str] = set()
        self._threshold = torch.full((), float("inf"), device=self.device)
        self._nan_count = torch.zeros((), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def add(self, scores: Mapping[str, Tensor], relative_to: Mapping[str, Tensor] | None = None) -> None:
        """Take the scores of some tensors, which may be freed afterwards. Waits for the device.

        Parameters
        ----------
        scores : mapping of str to Tensor
            Whole tensors by name, each once over all calls.
        relative_to : mapping of str to Tensor, optional
            What they are relative to, see ``saliency_mask``; in all calls or in none.

        Raises
        ------
        ValueError
            If a tensor is unknown, has come before, or has another shape.
        """
        for name, score in scores.items():
            if name not in self._shapes or name in self._seen or score.shape != self._shapes[name]:
                raise ValueError(
                    f"scores has {name} of shape {tuple(score.shape)}, expected each of the {len(self._shapes)} "
                    "tensors once, in its shape"
                )
        # In the mask's order, which decides between ties.
        scores = {name: scores[name] for name, numel in self._numels.items() if numel and name in scores}
        self._seen.update(scores)
        if not scores:
            return
        values = ScoreTensors(scores)
        ranked = Ranked(values.tensors)
        if relative_to is not None:
            others = {name: relative_to[name] for name in scores}
            ranked = relative_to_others(values, others, self.damping, self.backend)
        mask = self._select(ranked, list(scores), [values.tensors[i].shape for i in range(len(scores))])
        self._nan_count += mask.nan_count
        for i, (name, count) in enumerate(zip(scores, mask.tensor_counts(), strict=True)):
            if count:
                # A copy, so that words of a part are not kept for the sake of one tensor's.
                words, part = mask.tensor_words(name).clone(), ranked.part(i)
                own = [take_entries(tensor, words, count) for tensor in part.tensors]
                rest = None if part.relative_to is None else [take_entries(t, words, count) for t in part.relative_to]
                self._candidates[name] = _Candidates(words, Ranked(own, rest, part.damping))
        del ranked, values, mask
        self._reduce()

    def _select(self, ranked: Ranked, names: list[str], shapes: Sequence[torch.Size]) -> SaliencyMask:
        """The mask of the largest entries, ``k`` of them if there are as many."""
        numel = sum(shape.numel() for shape in shapes)
        ks = torch.full((1,), min(self.k, numel), dtype=torch.int64, device=self.device)
        words, thresholds, _, nan_count = ranked.select(ks, False, self.backend)
        return SaliencyMask(words[0], shapes, names, threshold=thresholds[0], nan_count=nan_count)

    def _reduce(self) -> None:
        """Keep the ``k`` largest of the candidates."""
        names = [name for name in self._shapes if name in self._candidates]
        if not names:
            return
        parts = [self._candidates[name].ranked for name in names]
        own = [part.tensors[0] for part in parts]
        others = damping = None
        if parts[0].relative_to is not None:
            others = [part.relative_to[0] for part in parts]
            damping = torch.cat([part.damping for part in parts])
        mask = self._select(Ranked(own, others, damping), names, [tensor.shape for tensor in own])
        self._threshold = mask._threshold
        for name, count in zip(names, mask.tensor_counts(), strict=True):
            candidates = self._candidates[name]
            if count == 0:
                del self._candidates[name]
            elif count < candidates.count:
                self._candidates[name] = candidates.chosen(mask.tensor_words(name), count, self._numels[name])

    def mask(self) -> SaliencyMask:
        """The mask.

        Raises
        ------
        ValueError
            If the scores of a tensor are missing.
        """
        missing = [name for name, numel in self._numels.items() if numel and name not in self._seen]
        if missing:
            raise ValueError(
                f"the scores of {missing[0]} are missing, expected those of all {len(self._shapes)} tensors"
            )
        offsets = ops.word_offsets(list(self._numels.values()))
        words = torch.zeros(offsets[-1], dtype=torch.int32, device=self.device)
        for i, name in enumerate(self._shapes):
            if name in self._candidates:
                words[offsets[i] : offsets[i + 1]] = self._candidates[name].words
        return SaliencyMask(
            words, list(self._shapes.values()), list(self._shapes), threshold=self._threshold, nan_count=self._nan_count
        )
