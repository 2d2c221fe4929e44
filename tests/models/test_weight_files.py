"""Weights on disk: all variants and shards are found, and changed without touching anything else in the files."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from pecker_fast import files as files_module
from pecker_fast.files import PENDING, finish_pending, replace_together
from pecker_fast.models import find_weight_files, other_weights

WEIGHTS = "diffusion_pytorch_model"
STATE = {
    "a.weight": torch.randn(6, 5),
    "a.bias": torch.randn(3).bfloat16(),
    "b": torch.randn(4),
    "none": torch.zeros(0),
}


def write(folder, shards=1, variant="", state=STATE):
    """As diffusers saves it; the metadata must stay."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    stem = f"{WEIGHTS}.{variant}" if variant else WEIGHTS
    names = list(state)
    for i in range(shards):
        suffix = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        part = {name: state[name] for name in names[i::shards]}
        safetensors.torch.save_file(part, folder / f"{stem}{suffix}.safetensors", {"format": "pt", "note": "x"})
    return folder


def flip(name, bits):
    bits[0] ^= 1


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_changes_leave_the_rest_of_the_files(tmp_path, shards, variant):
    folder = write(tmp_path / "unet", shards, variant)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for place in (tmp_path, folder):
        (weight_files,) = find_weight_files(place)
        assert len(weight_files.files) == shards and weight_files.variant == variant and weight_files.folder == folder
        assert weight_files.weights.keys() == STATE.keys()
        assert all(torch.equal(weight_files.weights[name], value) for name, value in STATE.items())
    weight_files.change(["a.bias", "b", "none"], flip)
    (changed,) = find_weight_files(folder)
    for name, value in STATE.items():
        bits = changed.weights[name].reshape(-1).view({4: torch.int32, 2: torch.int16}[value.element_size()])
        expected = value.reshape(-1).view(bits.dtype).clone()
        if name in ("a.bias", "b"):
            expected[0] ^= 1
        assert torch.equal(bits, expected)
    with safetensors.safe_open(weight_files.files[0], "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}
    copied = tmp_path / "copied"
    copied.mkdir()
    changed.copy_changed(["a.bias", "b"], flip, copied)
    for file in weight_files.files:
        assert (copied / file.name).read_bytes() == before[file.name]
    changed.change(["a.bias", "b"], flip)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_single_file(tmp_path):
    write(tmp_path)
    path = (tmp_path / f"{WEIGHTS}.safetensors").rename(tmp_path / "model.safetensors")
    (weight_files,) = find_weight_files(path)
    weight_files.save_changed(["b"], flip, tmp_path / "other.safetensors")
    (other,) = find_weight_files(tmp_path / "other.safetensors")
    assert torch.equal(other.weights["a.weight"], STATE["a.weight"]) and not torch.equal(other.weights["b"], STATE["b"])
    with pytest.raises(ValueError, match=r"model is '.*config\.json', expected a safetensors file or a folder"):
        find_weight_files(tmp_path / "config.json")


def test_variants(tmp_path):
    write(tmp_path, state={"b": STATE["b"]})
    write(tmp_path, 2, "fp16", {"b": STATE["b"].half(), "c": STATE["b"].half()})
    # An older way to name shards of a variant.
    for i in (1, 2):
        safetensors.torch.save_file({f"x{i}": STATE["b"]}, tmp_path / f"{WEIGHTS}-0000{i}-of-00002.ema.safetensors")
    (tmp_path / f"{WEIGHTS}.bin").touch()
    variants = find_weight_files(tmp_path)
    assert [(files.variant, len(files.files)) for files in variants] == [("", 1), ("ema", 2), ("fp16", 2)]
    assert [files.variant for files in find_weight_files(tmp_path, "fp16")] == ["fp16"]
    assert [files.variant for files in find_weight_files(tmp_path, "")] == [""]
    assert len(list(other_weights(variants[0]))) == 5
    with pytest.raises(ValueError, match="no weights of the variant 'bf16'"):
        find_weight_files(tmp_path, "bf16")
    (tmp_path / f"{WEIGHTS}.fp16-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 2 files of weights"):
        find_weight_files(tmp_path)


def test_unreadable_sources(tmp_path):
    folder = write(tmp_path / "x", 2)
    safetensors.torch.save_file({"b": torch.zeros(1)}, folder / f"{WEIGHTS}-00001-of-00002.safetensors")
    safetensors.torch.save_file({"b": torch.zeros(1)}, folder / f"{WEIGHTS}-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="has b, which is in another of the files too"):
        find_weight_files(folder)[0].weights  # noqa: B018
    (folder / f"{WEIGHTS}-00002-of-00002.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"-00002-of-00002\.safetensors cannot be read"):
        find_weight_files(folder)[0].weights  # noqa: B018
    with pytest.raises(ValueError, match="there is no network"):
        find_weight_files(tmp_path / "nowhere")


@pytest.mark.parametrize("killed_at", ["first", "list", "replace"])
def test_all_files_are_replaced_or_none(tmp_path, monkeypatch, killed_at):
    """Killed at any point, simulated by an exception without clean-up."""
    names, old = ["a", "b", "c"], b"old"
    for name in names:
        (tmp_path / name).write_bytes(old)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    def new(name, path):
        if killed_at == "first" and name == "b":
            raise Killed
        path.write_bytes(b"new")

    if killed_at == "list":
        monkeypatch.setattr(files_module, "write_json", die)
    elif killed_at == "replace":
        replace, calls = files_module.os.replace, []

        def replace_twice(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise Killed
            replace(*arguments)

        monkeypatch.setattr(files_module.os, "replace", replace_twice)
    with pytest.raises(Killed):
        replace_together(tmp_path, names, new)
    monkeypatch.undo()
    content = [(tmp_path / name).read_bytes() for name in names]
    assert content == ([b"new", b"old", b"old"] if killed_at == "replace" else [old] * 3)
    finish_pending(tmp_path)
    expected = b"new" if killed_at == "replace" else old
    assert [(tmp_path / name).read_bytes() for name in names] == [expected] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_hostile_list_of_pending_files(tmp_path):
    for content in ('["../x"]', '"x"', "[1]", "{"):
        (tmp_path / PENDING).write_text(content)
        with pytest.raises(ValueError, match="is damaged"):
            finish_pending(tmp_path)
    (tmp_path / PENDING).write_text('["x"]')
    finish_pending(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unaligned_data(tmp_path):
    """The data of a file need not begin at a multiple of the entries' size."""
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
    )
    data = bytes([1, 2, 3]) + np.array([1.0, 2.0], "<f4").tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    (weight_files,) = find_weight_files(path)
    weight_files.change(["b"], flip)
    assert path.read_bytes()[:-8] == len(header).to_bytes(8, "little") + header.encode() + data[:3]
    assert np.frombuffer(path.read_bytes()[-8:], "<u4")[0] == np.array([1.0], "<f4").view("<u4")[0] ^ 1
