"""Masks of scores that come a part at a time: those of all scores together, bit for bit."""

import pytest
import torch

import pecker_fast as pf
from pecker_fast.entries import put_entries, take_entries
from pecker_fast.mask_in_parts import MaskInParts
from tests.inputs import SCORE_KINDS, same_bits, scores

SHAPES = {"a": (7, 5, 3), "b": (), "c": (0, 4), "d": (1100,), "e": (33, 2), "f": (64,)}


def named(kind: str) -> dict[str, torch.Tensor]:
    return {name: scores(kind, torch.Size(shape).numel()).view(shape) for name, shape in SHAPES.items()}


def in_parts(own, others, k: int, cuts: list[list[str]], damping: float = 0.01):
    parts = MaskInParts(SHAPES, k, damping=damping)
    for names in cuts:
        rest = None if others is None else {name: others[name] for name in names}
        parts.add({name: own[name] for name in names}, rest)
    return parts.mask()


CUTS = [[[*SHAPES]], [["a"], ["b", "c"], ["d", "e"], ["f"]], [["f", "d"], ["c"], ["e", "a", "b"]]]


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("relative", [None, "heavy", "special"])
def test_the_mask_is_that_of_all_scores_together(kind, relative):
    own, others = named(kind), None if relative is None else named(relative)
    numel = sum(value.numel() for value in own.values())
    for k in (1, 40, 500, numel):
        whole = pf.saliency_mask(own, k=k, relative_to=others, damping=0.05)
        for cuts in CUTS:
            mask = in_parts(own, others, k, cuts, 0.05)
            assert torch.equal(mask.words, whole.words) and mask.names == whole.names and mask.shapes == whole.shapes
            assert mask.nan_count == whole.nan_count and mask.threshold == whole.threshold, (k, cuts)


def test_only_the_largest_are_kept():
    own, others = named("normal"), named("normal")
    parts = MaskInParts(SHAPES, 30)
    for name in SHAPES:
        parts.add({name: own[name]}, {name: others[name]})
        assert sum(candidates.count for candidates in parts._candidates.values()) <= 30


def test_wrong_parts_are_named():
    own = named("normal")
    parts = MaskInParts(SHAPES, 3)
    parts.add({"a": own["a"]})
    for wrong in ({"a": own["a"]}, {"x": own["a"]}, {"d": own["e"]}):
        with pytest.raises(ValueError, match=f"scores has {next(iter(wrong))} of shape"):
            parts.add(wrong)
    with pytest.raises(ValueError, match="the scores of b are missing"):
        parts.mask()
    for k in (0, 10_000):
        with pytest.raises(ValueError, match=f"k is {k}"):
            MaskInParts(SHAPES, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_taken_and_put_back(dtype):
    tensor = torch.randn(4, 6, 5, 3).to(dtype).to(memory_format=torch.channels_last)
    tensor[0, 0, 0] = torch.tensor([-0.0, torch.nan, torch.inf], dtype=dtype)
    chosen = torch.rand(tensor.shape) < 0.3
    mask = pf.SaliencyMask.from_bool({"x": chosen})
    taken = take_entries(tensor, mask.tensor_words("x"), mask.count)
    assert same_bits(taken, tensor[chosen])
    target = torch.randn_like(tensor)
    expected = target.clone()
    expected[chosen] = taken
    put_entries(target, mask.tensor_words("x"), taken)
    assert same_bits(target, expected) and target.stride() == tensor.stride()
