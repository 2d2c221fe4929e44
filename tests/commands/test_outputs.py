"""Files that commands write: no file of another kind is lost, and what is wrong is said before anything is computed."""

import json

import pytest

from pecker_fast.cli import main
from pecker_fast.mask import SaliencyMask
from pecker_fast.metrics import load_judge
from pecker_fast.runs.arguments import check_output

from .case import fails

QUICK = ["bench", "saliency_mask", "--size", "tiny", "--threads", "1", "--repeats", "1", "--max_seconds", "0"]


def test_an_output_is_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert check_output("a.png", ".png") == check_output(check_output("a.png"))
    for output, message in (
        ("a.jpg", r"^output is 'a.jpg', expected a file that ends with .png$"),
        ("nowhere/a.png", r"^output is 'nowhere/a.png', but there is no folder 'nowhere'$"),
        ("folder.png", r"^output is 'folder.png', which is a folder: expected the name of a file$"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(output, ".png")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["mask", "--output"], "network.safetensors"),
        (["train-classifier", "--preset", "digits", "--output"], "network.safetensors"),
        (["evaluate", "--preset", "digits", "--output"], "config.json"),
        ([*QUICK, "--json"], "config.json"),
    ],
)
def test_files_of_other_kinds_are_not_replaced(tmp_path, capsys, words, name):
    path = tmp_path / name
    path.write_text('{"seed": 0}')
    line = fails(capsys, *words, str(path))
    option = words[-1].removeprefix("--")
    assert f"{option} is {str(path)!r}, which exists already and is not a" in line and "expected another name" in line
    assert path.read_text() == '{"seed": 0}'
    assert f"expected a file that ends with {path.suffix}" in fails(capsys, *words, str(tmp_path / "picture.png"))


def test_files_of_the_same_kind_are_replaced(tmp_path):
    path = tmp_path / "mask.safetensors"
    words = ["mask", "--saliency_batch_size", "2", "--output", str(path), "--density"]
    main([*words, "0.5"])
    first = SaliencyMask.load(path)
    main([*words, "0.25"])
    assert SaliencyMask.load(path).count < first.count
    times = tmp_path / "times.json"
    for _ in range(2):
        main([*QUICK, "--json", str(times)])
        assert json.loads(times.read_text())["rows"]
    judge = tmp_path / "judge.safetensors"
    load_judge().save(judge)
    assert check_output(judge, ".safetensors", "a judge", type(load_judge()).load) == judge


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample --seed 99999999999999999999", "seed is 99999999999999999999, expected at most 9223372036854775807"),
        ("mask --seed 99999999999999999999", "seed is 99999999999999999999, expected at most 9223372036854775807"),
        ("evaluate --preset digits --seed -1", "seed is -1, expected at least 0"),
        ("evaluate --preset digits --seed 99999999999999999999", "seed is 99999999999999999999, expected at most"),
        ("train-classifier --preset digits --epochs 0", "epochs is 0, expected at least 1"),
        ("train-classifier --preset images --learning_rate nan", "learning_rate is nan, expected a number above 0"),
        ("bench --max_seconds nan", "max_seconds is nan, expected a number at least 0"),
        ("bench --repeats 0", "repeats is 0, expected at least 1"),
        ("bench --device gpu", "device is 'gpu', expected one of cpu, cuda"),
        ("bench select", "operation is 'select', expected one of saliency_mask, "),
        ("unlearn --dataset_name folder: --dry_run", "dataset_name is 'folder:', expected one of digits, mnist, "),
        ("unlearn --dataset_name folder:x --dry_run", "dataset_name is 'folder:x', but x is not a folder: expected a"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert message in fails(capsys, *words.split())
    assert list(tmp_path.iterdir()) == []
