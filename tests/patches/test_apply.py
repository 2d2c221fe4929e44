"""Patches on weights in memory: networks, tied and strided tensors, several patches, wrong bases."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from pecker_fast.patches import Patch, switch_
from pecker_fast.patches import apply as apply_module
from tests.patches.states import copies, same, states


def changed(state, share=0.3):
    return {name: torch.where(torch.rand(value.shape) < share, value + 1, value) for name, value in state.items()}


def chain(length: int = 3):
    """Weights, each with some entries changed from the last, and the patches between them."""
    steps = [{"a": torch.randn(40), "b": torch.randn(6, 7)}]
    for _ in range(length):
        steps.append(changed(steps[-1]))
    return steps, [Patch.between(*pair) for pair in pairwise(steps)]


def test_network_in_memory():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    base = copies(network.state_dict())
    result = changed(base)
    result["1.num_batches_tracked"] = torch.tensor(7)
    parameters = list(network.parameters())
    patch = Patch.between(base, result)
    switch_(network.state_dict(), [patch])
    assert same(network.state_dict(), result) and network[1].num_batches_tracked == 7
    assert all(a is b and b.requires_grad for a, b in zip(network.parameters(), parameters, strict=True))
    switch_(network.state_dict(), [patch], revert=True)
    assert same(network.state_dict(), base)


def test_wrong_bases_are_refused_before_anything_changes():
    base, result = states()
    patch = Patch.between(base, result)
    for wrong, error in (
        ({**base, "same": base["same"] + 1}, "expected the base"),
        (result, "the result of this patch: it is already applied"),
        ({**base, "same": base["same"].half()}, "same has shape .40,. and torch.float16"),
        ({**base, "same": base["same"][:3]}, "same has shape .3,."),
        ({name: value for name, value in base.items() if name != "same"}, "has no same"),
        ({**base, "more": torch.zeros(3)}, "1 tensors that the patch does not name, such as more"),
        ({**base, "same": base["same"].to("meta")}, "same is offloaded"),
        ({**base, "same": base["same"].to(torch.complex64)}, "complex64"),
    ):
        before = {name: value if value.is_meta else value.clone() for name, value in wrong.items()}
        with pytest.raises(ValueError, match=error):
            switch_(wrong, [patch])
        assert all(value.is_meta or same({"x": value}, {"x": before[name]}) for name, value in wrong.items())
    weights = copies(base)
    with pytest.raises(ValueError, match="the base of this patch: it is already reverted"):
        switch_(weights, [patch], revert=True)
    weights["same"] += 1
    with pytest.raises(ValueError, match="revert those first, the last one first"):
        switch_(weights, [patch], revert=True)


def test_several_patches_one_after_the_other():
    steps, patches = chain()
    weights = copies(steps[0])
    switch_(weights, patches)
    assert same(weights, steps[3])
    switch_(weights, patches[:0:-1], revert=True)
    assert same(weights, steps[1])
    with pytest.raises(ValueError, match="patch 2 of 2 is for weights"):
        switch_(weights, [patches[1], patches[0]])
    assert same(weights, steps[1])
    switch_(weights, patches[1:])
    for wrong in (patches, patches[:2], [patches[0]]):
        with pytest.raises(ValueError, match="last one first"):
            switch_(weights, wrong, revert=True)
        assert same(weights, steps[3])
    weights = copies(steps[0])
    with pytest.raises(ValueError, match="wrong order, give them in the order in which they were made"):
        switch_(weights, patches[::-1])
    with pytest.raises(ValueError, match="different architectures or dtypes"):
        switch_(weights, [patches[0], Patch.between({"a": weights["a"]}, {"a": weights["a"]})])
    assert same(weights, steps[0])


def test_tied_tensors_change_once():
    base = {"a": torch.randn(5, 6)}
    result = changed(base)
    shared = base["a"].clone()
    # A patch of a file that has one of two tied names, and a patch of a file that has both.
    for names in (["a"], ["a", "b"]):
        patch = Patch.between({n: base["a"] for n in names}, {n: result["a"] for n in names})
        for state in ({"a": shared, "b": shared}, {"b": shared.view(5, 6), "a": shared}):
            switch_(state, [patch])
            assert same({"a": shared}, result)
            switch_(state, [patch], revert=True)
            assert same({"a": shared}, base)
    untied = Patch.between({"a": base["a"], "b": base["a"]}, {"a": result["a"], "b": base["a"]})
    with pytest.raises(ValueError, match="a and b share memory, but the patch changes them differently"):
        switch_({"a": shared, "b": shared}, [untied])
    assert same({"a": shared}, base)


def test_parts_of_one_storage():
    whole = torch.randn(30)
    state = {"a": whole[:10], "b": whole[10:].view(4, 5)}
    base, result = copies(state), changed(state)
    switch_(state, [Patch.between(base, result)])
    assert same(state, result)
    overlapping = {"a": whole[:10], "b": whole[9:29].view(4, 5)}
    patch = Patch.between(copies(overlapping), changed(overlapping))
    before = whole.clone()
    with pytest.raises(ValueError, match="a and b share memory, expected separate tensors"):
        switch_(overlapping, [patch])
    expanded = {"a": torch.zeros(1).expand(4)}
    with pytest.raises(ValueError, match="several entries in one place"):
        switch_(expanded, [Patch.between(expanded, {"a": torch.ones(4)})])
    assert torch.equal(whole, before)


def test_an_interrupted_change_is_undone(monkeypatch):
    steps, patches = chain(1)
    weights = copies(steps[0])
    whole, calls = apply_module.Switched.__getitem__, []

    def failing(self, name):
        # The check reads each name once.
        calls.append(name)
        if len(calls) == 4:
            raise MemoryError
        return whole(self, name)

    monkeypatch.setattr(apply_module.Switched, "__getitem__", failing)
    with pytest.raises(MemoryError):
        switch_(weights, patches)
    monkeypatch.undo()
    assert same(weights, steps[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    base, result = states()
    weights = {name: value.cuda() for name, value in base.items()}
    patch = Patch.between(base, result)
    switch_(weights, [patch])
    assert all(value.is_cuda for value in weights.values())
    assert same({name: value.cpu() for name, value in weights.items()}, result)
    switch_(weights, [patch], revert=True)
    assert same({name: value.cpu() for name, value in weights.items()}, base)
