"""Patches on weights in memory: every hash is checked before the first entry changes."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..hashing import state_hash
from .patch import Patch, as_bits, check_plain


class Switched(Mapping[str, Tensor]):
    """A state dict after some patches, computed a tensor at a time when it is asked for.

    Parameters
    ----------
    state : mapping of str to Tensor
        The weights as they are.
    patches : sequence of Patch
        Applied in this order; an XOR also reverts.
    """

    def __init__(self, state: Mapping[str, Tensor], patches: Sequence[Patch]) -> None:
        self.state, self.patches = state, patches

    def __getitem__(self, name: str) -> Tensor:
        value = self.state[name]
        for patch in self.patches:
            if patch[name].count:
                value = patch.switched(name, value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def check_patches(state: Mapping[str, Tensor], patches: Sequence[Patch], revert: bool = False) -> dict[str, Tensor]:
    """Check that patches fit weights one after the other, and that they give the recorded results. Changes nothing.

    Parameters
    ----------
    state : mapping of str to Tensor
        The weights as they are.
    patches : sequence of Patch
        In the order in which they are applied, or reverted.
    revert : bool
        Whether to revert them.

    Returns
    -------
    dict of str to Tensor
        The tensors of ``state`` that the patches name.

    Raises
    ------
    ValueError
        If there is no patch, a tensor is missing, has another shape or dtype or cannot be changed, or the sha256 of the
        weights before or after a patch is not the recorded one.
    """
    if not patches:
        raise ValueError("no patch is given")
    own = _own(state, patches[0])
    for patch in patches[1:]:
        if [(t.name, t.shape, t.dtype) for t in patch.tensors] != [
            (t.name, t.shape, t.dtype) for t in patches[0].tensors
        ]:
            raise ValueError("the patches are of different architectures or dtypes")
    current = state_hash(own)
    for i, patch in enumerate(patches):
        before, after = (patch.result, patch.base) if revert else (patch.base, patch.result)
        if current != before:
            raise ValueError(_mismatch(current, patches, i, revert))
        current = state_hash(Switched(own, patches[: i + 1]))
        if current != after:
            raise ValueError(
                f"{_ordinal(i, patches)} is damaged: it gives weights of sha256 {current}, it says {after}"
            )
    return own


def switch_(state: Mapping[str, Tensor], patches: Sequence[Patch], revert: bool = False) -> None:
    """Apply or revert patches to tensors in place, on their devices.

    Parameters
    ----------
    state : mapping of str to Tensor
        The tensors. Tied tensors are changed once. Tensors may have any strides.
    patches, revert
        As for ``check_patches``.

    Raises
    ------
    ValueError
        As by ``check_patches``, or if tensors that share memory are to change differently. Nothing has changed then.
    """
    own = check_patches(state, patches, revert)
    changed = {name for patch in patches for name in (tensor.name for tensor in patch.changed)}
    names = _distinct(own, changed, patches)
    done: list[str] = []
    after = Switched(own, patches)
    try:
        with torch.no_grad():
            for name in names:
                as_bits(own[name]).copy_(as_bits(after[name]))
                done.append(name)
    except BaseException:
        # Out of memory, or an interrupt: the same change undoes what is done.
        for name in done:
            as_bits(own[name]).copy_(as_bits(after[name]))
        raise


def _own(state: Mapping[str, Tensor], patch: Patch) -> dict[str, Tensor]:
    """The tensors that a patch names. Others are only allowed as further names of these."""
    for tensor in patch.tensors:
        if tensor.name not in state:
            raise ValueError(
                f"the network has no {tensor.name}, which the patch names: it is of another architecture, or wrapped"
            )
        value = state[tensor.name]
        check_plain(tensor.name, value)
        if not tensor.fits(value):
            raise ValueError(
                f"{tensor.name} has shape {tuple(value.shape)} and {value.dtype}, "
                f"the patch is for {tensor.shape} and torch.{tensor.dtype}"
            )
    own = {tensor.name: state[tensor.name] for tensor in patch.tensors}
    views = {_view(value) for value in own.values()}
    others = [name for name, value in state.items() if name not in own and (value.is_meta or _view(value) not in views)]
    if others:
        raise ValueError(f"the network has {len(others)} tensors that the patch does not name, such as {others[0]}")
    return own


def _view(value: Tensor) -> tuple:
    return value.device, value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride())


def _distinct(own: Mapping[str, Tensor], changed: set[str], patches: Sequence[Patch]) -> list[str]:
    """The changed tensors, without further names of the same memory."""
    storages: dict[tuple, list[str]] = {}
    for name, value in own.items():
        if value.numel():
            storages.setdefault((value.device, value.untyped_storage().data_ptr()), []).append(name)
    names = [name for name in own if name in changed]
    for group in storages.values():
        firsts: dict[tuple, str] = {}
        for name in group:
            first = firsts.setdefault(_view(own[name]), name)
            if first != name:
                if any(_differs(patch, first, name) for patch in patches):
                    raise ValueError(f"{first} and {name} share memory, but the patch changes them differently")
                if name in changed:
                    names.remove(name)
        if changed.intersection(group):
            _check_apart(own, list(firsts.values()))
    return names


def _differs(patch: Patch, first: str, second: str) -> bool:
    same = patch[first].code == patch[second].code
    return not same or any((part(first) != part(second)).any() for part in (patch.positions, patch.values))


def _check_apart(own: Mapping[str, Tensor], names: list[str]) -> None:
    """Raise ValueError if views of one storage overlap, or a view overlaps with itself."""
    ends = []
    for name in names:
        value = own[name]
        steps = [(size - 1, stride) for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]
        if any(stride == 0 for _, stride in steps):
            raise ValueError(f"{name} has several entries in one place of memory, expected a plain tensor")
        span = 1 + sum(last * stride for last, stride in steps)
        start = value.storage_offset() * value.element_size()
        ends.append((start, start + span * value.element_size(), name))
    ends.sort()
    for (_, end, name), (start, _, other) in pairwise(ends):
        if start < end:
            raise ValueError(f"{name} and {other} share memory, expected separate tensors")


def _ordinal(i: int, patches: Sequence[Patch]) -> str:
    return "the patch" if len(patches) == 1 else f"patch {i + 1} of {len(patches)}"


def _mismatch(current: str, patches: Sequence[Patch], i: int, revert: bool) -> str:
    """Why a patch does not fit weights of sha256 ``current``, and what to do."""
    patch, which = patches[i], _ordinal(i, patches)
    before, after = (patch.result, patch.base) if revert else (patch.base, patch.result)
    text = f"{which} is for weights of sha256 {before[:12]}..., these are {current[:12]}..."
    ends = {p.base if revert else p.result for p in patches}
    starts = {p.result if revert else p.base for p in patches}
    if len(patches) > 1 and len(starts - ends) == 1 and i == 0 and current in starts:
        word = "last one first" if revert else "in the order in which they were made"
        return f"{text}: the patches are in the wrong order, give them {word}"
    if current == after:
        return f"{text}, the {'base' if revert else 'result'} of this patch: it is already {_done(revert)}"
    if revert:
        return f"{text}: if patches were applied after this one, revert those first, the last one first"
    return f"{text}: expected the base, with the patches applied on top of which this one was made"


def _done(revert: bool) -> str:
    return "reverted" if revert else "applied"
