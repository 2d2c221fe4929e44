"""The model card: what the hub reads of it, and whose it is."""

import json

import pytest

from pecker_fast.report import Run, write_run_report
from pecker_fast.report.card import is_ours, write_card
from tests.report.test_report import METRICS, make_run


@pytest.fixture
def folder(tmp_path):
    folder = make_run(tmp_path / "forgetful", fid=float("nan"), pretrained="hub:someone/digits")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_the_hub_reads_it(folder):
    from huggingface_hub import ModelCard

    path = write_card(Run.read(folder))
    assert path == folder / "README.md"
    card = ModelCard.load(path)
    data = card.data
    assert (data.license, data.library_name, data.base_model) == ("other", "diffusers", "someone/digits")
    assert "machine-unlearning" in data.tags and data.model_name == "forgetful"
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    # What is not finite is no result.
    assert values == {key: METRICS[key] for key in ("ua", "retain_accuracy", "frechet_distance", "diversity")}
    assert "forget class 0, 3" in card.text and "custom_pipeline=folder" in card.text and "![" not in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    # Labels that are drawn are of retained classes.
    assert "class_labels=[1, 2, 4]" in code


def test_a_network_of_this_machine_has_no_name_on_the_hub(folder):
    from huggingface_hub import ModelCard

    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "pretrained": "/home/me/net"}))
    data = ModelCard.load(write_card(Run.read(folder))).data
    assert data.base_model is None


def test_someones_own_card_stays(folder):
    path = folder / "README.md"
    path.write_text("mine")
    assert write_card(Run.read(folder)) is None and path.read_text() == "mine"
    path.unlink()
    write_run_report(folder)
    first = path.read_text()
    assert is_ours(path)
    # Not edited: written anew with what is known now.
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "ua": 12.5}))
    write_run_report(folder)
    assert "12.5 %" in path.read_text() and "12.5 %" not in first
    # The licence filled in: not lost again.
    edited = path.read_text().replace("license: other", "license: mit")
    path.write_text(edited)
    assert write_card(Run.read(folder)) is None and path.read_text() == edited
    path.write_bytes(b"\xff\xfe")
    assert not is_ours(path)


def test_no_pipeline_no_card(tmp_path):
    folder = make_run(tmp_path / "r")
    assert write_card(Run.read(folder)) is None and not (folder / "README.md").exists()
