"""The model card: the fields that the hub reads, and when the card is refreshed."""

import json

import pytest

from pecker_fast.report import RunRecord, write_run_report
from pecker_fast.report.card import OLD_MARK, card_note, is_ours, write_card
from tests.report.test_report import METRICS, make_prompt_run, make_run


@pytest.fixture
def folder(tmp_path):
    folder = make_run(tmp_path / "forgetful", fid=float("nan"), pretrained="hub:someone/digits")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_hub_reads_the_card(folder):
    from huggingface_hub import ModelCard

    path = write_card(RunRecord.read(folder))
    assert path == folder / "README.md"
    card = ModelCard.load(path)
    data = card.data
    assert (data.license, data.library_name, data.base_model) == ("other", "diffusers", "someone/digits")
    assert "machine-unlearning" in data.tags and data.model_name == "forgetful"
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    # Figures that are not finite are left out.
    assert values == {key: METRICS[key] for key in ("ua", "retain_accuracy", "frechet_distance", "diversity")}
    assert "forget class 0, 3" in card.text and "custom_pipeline=folder" in card.text and "![" not in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    # The example draws retained classes.
    assert "class_labels=[1, 2, 4]" in code


def test_local_network_has_no_hub_name(folder):
    from huggingface_hub import ModelCard

    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "pretrained": "/home/me/net"}))
    data = ModelCard.load(write_card(RunRecord.read(folder))).data
    assert data.base_model is None


@pytest.mark.parametrize("prompts", [False, True])
def test_edited_card_is_preserved(folder, tmp_path, prompts):
    if prompts:
        folder = make_prompt_run(tmp_path / "prompts", fid=11.0)
        (folder / "model_index.json").write_text("{}")
    path, key, value = folder / "README.md", *(("fid", "12.50") if prompts else ("ua", "12.5 %"))
    path.write_text("mine")
    assert write_card(RunRecord.read(folder)) is None and path.read_text() == "mine"
    path.unlink()
    write_run_report(folder)
    first = path.read_text()
    assert is_ours(path)
    # Not edited: refreshed with the new figures.
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, key: 12.5}))
    write_run_report(folder)
    assert value in path.read_text() and value not in first and card_note(folder) is None
    # An edited card (with a licence, for instance) is preserved, and the report says so.
    edited = path.read_text().replace("license: other", "license: mit")
    path.write_text(edited)
    assert write_card(RunRecord.read(folder)) is None and path.read_text() == edited
    assert "it has been edited" in card_note(folder)
    assert "README.md is not refreshed: it has been edited" in write_run_report(folder).read_text()
    path.write_bytes(b"\xff\xfe")
    assert not is_ours(path)


def test_no_pipeline_no_card(tmp_path):
    folder = make_run(tmp_path / "r")
    assert card_note(folder) is None
    assert write_card(RunRecord.read(folder)) is None and not (folder / "README.md").exists()


def test_a_card_with_the_old_mark_may_have_been_edited(tmp_path):
    folder = make_prompt_run(tmp_path / "r")
    (folder / "model_index.json").write_text("{}")
    path = folder / "README.md"
    path.write_text(f"as an earlier version wrote it, or not\n{OLD_MARK}")
    assert write_card(RunRecord.read(folder)) is None and path.read_text().startswith("as an earlier")
    assert "an earlier version of pecker-fast wrote it" in card_note(folder)
    path.unlink()
    assert write_card(RunRecord.read(folder)) == path and is_ours(path) and card_note(folder) is None


@pytest.mark.parametrize("one_step", [True, False])
def test_the_card_of_a_text_to_image_model(tmp_path, one_step):
    from huggingface_hub import ModelCard

    folder = make_prompt_run(tmp_path / "forgetful", gcd_score=0.125, seconds=2.0, pretrained="hub:someone/sd")
    (folder / "model_index.json").write_text("{}")
    if not one_step:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "options": {}, "concept": None}))
    card = ModelCard.load(write_card(RunRecord.read(folder)))
    data = card.data
    assert (data.pipeline_tag, data.base_model, data.license) == ("text-to-image", "someone/sd", "other")
    assert ("one-step" in data.tags) == one_step and "class-conditional" not in data.tags
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"gcd_score": 0.125}
    assert "| GCD score | 0.125 |" in card.text and "U-Net of someone/sd after pecker" in card.text
    assert ("“brad pitt” (in its place: “a man”)" if one_step else "1 prompt, such as “brad pitt eats”") in card.text
    assert "/models" not in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert ("custom_pipeline=folder" in code) == one_step and """pipe("a 'dog'",""" in code
