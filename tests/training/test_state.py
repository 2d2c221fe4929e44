"""States and checkpoints: exact, verified, and complete after any failure."""

import json
import math
import os
import random
import shutil

import pytest
import torch

import pecker_fast as pf
from pecker_fast.training import checkpoints as module
from pecker_fast.training.checkpoints import CheckpointError, Checkpoints
from pecker_fast.training.state import load_state, save_state
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits


def random_tree(depth: int):
    kind = random.randrange(9 if depth else 7)
    if kind == 0:
        shape = [random.randrange(4) for _ in range(random.randrange(4))]
        dtype = random.choice([torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int64, torch.bool])
        return (torch.randn(shape) * 3).to(dtype)
    if kind == 1:
        return torch.randn(4, 3, 2).transpose(0, 2)
    if kind < 7:
        return random.choice([None, True, False, -3, 2**60, 0.1, math.inf, -0.0, "ü\n", "", [], {}, ()])
    if kind == 7:
        return {random.choice([i, str(i)]): random_tree(depth - 1) for i in range(3)}
    return random.choice([list, tuple])(random_tree(depth - 1) for _ in range(3))


def assert_equal_trees(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    else:
        assert a == b and str(a) == str(b)


def test_trees_round_trip(tmp_path):
    for _ in range(60):
        tree = {"tree": random_tree(4)}
        save_state(tmp_path / "a", tree)
        save_state(tmp_path / "b", tree)
        assert_equal_trees(load_state(tmp_path / "a"), tree)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_optimizer_and_network_states(tmp_path):
    unet = tiny_unet()
    optimizer = pf.MaskedAdam(unet.named_parameters(), ema_decay=0.9)
    for param in unet.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step(mask=pf.saliency_mask(unet, density=0.3))
    tree = {"network": unet.state_dict(), "optimizer": optimizer.state_dict()}
    save_state(tmp_path / "s", tree)
    back = load_state(tmp_path / "s")
    assert all(same_bits(value, back["network"][name]) for name, value in unet.state_dict().items())
    assert_equal_trees(back["optimizer"], tree["optimizer"])


def test_nan_payloads_survive(tmp_path):
    odd = torch.tensor([0x7FC00003, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    save_state(tmp_path / "s", [odd])
    assert same_bits(load_state(tmp_path / "s")[0], odd)


def test_invalid_states(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is set"):
        save_state(tmp_path / "s", {"a": [1, {2}]})
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a state"):
        load_state(tmp_path / "s")


PRINT = {"method": "pecker", "options": {"density": 0.5, "betas": (0.0, 0.9)}}


def make(folder, limit=None, fingerprint=PRINT) -> Checkpoints:
    return Checkpoints(folder, limit, fingerprint)


def export(folder):
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")


def test_save_and_load(tmp_path):
    checkpoints = make(tmp_path / "c")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.load("latest")
    for step in (2, 10, 9):
        checkpoints.stage(step, export)
        checkpoints.save(step, {"step": step})
    assert checkpoints.steps() == [2, 9, 10]
    path = tmp_path / "c" / "checkpoint-9"
    assert (path / "unet" / "config.json").read_text() == "{}"
    for which, step in (("latest", 10), (2, 2), ("checkpoint-9", 9), (path, 9), (str(path), 9)):
        assert make(tmp_path / "c").load(which) == (step, {"step": step})
    with pytest.raises(CheckpointError, match="checkpoint-2, checkpoint-9, checkpoint-10"):
        checkpoints.load("checkpoint-3")
    assert sorted(os.listdir(tmp_path / "c")) == ["checkpoint-10", "checkpoint-2", "checkpoint-9"]


def test_limit_and_leftovers(tmp_path):
    (tmp_path / ".checkpoint-7.tmp").mkdir()
    (tmp_path / ".mine").mkdir()
    checkpoints = make(tmp_path, limit=2)
    for step in range(1, 6):
        checkpoints.save(step, {"step": step})
    assert checkpoints.steps() == [4, 5]
    assert sorted(os.listdir(tmp_path)) == [".mine", "checkpoint-4", "checkpoint-5"]
    with pytest.raises(ValueError, match="checkpoints_total_limit is 0"):
        make(tmp_path, limit=0)


def test_flipped_bytes_are_detected_and_the_previous_checkpoint_offered(tmp_path):
    checkpoints = make(tmp_path)
    checkpoints.stage(1, export)
    checkpoints.save(1, {"a": torch.randn(5)})
    checkpoints.stage(2, export)
    checkpoints.save(2, {"a": torch.randn(5)})
    path = checkpoints.path(2)
    for file in [f for f in path.rglob("*") if f.is_file()]:
        original = file.read_bytes()
        for place in sorted(random.sample(range(len(original)), min(12, len(original)))):
            damaged = bytearray(original)
            damaged[place] ^= 1 << random.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError) as error:
                checkpoints.load("latest")
            assert "--resume_from_checkpoint checkpoint-1" in str(error.value), (file, place)
        file.write_bytes(original[:-1])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.load("latest")
        file.unlink()
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.load(2)
        file.write_bytes(original)
    assert checkpoints.load("latest")[0] == 2
    (path / "state.safetensors").unlink()
    checkpoints.save(2, {"a": 1})
    assert checkpoints.load(2) == (2, {"a": 1})


def test_a_manifest_guards_itself(tmp_path):
    """Another step would end the resumed run early, silently."""
    checkpoints = make(tmp_path)
    checkpoints.save(25, {"a": 1})
    path = checkpoints.path(25) / "checkpoint.json"
    original = path.read_bytes()
    for damaged in (
        original.replace(b'"step": 25', b'"step": 24'),
        original.replace(b'"density": 0.5', b'"density": 0.4'),
        original.replace(b'"density": 0.5', b'"density": 0.50'),
        original.replace(b'"sha256": "', b'"sha257": "'),
        original.replace(b'"version"', b'"versiom"'),
        original + b" ",
    ):
        assert damaged != original
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.load("latest")
        assert len(damaged) >= len(original)
    # Every bit.
    for place in range(len(original)):
        path.write_bytes(original[:place] + bytes([original[place] ^ 1 << place % 8]) + original[place + 1 :])
        with pytest.raises(CheckpointError):
            checkpoints.load(25)
    path.write_bytes(original)
    assert checkpoints.load("latest") == (25, {"a": 1})


def test_manifests_of_earlier_versions_are_compared_with_the_name_of_the_folder(tmp_path):
    checkpoints = make(tmp_path)
    checkpoints.save(25, {"a": 1})
    path = checkpoints.path(25) / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert checkpoints.load("latest") == (25, {"a": 1})
    path.write_text(json.dumps({**manifest, "step": 24}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is of step 24"):
        checkpoints.load("latest")
    # A copy under a name of the user's own.
    path.write_text(json.dumps(manifest))
    shutil.copytree(checkpoints.path(25), tmp_path / "copy")
    assert checkpoints.load(tmp_path / "copy") == (25, {"a": 1})
    for change in (
        {
            "files": {
                "../outside": {"bytes": 1, "sha256": "0" * 64},
                "state.safetensors": manifest["files"]["state.safetensors"],
            }
        },
        {"files": {}},
        {"files": {"state.safetensors": {"bytes": 1}}},
        {"files": {"state.safetensors": {"bytes": 1, "sha256": 5}}},
        {"step": "25"},
        {"step": -25},
        {"fingerprint": []},
    ):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(CheckpointError, match="damaged") as error:
            checkpoints.load(25)
        assert len(str(error.value).splitlines()) == 1


def test_foreign_checkpoints_are_refused(tmp_path):
    make(tmp_path).save(3, {})
    other = {"method": "pecker", "options": {"density": 0.1, "betas": [0.0, 0.9]}}
    with pytest.raises(CheckpointError, match=r"options\.density is 0\.5 there and 0\.1 here") as error:
        make(tmp_path, fingerprint=other).load("latest")
    assert "betas" not in str(error.value) and "no earlier one" in str(error.value)
    # It has the name of this run's checkpoint, so it is replaced.
    make(tmp_path, fingerprint=other).save(3, {"b": 1})
    assert make(tmp_path, fingerprint=other).load(3) == (3, {"b": 1})
    manifest = tmp_path / "checkpoint-3" / "checkpoint.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        make(tmp_path, fingerprint=other).load(3)


def test_retired_options_do_not_make_a_checkpoint_foreign(tmp_path):
    """Fingerprints from when methods had the option ``granularity``."""

    def before(value: str) -> dict:
        return {**PRINT, "options": {**PRINT["options"], "granularity": value}}

    make(tmp_path, fingerprint=before("entry")).save(3, {"a": 1})
    current = make(tmp_path)
    assert current.load("latest") == (3, {"a": 1})
    # It belongs to the run, so it is kept.
    current.save(3, {"b": 2})
    assert current.load(3) == (3, {"a": 1})
    make(tmp_path, fingerprint=before("row")).save(4, {})
    with pytest.raises(CheckpointError, match=r"options\.granularity is 'row' there and None here"):
        current.load(4)


def test_full_disk_keeps_the_old_files(tmp_path, monkeypatch):
    checkpoints = make(tmp_path, limit=1)
    checkpoints.save(1, {"a": 1})
    for failing in ("save_state", "_sync_folder"):
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(module, failing, full)
            with pytest.raises(OSError, match="No space"):
                checkpoints.save(2, {"a": 2})
        if failing == "save_state":
            assert os.listdir(tmp_path) == ["checkpoint-1"]
        assert checkpoints.load(1) == (1, {"a": 1})


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(OSError, match="c"):
        make(tmp_path / "c").save(1, {})
    shutil.rmtree(tmp_path)
