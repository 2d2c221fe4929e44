"""SaliencyMask: indexing, set algebra, alignment, files."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pecker_fast as pf
from tests import oracle
from tests.inputs import random_masks, same_bits, scores

SHAPES = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "empty": (0, 2), "scale": (), "out": (17, 33)}


def random_mask(names: bool = True, density: float = 0.4) -> tuple[pf.SaliencyMask, dict[str, torch.Tensor]]:
    """A mask, and the bool tensors that it should hold."""
    flat = random_masks([math.prod(shape) for shape in SHAPES.values()], density)
    bools = {n: torch.from_numpy(b).view(s) for (n, s), b in zip(SHAPES.items(), flat, strict=True)}
    return pf.SaliencyMask.from_bool(bools if names else list(bools.values())), bools


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 7, bias=False))


def with_grads(module: nn.Module) -> nn.Module:
    for param in module.parameters():
        param.grad = torch.randn_like(param)
    return module


def test_indexing_and_counts():
    mask, bools = random_mask()
    total = sum(b.numel() for b in bools.values())
    count = sum(int(b.sum()) for b in bools.values())
    for i, (name, expected) in enumerate(bools.items()):
        assert mask[name].dtype == torch.bool and torch.equal(mask[name], expected)
        assert torch.equal(mask[i], expected) and torch.equal(mask[i - len(bools)], expected)
    assert (mask.count, mask.numel, len(mask)) == (count, total, len(bools))
    assert mask.density == count / total
    assert mask.tensor_counts() == [int(b.sum()) for b in bools.values()]
    assert mask.words.dtype == torch.int32
    assert (mask.words.numpy() == oracle.all_words([b.numpy() for b in bools.values()])).all()
    assert mask.threshold is None and mask.nan_count == 0


def test_indexing_errors():
    named, unnamed = random_mask()[0], random_mask(names=False)[0]
    with pytest.raises(KeyError, match="nothing"):
        named["nothing"]
    with pytest.raises(KeyError, match="no names"):
        unnamed["conv.weight"]
    with pytest.raises(IndexError, match="5 is out of range"):
        named[5]


def test_constructor_errors():
    words = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="words has shape"):
        pf.SaliencyMask(words, [(100,)])
    with pytest.raises(TypeError, match=r"words is torch.int64"):
        pf.SaliencyMask(words.long(), [(40,)])
    with pytest.raises(ValueError, match="names has 2"):
        pf.SaliencyMask(words, [(40,)], ["a", "b"])
    with pytest.raises(ValueError, match="unique"):
        pf.SaliencyMask(words, [(4,), (4,)], ["a", "a"])
    with pytest.raises(TypeError, match="expected bool"):
        pf.SaliencyMask.from_bool([torch.zeros(3)])


def test_set_algebra_and_iou():
    a, bools_a = random_mask()
    b, bools_b = random_mask()
    for name in bools_a:
        x, y = bools_a[name], bools_b[name]
        assert torch.equal((a & b)[name], x & y) and torch.equal((a | b)[name], x | y)
        assert torch.equal((a ^ b)[name], x ^ y) and torch.equal((~a)[name], ~x)
    # Bits past the end stay 0, or counts and files would be wrong.
    assert (~a).count == a.numel - a.count and (~~a).equal(a)
    assert ((~a).words.numpy() == oracle.all_words([~x.numpy() for x in bools_a.values()])).all()
    union = sum(int((bools_a[n] | bools_b[n]).sum()) for n in bools_a)
    both = sum(int((bools_a[n] & bools_b[n]).sum()) for n in bools_a)
    assert a.iou(b) == both / union and a.iou(a) == 1.0 and a.iou(~a) == 0.0
    nothing = a & ~a
    assert nothing.count == 0 and nothing.iou(nothing) == 1.0
    assert (a & b).threshold is None and (~a).threshold is None


def test_set_algebra_refuses_other_layouts():
    mask, bools = random_mask()
    other = pf.SaliencyMask.from_bool({"other": torch.zeros(3, dtype=torch.bool)})
    renamed = pf.SaliencyMask.from_bool({name + "x": b for name, b in bools.items()})
    for wrong in (other, renamed):
        with pytest.raises(ValueError, match="different"):
            mask & wrong
        with pytest.raises(ValueError, match="different"):
            mask.iou(wrong)
    with pytest.raises(TypeError, match="expected a SaliencyMask"):
        mask | 3


def test_summary_has_a_row_for_each_tensor():
    mask, bools = random_mask()
    text = mask.summary()
    lines = text.splitlines()
    for name, expected in bools.items():
        (row,) = [line for line in lines if line.split()[0] == name]
        assert str(int(expected.sum())) in row.split()
    assert "4x3x3x3" in text and str(mask.count) in text and f"{100 * mask.density:.2f}%" in lines[-1]
    selected = pf.saliency_mask({"a": torch.tensor([3.0, math.nan, 1.0])}, k=1)
    assert "threshold 3" in selected.summary() and "NaN entries 1" in selected.summary()


def test_apply_to_tensors_mappings_and_modules():
    mask, bools = random_mask()
    tensors = {name: scores("special", b.numel()).view(b.shape) for name, b in bools.items()}
    expected = {name: torch.where(bools[name], t, 0.0) for name, t in tensors.items()}
    as_list = [t.clone() for t in tensors.values()]
    part = {name: tensors[name].clone() for name in ("out", "conv.bias")}
    pf.SaliencyMask.from_bool(list(bools.values())).apply_(as_list)
    assert all(same_bits(a, e) for a, e in zip(as_list, expected.values(), strict=True))
    mask.apply_(part)
    assert all(same_bits(part[name], expected[name]) for name in part)

    net = with_grads(model())
    net[1].weight.grad = None
    made = pf.saliency_mask(net, density=0.3)
    grads = [net[0].weight.grad.clone(), net[0].bias.grad.clone()]
    made.apply_(net)
    assert net[1].weight.grad is None
    assert same_bits(net[0].weight.grad, torch.where(made["0.weight"], grads[0], 0.0))
    assert same_bits(net[0].bias.grad, torch.where(made["0.bias"], grads[1], 0.0))


def test_apply_to_tensors_in_other_memory_orders():
    shape = (2, 3, 4, 5)
    bools = torch.rand(shape) < 0.5
    mask = pf.SaliencyMask.from_bool([bools])
    values = torch.randn(shape)
    last = values.clone(memory_format=torch.channels_last)
    strided = torch.randn(2, 3, 4, 10)[..., ::2]
    for tensor in (last, values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), strided):
        expected = torch.where(bools, tensor, 0.0)
        stride = tensor.stride()
        mask.apply_([tensor])
        assert torch.equal(tensor, expected) and tensor.stride() == stride


def test_apply_errors_change_nothing():
    mask, bools = random_mask()
    tensors = {name: torch.randn(b.shape) for name, b in bools.items()}
    wrong_shape = {**tensors, "out": torch.randn(33, 17)}
    wrong_name = {**tensors, "unknown": torch.randn(3)}
    before = copy.deepcopy(tensors)
    for wrong in (wrong_shape, wrong_name, list(tensors.values())[:-1]):
        with pytest.raises(ValueError):
            mask.apply_(wrong)
    with pytest.raises(ValueError, match="made for another model"):
        mask.apply_(wrong_shape)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_alignment():
    net = with_grads(model())
    params, names = list(net.parameters()), [name for name, _ in net.named_parameters()]
    mask = pf.saliency_mask(net, density=0.5)
    # By identity, in any order and without names.
    assert mask.align(params[::-1]) == [2, 1, 0] and mask.align([params[1]]) == [1]
    # By name, with the prefixes of wrappers.
    others = [p.detach().clone() for p in params]
    assert mask.align(others[::-1], [f"module._orig_mod.{name}" for name in names[::-1]]) == [2, 1, 0]
    wrapped = pf.SaliencyMask(mask.words, mask.shapes, [f"_orig_mod.module.{name}" for name in names])
    assert wrapped.align(others, names) == [0, 1, 2]
    # By order if the mask has no names.
    assert pf.SaliencyMask(mask.words, mask.shapes).align(others, names) == [0, 1, 2]
    with pytest.raises(ValueError, match="mask has names, the parameters have none"):
        mask.align(others)
    with pytest.raises(ValueError, match=r"no tensor for parameter 2.weight"):
        mask.align(others, [*names[:-1], "2.weight"])
    with pytest.raises(ValueError, match="mask has 3 tensors without names, there are 2"):
        pf.SaliencyMask(mask.words, mask.shapes).align(others[:2])
    with pytest.raises(ValueError, match="shape"):
        mask.align([others[1], others[0], others[2]], names)


def test_bind_checks_shapes_and_holds_weakly():
    net = with_grads(model())
    mask = pf.saliency_mask(net, density=0.5)
    loaded = pf.SaliencyMask(mask.words, mask.shapes)
    with pytest.raises(ValueError, match="shapes"):
        loaded.bind(list(net.parameters())[::-1])
    loaded.bind(list(net.parameters()))
    assert loaded.align(list(net.parameters())[::-1]) == [2, 1, 0]
    del net
    assert all(ref() is None for ref in loaded._params)


@pytest.mark.parametrize("names", [True, False])
def test_save_and_load(names, tmp_path):
    values = {name: scores("special", math.prod(shape)).view(shape) for name, shape in SHAPES.items()}
    for scope in ("global", "tensor"):
        mask = pf.saliency_mask(values if names else list(values.values()), density=0.3, scope=scope)
        path = tmp_path / f"{scope}.safetensors"
        mask.save(path)
        loaded = pf.SaliencyMask.load(path)
        assert loaded.equal(mask) and loaded.names == mask.names and loaded.shapes == mask.shapes
        assert (loaded.threshold, loaded.nan_count, loaded.count) == (mask.threshold, mask.nan_count, mask.count)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global.safetensors", "tensor.safetensors"]
    with_algebra = mask & mask
    with_algebra.save(str(path))
    assert pf.SaliencyMask.load(str(path)).threshold is None


def test_file_identifies_itself(tmp_path):
    mask = pf.saliency_mask({"a": torch.randn(40), "b": torch.randn(3, 3)}, density=0.5)
    mask.save(tmp_path / "m.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["names"]) == ["a", "b"] and json.loads(metadata["shapes"]) == [[40], [3, 3]]
    assert float(metadata["density"]) == mask.density and json.loads(metadata["threshold"]) == mask.threshold
    assert metadata["format"] and metadata["version"]


def test_damaged_and_foreign_files(tmp_path):
    path, bad = tmp_path / "m.safetensors", tmp_path / "bad.safetensors"
    mask = pf.saliency_mask({"a": torch.randn(400)}, density=0.5)
    mask.save(path)
    payload = path.read_bytes()
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for length in (0, 4, 60, len(payload) - 1):
        bad.write_bytes(payload[:length])
        with pytest.raises(ValueError, match=r"bad.safetensors"):
            pf.SaliencyMask.load(bad)
    words = load_file(path)["words"]
    flipped = words.clone()
    flipped[0] ^= 1
    tail = torch.cat([words[:-1], words[-1:] | (1 << 20)])
    wrong = [
        ({"weight": torch.ones(3)}, {"format": "pt"}),
        ({"words": words}, None),
        ({"words": words}, {**metadata, "version": "99"}),
        ({"words": words[:-1].clone()}, metadata),
        ({"words": words.long()}, metadata),
        ({"words": flipped}, metadata),
        ({"words": tail}, metadata),
        ({"words": words}, {key: value for key, value in metadata.items() if key != "shapes"}),
        ({"words": words}, {**metadata, "shapes": "[[4000]]"}),
        ({"words": words}, {**metadata, "shapes": "not json"}),
        ({"words": words}, {**metadata, "names": '["a", "b"]'}),
        ({"other": words}, metadata),
    ]
    for i, (tensors, wrong_metadata) in enumerate(wrong):
        save_file(tensors, bad, metadata=wrong_metadata)
        with pytest.raises(ValueError, match=r"bad.safetensors"):
            pf.SaliencyMask.load(bad)
            pytest.fail(f"case {i} was loaded")
    with pytest.raises(FileNotFoundError):
        pf.SaliencyMask.load(tmp_path / "missing.safetensors")
    assert pf.SaliencyMask.load(path).equal(mask)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    old = pf.saliency_mask([torch.randn(40)], density=0.5)
    old.save(path)
    import os

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        pf.saliency_mask([torch.randn(40)], density=0.1).save(path)
    monkeypatch.undo()
    assert pf.SaliencyMask.load(path).equal(old) and len(list(tmp_path.iterdir())) == 1


def test_copies_and_pickles_align_by_name():
    net = with_grads(model())
    mask = pf.saliency_mask(net, density=0.5)
    named = list(net.named_parameters())
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other.equal(mask) and other.threshold == mask.threshold and other.names == mask.names
        assert other.align([p for _, p in named], [n for n, _ in named]) == [0, 1, 2]
        with pytest.raises(ValueError):
            other.align([p for _, p in named])
    assert mask.to("cpu") is mask


def test_from_bool_of_other_memory_orders():
    bools = (torch.rand(2, 3, 4, 4) < 0.5).to(memory_format=torch.channels_last)
    mask = pf.SaliencyMask.from_bool([bools, bools.permute(3, 2, 1, 0)])
    assert torch.equal(mask[0], bools) and torch.equal(mask[1], bools.permute(3, 2, 1, 0))
    assert (mask.words.numpy() == oracle.all_words([np.asarray(mask[i]) for i in (0, 1)])).all()


def test_files_whose_names_or_shapes_were_changed(tmp_path):
    path, bad = tmp_path / "m.safetensors", tmp_path / "bad.safetensors"
    mask = pf.saliency_mask({"a": torch.randn(8, 4), "b": torch.randn(8, 4)}, density=0.5)
    mask.save(path)
    words = load_file(path)["words"]
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for change in (
        {"shapes": "[[4, 8], [8, 4]]"},
        {"names": "null"},
        {"names": '["b", "a"]'},
        {"sha256": "0" * 64},
        {"threshold": "0.5"},
        {"nan_count": "7"},
        {"fields_sha256": "0" * 64},
        {"shb256": metadata["sha256"]},
    ):
        save_file({"words": words}, bad, metadata={**metadata, **change})
        with pytest.raises(ValueError, match=r"bad.safetensors is a damaged saliency mask"):
            pf.SaliencyMask.load(bad)
    # The same number of salient entries, but different ones.
    swapped = words.flip(0)
    if not torch.equal(swapped, words):
        save_file({"words": swapped}, bad, metadata=metadata)
        with pytest.raises(ValueError, match="damaged"):
            pf.SaliencyMask.load(bad)
    # Files of older versions have no hash of the fields, or none at all.
    for missing in ({"fields_sha256"}, {"sha256", "fields_sha256"}):
        old = {key: value for key, value in metadata.items() if key not in missing}
        save_file({"words": words}, bad, metadata=old)
        assert pf.SaliencyMask.load(bad).equal(mask) and pf.SaliencyMask.load(bad).names == mask.names


def test_a_folder_is_not_a_mask(tmp_path):
    with pytest.raises(ValueError, match=r"is not a saliency mask: it is a folder$"):
        pf.SaliencyMask.load(tmp_path)
