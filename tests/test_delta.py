"""Sparse changes of weights as files."""

import random
import shutil

import pytest
import safetensors.torch
import torch

from pecker_fast.cli import main
from pecker_fast.delta import apply_delta, save_delta
from pecker_fast.hashing import state_hash
from pecker_fast.runs.delta import delta
from tests.inputs import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


def states(density: float = 0.1):
    """Weights of several dtypes and layouts, and the same with some entries changed."""
    base = {"conv.weight": torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last), "empty": torch.zeros(0, 3)}
    base |= {f"p{i}": torch.randn(random.randrange(1, 300)).mul(50).to(dtype) for i, dtype in enumerate(DTYPES)}
    base |= {"scalar": torch.randn(()), "strided": torch.randn(8, 9)[:, ::2], "same": torch.randn(40)}
    changed = {name: value.clone() for name, value in base.items()}
    for name, value in changed.items():
        if name != "same" and value.numel():
            where = torch.rand(value.shape) < density
            changed[name] = torch.where(where, value + 1, value)
    return base, changed


def test_round_trip_bit_for_bit(tmp_path):
    base, changed = states()
    # What compares equal without being the same, and what does not compare equal to itself.
    base["conv.weight"][0, 0, 0, :2] = torch.tensor([0.0, float("nan")])
    changed["conv.weight"] = changed["conv.weight"].clone()
    changed["conv.weight"][0, 0, 0, :2] = torch.tensor([-0.0, float("nan")])
    kept = {name: value.clone() for name, value in base.items()}
    said = save_delta(base, changed, tmp_path / "d.safetensors")
    made = apply_delta(base, tmp_path / "d.safetensors")
    assert made.keys() == changed.keys()
    for name, value in made.items():
        assert same_bits(value.contiguous(), changed[name].contiguous()), name
        assert same_bits(base[name].contiguous(), kept[name].contiguous()), name
    assert state_hash(made) == state_hash(changed) != state_hash(base)
    bits = lambda v: v.contiguous().reshape(-1).view(torch.uint8).view(v.numel(), v.element_size())  # noqa: E731
    pairs = [(bits(base[n]), bits(changed[n])) for n in base if base[n].numel()]
    assert said.changed == sum(int((a != b).any(1).sum()) for a, b in pairs)
    assert said.numel == sum(v.numel() for v in base.values())
    assert said.bytes == (tmp_path / "d.safetensors").stat().st_size


def test_size_is_that_of_the_changes(tmp_path):
    base = {"w": torch.randn(200_000)}
    changed = {"w": torch.where(torch.rand(200_000) < 0.05, base["w"] + 1, base["w"])}
    said = save_delta(base, changed, tmp_path / "d.safetensors")
    # A bit an entry, and four bytes a change.
    assert said.bytes == pytest.approx(200_000 / 8 + 4 * said.changed, abs=2000)
    assert said.density == pytest.approx(0.05, abs=0.01)


def test_other_bases_and_damaged_files_are_refused(tmp_path):
    base, changed = states()
    path = tmp_path / "d.safetensors"
    save_delta(base, changed, path)
    other = {**base, "same": base["same"] + 1}
    with pytest.raises(ValueError, match="other weights"):
        apply_delta(other, path)
    with safetensors.safe_open(path, "pt") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "conv.weight"
    values, mask = tensors[f"{name}.values"], tensors[f"{name}.mask"]
    for key, value, error in (
        (f"{name}.values", values + 1, "the result does not match"),
        (f"{name}.values", values[:-1], "do not fit"),
        (f"{name}.values", values.double(), "do not fit"),
        (f"{name}.mask", mask[:-1], "do not fit"),
        (f"{name}.mask", mask.long(), "do not fit"),
    ):
        safetensors.torch.save_file({**tensors, key: value}, path, said)
        with pytest.raises(ValueError, match=error):
            apply_delta(base, path)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="is not a delta file"):
        apply_delta(base, path)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a delta file"):
        apply_delta(base, path)


def test_weights_of_another_architecture(tmp_path):
    base, changed = states()
    for wrong, said in (
        ({**changed, "more": torch.zeros(1)}, "differ in 1 names, such as more"),
        ({**changed, "same": torch.zeros(3)}, "same has shape"),
        ({**changed, "same": changed["same"].half()}, "float16"),
    ):
        with pytest.raises(ValueError, match=said):
            save_delta(base, wrong, tmp_path / "d.safetensors")
    assert not list(tmp_path.iterdir())


def test_networks_on_the_command_line(tmp_path, capsys):
    from pecker_fast.models import shipped_network

    base = shipped_network("digits")
    run = shutil.copytree(base, tmp_path / "run" / "unet")
    file = run / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["conv_in.bias"] = weights["conv_in.bias"] + 1
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    small = tmp_path / "change.safetensors"
    main(["delta", "save", "--base", str(base), "--changed", str(tmp_path / "run"), "--output", str(small)])
    assert "24 of" in capsys.readouterr().out and small.stat().st_size < 2000
    main(["delta", "apply", "--base", str(base), "--delta", str(small), "--output", str(tmp_path / "again")])
    from pecker_fast.models import load_network

    again, _ = load_network(tmp_path / "again")
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    for given, said in (
        ({"action": "save"}, "changed is not given"),
        ({"action": "save", "changed": str(tmp_path), "output": "x"}, "ends with .safetensors"),
        ({"action": "save", "changed": str(tmp_path), "output": str(small)}, "there is no network"),
        ({"action": "apply"}, "delta is not given"),
        ({"action": "apply", "delta": str(small), "output": str(tmp_path)}, "exists already"),
    ):
        with pytest.raises(ValueError, match=said):
            delta(**{"base": str(base), "output": str(tmp_path / "new"), **given})
