"""Patches between state dicts and as files: exact, small, and refused if damaged."""

import hashlib
import json
import math
import zlib

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from pecker_fast.hashing import state_hash
from pecker_fast.patches import Patch, apply_delta, check_patches, file_kind, patch_mask, switch_
from pecker_fast.patches import patch as patch_module
from tests.inputs import bits
from tests.patches.states import copies, same, states, write_delta


def saved(tmp_path, base, result, **metadata):
    path = tmp_path / "p.safetensors"
    Patch.between(base, result, metadata).save(path)
    return path


def test_round_trip_bit_for_bit(tmp_path):
    base, result = states()
    # Values that are equal with other bits, values not equal to themselves, and payloads of NaN.
    base["conv.weight"][0, 0, 0, :3] = torch.tensor([0.0, math.nan, 1.0])
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    result["conv.weight"] = result["conv.weight"].clone()
    result["conv.weight"][0, 0, 0, :3] = torch.cat([torch.tensor([-0.0, math.nan]), payload])
    before = copies(base), copies(result)
    path = saved(tmp_path, base, result, license="CC0", request={"forget_classes": [0]})
    assert same(base, before[0]) and same(result, before[1])
    patch = Patch.load(path)
    assert (patch.base, patch.result) == (state_hash(base), state_hash(result))
    assert patch.metadata == {"license": "CC0", "request": {"forget_classes": [0]}}
    assert patch.numel == sum(value.numel() for value in base.values())
    for name, value in base.items():
        differs = bits(value) != bits(result[name])
        assert patch.positions(name).tolist() == differs.nonzero().view(-1).tolist(), name
        assert patch[name].count == int(differs.sum())
    assert patch.count == sum(tensor.count for tensor in patch.changed) and patch["same"].count == 0
    weights = copies(base)
    switch_(weights, [patch])
    assert same(weights, result)
    assert all(weights[name].stride() == base[name].stride() for name in base)
    switch_(weights, [patch], revert=True)
    assert same(weights, base)


def test_no_change_and_no_tensors(tmp_path):
    base, _ = states()
    for state in (base, {}, {"empty": torch.zeros(0)}):
        patch = Patch.load(saved(tmp_path, state, state))
        assert patch.count == 0 and patch.density == 0.0 and patch.base == patch.result and not patch.changed
        weights = copies(state)
        switch_(weights, [patch])
        switch_(weights, [patch], revert=True)
        assert same(weights, state) and patch.mask().count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", [0.2, 0.1, 0.05, 0.02, 0.01])
def test_size(tmp_path, dtype, density):
    """At most 1.05 times the bytes of the changed entries plus the entropy of their positions."""
    base = {f"layers.{i}.weight": torch.randn(300, 700).to(dtype) for i in range(3)}
    base |= {f"layers.{i}.bias": torch.randn(700).to(dtype) for i in range(3)}
    result = {name: torch.where(torch.rand(v.shape) < density, v + 1, v) for name, v in base.items()}
    path = saved(tmp_path, base, result)
    patch = Patch.load(path)
    d, n, b = patch.density, patch.numel, base["layers.0.weight"].element_size()
    entropy = -(d * math.log2(d) + (1 - d) * math.log2(1 - d)) * n / 8
    # Less than 900 bytes are the same at any size: names, shapes, hashes.
    assert path.stat().st_size <= 1.05 * d * n * b + entropy + (900 if d < 0.05 else 0)


def test_mask(tmp_path):
    base, result = states()
    mask = patch_mask(saved(tmp_path, base, result))
    assert set(mask.names) == base.keys()
    for name, value in base.items():
        assert mask[name].shape == value.shape
        assert torch.equal(mask[name].reshape(-1), bits(value) != bits(result[name])), name
    with pytest.raises(ValueError, match="no such file"):
        patch_mask(tmp_path / "nowhere.safetensors")


def test_other_architectures_and_dtypes():
    base, result = states()
    for wrong, error in (
        ({**result, "more": torch.zeros(1)}, "differ in 1 names of tensors, such as more"),
        ({**result, "same": torch.zeros(3)}, "same has shape"),
        ({**result, "same": result["same"].half()}, r"same is float16, in the base float32.*dtype"),
        ({**result, "same": result["same"].to(torch.complex64)}, "same is torch.complex64, expected one of"),
        ({**result, "same": result["same"].to("meta")}, "same is offloaded"),
    ):
        with pytest.raises(ValueError, match=error):
            Patch.between(base, wrong)


def rewritten(path, target, part=None, header=None, sign=True):
    """A patch file with another part or header, with the sha256 that belongs to it."""
    with safetensors.safe_open(path, "np") as file:
        old, parts = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parts |= part or {}
    old |= header or {}
    if sign:
        digest = hashlib.sha256(old["patch"].encode())
        for name in ("table", "positions", "values"):
            digest.update(parts[name].tobytes())
        old["sha256"] = digest.hexdigest()
    safetensors.numpy.save_file(parts, target, old)
    return target


def row(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def table(rows) -> dict[str, np.ndarray]:
    return {"table": row(zlib.compress(json.dumps(rows).encode()))}


GOOD = ["w", "float32", [8], 2, 1, 1]
TABLES = [
    ([[*GOOD[:3], 2, 1]], "3 or 6 items"),
    ([GOOD, GOOD], "in the table twice"),
    ({"w": GOOD}, "not a list"),
    ([[1, *GOOD[1:]]], "does not begin with a name"),
    ([["w", "Tensor", *GOOD[2:]]], "does not begin with a name"),
    ([["w", "float32", 8, *GOOD[3:]]], "does not begin with a name"),
    ([["w", "float32", [-8], *GOOD[3:]]], "out of range"),
    ([["w", "float32", [True], *GOOD[3:]]], "out of range"),
    ([["w", "float32", [8.0], *GOOD[3:]]], "out of range"),
    ([["w", "float32", [2] * 65, *GOOD[3:]]], "out of range"),
    ([["w", "float32", [2**36, 2**36], *GOOD[3:]]], "at most"),
    ([["w", "float32", [8], 9, 1, 1]], "the row of w is wrong"),
    ([["w", "float32", [8], 2, 99, 1]], "the row of w is wrong"),
    ([["w", "float32", [8], 3, 1, 1]], "bytes of values"),
    ([["w", "float32", [800], 2, 0, 7]], "bytes of positions"),
    ([["w", "float64", [8], 2, 1, 1]], "bytes of values"),
    ([["w", "float32", [8], 1, 0, 1], ["v", "float32", [8], 1, 0, 0]], "the row of v"),
]


@pytest.fixture
def small(tmp_path):
    base = {"w": torch.zeros(8)}
    result = {"w": torch.tensor([0.0, 0, 1, 0, 0, 0, 2, 0])}
    return saved(tmp_path, base, result)


def test_the_format(small):
    """Every byte of a small file, as docs/patch_files.md describes it."""
    with safetensors.safe_open(small, "np") as file:
        header, parts = file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    # Gaps 2 and 3: with k = 1 their low bits 0, 1 are in a plane; the rest, 1 and 1, is unary: 01 01.
    assert json.loads(zlib.decompress(parts["table"])) == [["w", "float32", [8], 2, 1, 1]]
    assert parts["positions"] == bytes([0b10, 0b1010])
    assert parts["values"] == torch.tensor([1.0, 2.0]).numpy().tobytes()
    assert header["format"] == "pecker_fast.patch" and header["version"] == "1"
    assert json.loads(header["patch"]) == {
        "base": state_hash({"w": torch.zeros(8)}),
        "result": state_hash({"w": torch.tensor([0.0, 0, 1, 0, 0, 0, 2, 0])}),
    }
    digest = hashlib.sha256(header["patch"].encode() + parts["table"] + parts["positions"] + parts["values"])
    assert header["sha256"] == digest.hexdigest()


@pytest.mark.parametrize(("rows", "error"), TABLES)
def test_wrong_tables(small, tmp_path, rows, error):
    with pytest.raises(ValueError, match=f"is not a patch file, or is damaged: .*{error}"):
        Patch.load(rewritten(small, tmp_path / "x.safetensors", table(rows)))


def test_wrong_parts(small, tmp_path, monkeypatch):
    target = tmp_path / "x.safetensors"
    described = json.loads(safetensors.safe_open(small, "np").metadata()["patch"])
    for part, header, error in (
        ({"values": row(bytes(4))}, {}, "4 bytes of values"),
        ({"values": row(bytes(8)).astype(np.int8)}, {}, "not rows of bytes"),
        ({"more": row(b"x")}, {}, "other tensors than"),
        ({"table": row(b"no zlib")}, {}, "incorrect header check|invalid|error"),
        ({"table": row(zlib.compress(b"[]")[:-3])}, {}, "does not end"),
        ({"table": row(zlib.compress(b"[]") + b"more")}, {}, "does not end"),
        ({"table": row(zlib.compress(b"[" * 100_000))}, {}, "recursion|Expecting value|nested"),
        ({"table": row(zlib.compress(b"\xff\xfe"))}, {}, "codec|utf|Expecting"),
        ({"positions": row(bytes([0b10, 0]))}, {}, "positions of w are damaged: .* has 0 ones"),
        ({"positions": row(bytes([0b111, 0b1010]))}, {}, "positions of w are damaged: .*after the last"),
        ({}, {"format": "x"}, "format is 'x'"),
        ({}, {"version": "2"}, "'2', expected"),
        ({}, {"delta": "{}", "format": ""}, "make a patch of it: pecker-fast patch make BASE DELTA"),
        ({}, {"patch": "[]"}, "expected an object"),
        ({}, {"patch": "{"}, "Expecting property name"),
        ({}, {"patch": json.dumps({**described, "base": "0"})}, 'base is "0", expected a sha256'),
        ({}, {"patch": json.dumps({**described, "result": None})}, "result is null, expected a sha256"),
    ):
        with pytest.raises(ValueError, match=f"is not a patch file, or is damaged: .*({error})"):
            Patch.load(rewritten(small, target, part, header))
    with pytest.raises(ValueError, match="does not match its sha256"):
        Patch.load(rewritten(small, target, {"values": row(bytes(8))}, sign=False))
    # A table that inflates without end is not read to the end.
    monkeypatch.setattr(patch_module, "MAX_TABLE", 1000)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        Patch.load(rewritten(small, target, {"table": row(zlib.compress(bytes(10_000_000)))}))


def test_flags_stay_flags(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(8).bool()}, {"w": torch.ones(8).bool()})
    with pytest.raises(ValueError, match="not those of bool"):
        Patch.load(rewritten(path, tmp_path / "x.safetensors", {"values": row(bytes([1] * 7 + [2]))}))


def test_half_written_files(small, tmp_path):
    content = small.read_bytes()
    for size in (0, 4, 8, 40, len(content) // 2, len(content) - 1):
        (tmp_path / "x.safetensors").write_bytes(content[:size])
        with pytest.raises(ValueError, match="is not a patch file, or is damaged"):
            Patch.load(tmp_path / "x.safetensors")


def test_hostile_files_change_nothing(tmp_path):
    """Files with any bytes changed are refused with a message and the weights do not change, even if the sha256 matches
    the changed bytes, unless the change has no effect."""
    base, result = states()
    path = saved(tmp_path, base, result)
    content, target = path.read_bytes(), tmp_path / "x.safetensors"
    weights, refused = copies(base), 0
    parts = {name: safetensors.safe_open(path, "np").get_tensor(name) for name in ("table", "positions", "values")}
    for i in range(150):
        if i % 3 == 0:
            damaged = bytearray(content)
            for _ in range(np.random.randint(1, 4)):
                damaged[np.random.randint(len(damaged))] = np.random.randint(256)
            target.write_bytes(damaged)
        else:
            name = np.random.choice(["positions", "values"])
            part = parts[name].copy()
            part[np.random.randint(len(part))] ^= np.random.randint(1, 256)
            rewritten(path, target, {name: part})
        try:
            switch_(weights, [Patch.load(target)])
        except ValueError:
            refused += 1
            assert same(weights, base)
            continue
        # The change had no effect.
        assert same(weights, result)
        weights = copies(base)
    assert refused >= 145


def test_wrong_result_hash_is_refused(tmp_path):
    base, result = states()
    path = saved(tmp_path, base, result)
    other = json.loads(safetensors.safe_open(path, "np").metadata()["patch"]) | {"result": "0" * 64}
    liar = Patch.load(rewritten(path, tmp_path / "x.safetensors", header={"patch": json.dumps(other)}))
    weights = copies(base)
    with pytest.raises(ValueError, match="the patch is damaged: it gives weights of sha256"):
        switch_(weights, [liar])
    assert same(weights, base)


def test_delta_files_of_earlier_versions(tmp_path):
    base, result = states()
    # Earlier versions could not pack all of these dtypes.
    names = [name for name in base if name not in ("flags", "float8", "p9")]
    base, result = ({name: state[name] for name in names} for state in (base, result))
    path = tmp_path / "d.safetensors"
    tensors = write_delta(path, base, result)
    assert file_kind(path) == "delta" and file_kind(saved(tmp_path, base, result)) == "patch"
    assert same(apply_delta(base, path), result)
    with pytest.raises(ValueError, match="other weights"):
        apply_delta({**base, "same": base["same"] + 1}, path)
    with pytest.raises(ValueError, match="delta file of an earlier version"):
        Patch.load(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    values, mask = tensors["conv.weight.values"], tensors["conv.weight.mask"]
    for key, value, error in (
        ("values", values + 1, "the result does not match"),
        ("values", values[:-1], "do not fit"),
        ("values", values.double(), "do not fit"),
        ("mask", mask[:-1], "do not fit"),
        ("mask", mask.long(), "do not fit"),
    ):
        safetensors.torch.save_file({**tensors, f"conv.weight.{key}": value.contiguous()}, path, metadata)
        with pytest.raises(ValueError, match=error):
            apply_delta(base, path)
    write_delta(path, base, result, version=2)
    with pytest.raises(ValueError, match="version 2"):
        apply_delta(base, path)
    for content in (b"x", safetensors.torch.save(tensors)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a delta file"):
            apply_delta(base, path)
        assert file_kind(path) is None


def test_check_needs_a_patch():
    with pytest.raises(ValueError, match="no patch is given"):
        check_patches({}, [])
