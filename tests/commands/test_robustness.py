"""robustness on the command line: on a one-step run, on a many-step network, and on wrong input."""

import json
import shutil

import pytest
from PIL import Image

from pecker_fast.cli import main
from pecker_fast.hashing import weights_hash
from pecker_fast.models import resolve, save_network
from pecker_fast.robustness import ATTACKS, EMBEDDING
from pecker_fast.runs.presets import class_preset
from tests.commands.case import fails
from tests.report.test_render import check_page

UNLEARN = ["--max_train_steps", "2", "--train_batch_size", "3", "--forget_batch_size", "2", "--samples_per_class", "3"]
SMALL = ["--relearn-images", "2", "--relearn-steps", "1", "2", "--latents", "1", "--search-steps", "2"]
SMALL += ["--forget-samples", "4", "--num-inference-steps", "2", "--inversion-starts", "2", "--no-progress-bar"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "run"
    main(["unlearn", "--method", "sfd", "--output_dir", str(folder), "--no-progress_bar", *UNLEARN])
    return folder


def read(folder) -> dict:
    return json.loads((folder / "robustness.json").read_text())


def test_a_one_step_run(run, capsys):
    before = json.loads((run / "metrics.json").read_text())
    # Any network of the architecture may be the control. Here it has the run's weights, hence the run's figures.
    arguments = ["robustness", str(run), *SMALL, "--control", str(run)]
    main(arguments)
    output = capsys.readouterr().out
    assert "UA after relearning, 2 steps" in output and str(run / "robustness.md") in output
    assert read(run)["protocol"]["control"] == run.name and str(run) not in (run / "robustness.json").read_text()
    result, metrics = read(run), json.loads((run / "metrics.json").read_text())
    assert {key: metrics[key] for key in before} == before
    assert {key: metrics[key] for key in result["summary"]} == result["summary"]
    assert all(0 <= v <= 100 for k, v in result["summary"].items() if not k.endswith("drop") and "frechet" not in k)
    assert "relabelling" in output or "relearn_steps_to_half" not in result["summary"]

    rows = result["relearn"]
    tried = {(row["network"], row["data"], row["attack"], row["sampler"]) for row in rows}
    one, many = "one step at 250", "DDIM, 2 steps"
    forgotten = {(attack, one) for attack in ATTACKS} | {("denoising", many)}
    retained = {pair for pair in forgotten if pair[0] not in EMBEDDING}
    expected = {("run", "retained", *pair) for pair in retained}
    expected |= {(name, "forgotten", *pair) for name in ("run", "relabel", "control") for pair in forgotten}
    expected |= {("scratch", "forgotten", *pair) for pair in retained}
    assert tried == expected and len(rows) == 3 * len(expected)
    of = {
        name: [{**r, "network": ""} for r in rows if (r["network"], r["data"]) == (name, "forgotten")]
        for name in ("run", "control", "scratch")
    }
    assert of["run"] == of["control"] and [r["loss"] for r in of["run"]] != [r["loss"] for r in of["scratch"]]
    # The attack that gets furthest gives the figure.
    last = [row["ua"] for row in rows if (row["network"], row["data"], row["step"]) == ("run", "forgotten", 2)]
    assert result["summary"]["relearn_forget_ua_2"] == min(last)

    assert [row["network"] for row in result["latent"]] == ["run"] * 4 + ["pretrained"] * 4 + ["control"] * 4
    assert result["latent"][:4] == [{**row, "network": "run"} for row in result["latent"][8:]]
    assert result["protocol"]["latent"]["nearest_image_accuracy"] > 95
    assert sorted(row["class"] for row in result["neighbours"]) == list(range(1, 10))
    assert result["guidance"] == []
    assert [row["network"] for row in result["paths"]] == ["run"] * 5 + ["pretrained"] * 5
    text = (run / "robustness.md").read_text()
    # It leads with what it costs to bring the class back, in words and by network.
    cost = result["cost"]
    assert list(cost["networks"]) == ["run", "relabel", "control", "scratch"] and set(cost["verdicts"]) == {
        "relabel",
        "control",
    }
    assert cost["networks"]["run"] == cost["networks"]["control"] and result["protocol"]["notes"] == []
    assert text.index("What it costs to bring the class back") < text.index("## Request")
    assert all(verdict["text"] in text for verdict in cost["verdicts"].values())
    assert "| relabelled: nothing is trained |" in text and "The control is missing" not in text
    for title in ("Relearning", "Latent search", "Neighbouring classes", "no label for", "Other samplers"):
        assert title in text
    page = check_page((run / "robustness.html").read_text())
    assert page.tags.count("figure") == 1 and page.tags.count("h2") == 8 and page.tags.count("table") == 7
    assert (
        "| class | distance | accuracy before (%) |" in text
        and f"| {one} |" in text
        and f"matching, {many}" not in text
    )
    assert "robustness.html" in check_page((run / "report.html").read_text()).references
    assert Image.open(run / "robustness.png").size[0] > 1000

    # A part of the tests again, with the same seed: the same figures.
    main(["robustness", str(run), *SMALL, "--tests", "relearn,paths", "--attacks", "matching"])
    again = read(run)
    assert "latent" not in again and again["paths"] == result["paths"]
    assert again["relearn"] == [r for r in rows if r["attack"] == "matching" and r["network"] != "control"]
    assert "The control is missing" in (run / "robustness.md").read_text()


@pytest.mark.slow
def test_several_runs_and_controls_made_on_request(run, tmp_path, capsys):
    """A report over the seeds; the control is made once, and nothing is attacked twice."""
    for seed in (0, 1):
        shutil.copytree(run, tmp_path / f"sfd-seed{seed}", ignore=shutil.ignore_patterns("robustness*", "checkpoints"))
        config = json.loads((tmp_path / f"sfd-seed{seed}" / "config.json").read_text())
        (tmp_path / f"sfd-seed{seed}" / "config.json").write_text(json.dumps({**config, "seed": seed}))
    (tmp_path / "compare.json").write_text("{}")
    short = {
        "retrain": {"max_train_steps": 3, "train_batch_size": 4},
        "sfd": {"max_train_steps": 2, "train_batch_size": 3, "forget_batch_size": 2},
    }
    values = class_preset("digits")
    with pytest.MonkeyPatch.context() as patch:
        for name, options in short.items():
            patch.setitem(values.methods, name, {**values.methods.get(name, {}), **options})
        arguments = [
            "robustness",
            str(tmp_path),
            *SMALL,
            "--tests",
            "relearn",
            "--attacks",
            "matching,inversion_random",
        ]
        main([*arguments, "--controls"])
        output = capsys.readouterr().out
        made = tmp_path / "never-saw-digits-0"
        assert output.count("control:") == 2 and (made / "retrain" / "unet").is_dir()
        control = json.loads((made / "one-step-2" / "config.json").read_text())
        assert control["options"]["generator_forget_weight"] == control["options"]["score_forget_weight"] == 0
        assert control["pretrained_model_name_or_path"] == str(made / "retrain")
        assert control["options"]["t_init"] == 250
        written = [(tmp_path / f"sfd-seed{seed}" / "robustness.json").stat().st_mtime_ns for seed in (0, 1)]
        main([*arguments, "--controls"])
        assert "control:" not in capsys.readouterr().out
    assert written == [(tmp_path / f"sfd-seed{seed}" / "robustness.json").stat().st_mtime_ns for seed in (0, 1)]
    result = read(tmp_path)
    group = result["groups"]["sfd"]
    assert group["seeds"] == [0, 1] and group["runs"] == ["sfd-seed0", "sfd-seed1"]
    assert list(group["costs"]) == ["run", "relabel", "control", "scratch"] and result["notes"] == []
    for network, mean in group["costs"].items():
        each = [read(tmp_path / f"sfd-seed{s}")["cost"]["networks"][network]["steps"] for s in (0, 1)]
        assert mean["steps"]["mean"] == pytest.approx(sum(each) / 2) and mean["count"] == 2
    assert set(group["attacks"]) == {"matching, one step at 250", "inversion_random, one step at 250"}
    text = (tmp_path / "robustness.md").read_text()
    assert "mean and 95 % interval" in text and all(v["text"] in text for v in group["verdicts"].values())
    check_page((tmp_path / "robustness.html").read_text())
    assert Image.open(tmp_path / "robustness.png").size[0] > 300
    # With other options they are attacked again; a run of earlier code, without costs, is named.
    main([*arguments, "--forget-samples", "5"])
    assert (
        capsys.readouterr().out.count("robustness [") == 2
        and "The control is missing" in (tmp_path / "robustness.md").read_text()
    )
    record = read(tmp_path / "sfd-seed1")
    del record["cost"]
    (tmp_path / "sfd-seed1" / "robustness.json").write_text(json.dumps(record))
    main([*arguments, "--forget-samples", "5"])
    assert read(tmp_path)["without_costs"] == ["sfd-seed1"]
    folders = [str(tmp_path / "sfd-seed0"), str(run)]
    assert "several folders" in fails(capsys, "robustness", *folders, *SMALL)
    assert "there is one run" in fails(capsys, "robustness", folders[0], "--output-dir", str(tmp_path / "x"), *SMALL)
    assert "RUN is missing" in fails(capsys, "robustness", *SMALL)
    config = json.loads((tmp_path / "sfd-seed1" / "config.json").read_text())
    (tmp_path / "sfd-seed1" / "config.json").write_text(json.dumps({**config, "forget_classes": [3]}))
    error = fails(capsys, "robustness", folders[0], "--control", str(tmp_path / "sfd-seed1"), *SMALL)
    assert "which has forgotten the classes [3]; expected those of the run, [0]" in error


@pytest.mark.slow
def test_a_many_step_network(tmp_path):
    folder = tmp_path / "run"
    model = resolve(None, shipped="digits")
    network, schedule = model.network, model.schedule
    save_network(folder / "unet", network, schedule)
    config = {"method": "none", "preset": "digits", "seed": 0, "forget_classes": [0, 3], "cover_class": None}
    config |= {"options": {}, "pretrained_model_name_or_path": None, "pretrained_sha256": weights_hash(network)}
    (folder / "config.json").write_text(json.dumps(config))
    steps = ["--num-inference-steps", "10", "--tests", "relearn", "paths", "neighbours"]
    main(["robustness", str(folder), *SMALL, *steps])
    result = read(folder)
    assert result["protocol"]["sampler"] == "DDIM, 10 steps"
    assert {row["attack"] for row in result["relearn"]} == {"denoising", *EMBEDDING}
    # The pretrained network itself is relabelled, which forgets; the run has not.
    assert result["cost"]["networks"]["run"]["steps"] == 0 and not result["cost"]["networks"]["run"]["censored"]
    assert result["cost"]["networks"]["relabel"]["steps"] > 0
    # It has forgotten nothing, and the report says so.
    usual = result["paths"][0]
    assert usual["sampler"] == "DDIM, 10 steps" and usual["still"] > 80 and usual["retain_accuracy"] > 60
    assert next(row for row in result["relearn"] if row["network"] == "run")["ua"] == 100 - usual["still"]
    rows = result["neighbours"]
    assert all(row["accuracy"] == row["accuracy_before"] and "called_cover" not in row for row in rows)
    assert result["summary"]["neighbour_drop"] == 0


def test_wrong_input_writes_nothing(run, capsys, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    for name in ("robustness.json", "robustness.md", "robustness.html", "robustness.png"):
        (other / name).unlink(missing_ok=True)
    metrics = (other / "metrics.json").read_text()

    def refused(*arguments: str) -> str:
        error = fails(capsys, "robustness", *arguments, "--no-progress-bar")
        assert not (other / "robustness.json").exists() and (other / "metrics.json").read_text() == metrics
        return error

    folder = str(other)
    assert "expected the folder of a run" in refused(str(tmp_path))
    assert "relearn, latent, neighbours" in refused(folder, "--tests", "relern")
    assert "tests is empty" in refused(folder, "--tests", ",")
    assert "attacks is distillation" in refused(folder, "--attacks", "distillation")
    assert "relearn_images is 5000" in refused(folder, "--relearn-images", "5000")
    assert "ascending" in refused(folder, "--relearn-steps", "5", "5")
    assert "guidance_scales" in refused(folder, "--guidance-scales", "-1")
    assert "forget_samples" in refused(folder, "--forget-samples", "0")
    assert "latents" in refused(folder, "--latents", "0")
    assert "inversion_starts is 0" in refused(folder, "--inversion-starts", "0")
    assert "relabel is" in refused(folder, "--relabel", str(tmp_path))
    assert "control is" in refused(folder, "--control", str(tmp_path))
    assert "seed" in refused(folder, "--seed", "-1")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "pretrained_sha256": "0" * 64}))
    assert "has changed since the run started" in refused(folder)
    (other / "config.json").write_text(json.dumps({**config, "options": {}}))
    assert "'matching', which needs a one-step generator" in refused(folder, "--attacks", "matching")
    (other / "config.json").write_text(json.dumps({"method": "pretrain"}))
    assert "not that of a run of unlearning" in refused(folder)
    (other / "config.json").write_text(json.dumps(config))
    shutil.rmtree(other / "unet")
    assert "has not ended" in refused(folder)
