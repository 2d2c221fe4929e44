"""Inputs of the emulated kernels, and how their results are compared with the reference's."""

import random

import torch

from pecker_fast.ops import reference
from pecker_fast.ops.layout import num_words

from . import streaming

SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*SCORE_DTYPES, torch.float64)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MARGIN = 24
_CANARY = 0x3C5A


class Memory:
    """Places tensors at chosen misalignments, with a margin on each side that nothing may write to."""

    def __init__(self):
        self._margins = []

    def place(self, tensor, misalignment: int):
        if tensor is None:
            return None
        flat = torch.empty(tensor.numel() + 2 * _MARGIN, dtype=tensor.dtype)
        bits = flat.view(_INTEGERS[flat.element_size()])
        bits.fill_(_CANARY)
        start = 16 + misalignment
        placed = flat[start : start + tensor.numel()]
        placed.copy_(tensor.reshape(-1))
        self._margins += [bits[:start], bits[start + tensor.numel() :]]
        return placed.view(tensor.shape)

    def check(self):
        assert all(bool((margin == _CANARY).all()) for margin in self._margins), "written outside of a tensor"


def sizes(large: int = 1) -> list[int]:
    """Sizes around every boundary in the kernels."""
    fixed = [0, 1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025]
    boundary = [16384 * random.choice((1, 1, 1, 2)) + random.randint(-5, 5) for _ in range(large)]
    chosen = [*random.sample(fixed, 6), random.randint(1, 3000), *boundary]
    random.shuffle(chosen)
    return chosen


def values(numel: int, dtype, spread: float = 1.0):
    return (torch.randn(numel, dtype=torch.float64) * spread).to(dtype)


def spoil(tensor):
    """Puts infinities, NaN, zeros and subnormals among the values."""
    for special in (float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-40):
        if tensor.numel():
            tensor.view(-1)[torch.randint(tensor.numel(), (1 + tensor.numel() // 50,))] = special
    return tensor


def make_mask(numels: list[int], density: float):
    """(words, first words, bool masks): garbage between the tensors and past their ends."""
    offsets, masks = [], [torch.rand(numel) < density for numel in numels]
    gaps = [random.randint(0, 2) for _ in numels]
    words = torch.randint(-(2**31), 2**31 - 1, (sum(map(num_words, numels)) + sum(gaps) + 1,), dtype=torch.int32)
    at = 0
    for numel, gap, mask in zip(numels, gaps, masks, strict=True):
        at += gap
        offsets.append(at)
        packed = reference.pack_bits(mask)
        if numel % 32:
            packed[-1] |= torch.tensor(-1 << (numel % 32)).to(torch.int32)
        words[at : at + packed.numel()] = packed
        at += packed.numel()
    return words, offsets, masks


def assert_same_bits(actual, expected, name: str):
    kind = _INTEGERS[actual.element_size()]
    a, b = actual.view(-1).view(kind), expected.view(-1).view(kind)
    same = (a == b) | (actual.view(-1).isnan() & expected.view(-1).isnan())
    bad = (~same).nonzero().view(-1)
    assert bad.numel() == 0, (
        f"{name}: {bad.numel()} of {actual.numel()} differ, first at {int(bad[0])}: "
        f"{actual.view(-1)[bad[0]]!r} for {expected.view(-1)[bad[0]]!r}"
    )


def assert_same_update(actual, expected, before, frozen, name: str, slack: float = 0.0):
    """Frozen entries are bit-identical; the rest is equal up to the last bits."""
    a, b, old = (t.view(-1).view(_INTEGERS[t.element_size()]) for t in (actual, expected, before))
    assert bool((b == old)[frozen].all()) and bool((a == old)[frozen].all()), f"{name}: frozen entries changed"
    if not actual.is_floating_point():
        assert torch.equal(a, b), name
        return
    tolerance = 8 * torch.finfo(actual.dtype).eps
    finite = expected[expected.isfinite()]
    scale = float(finite.double().square().mean().sqrt()) if finite.numel() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance * scale + slack, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )
    if actual.element_size() == 2:
        # Only if a last bit of the float32 result decided the rounding.
        different = ((a != b) & ~(actual.view(-1).isnan() & expected.view(-1).isnan())).sum()
        assert different <= 2 + actual.numel() // 50, f"{name}: {different} of {actual.numel()} are rounded differently"


def assert_all_same(actual: list, expected: list, name: str):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, b, f"{name}[{i}] of {a.numel()} entries")


def some_missing(tensors: list) -> list:
    return [t if random.random() < 0.8 else None for t in tensors]


def set_random_order() -> None:
    """Lets threads and blocks run in another order, so that a missing barrier shows as a wrong result."""
    streaming.set_order(random.choice(("forward", "reverse", "shuffled")))
