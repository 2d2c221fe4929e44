"""sequence: start of each request, interruption, resumption, extension, and wrong input."""

import json
import sys
from pathlib import Path

import pytest
import torch

import pecker_fast as pf
from pecker_fast.cli import main
from pecker_fast.models import load_network
from pecker_fast.runs import sequence as command
from pecker_fast.runs import unlearn as running
from pecker_fast.runs.arguments import with_options
from pecker_fast.runs.audit import changed_files
from tests.commands.case import fails
from tests.report.test_render import check_page

SMALL = ["--max-train-steps", "2", "--samples-per-class", "2", "--no-progress-bar", "--cover-class", "1"]
SETS = ["--set", "train_batch_size=3", "forget_batch_size=2"]


def weights(folder) -> dict:
    return load_network(folder)[0].state_dict()


def test_each_request_starts_from_the_previous_one(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "s"

    def arguments(*classes: str) -> list[str]:
        return ["sequence", "--method", "sfd", "--forget-classes", *classes, "--output-dir", str(folder), *SMALL, *SETS]

    real, ran = command.unlearn, []

    def watched(args, before=None):
        ran.append(args)
        if len(ran) == 2:
            raise SystemExit(143)
        if args.request.initial_generator is not None:
            # Both networks exist, and the score network is not the pretrained one.
            generator, score = (getattr(args.request, f"initial_{name}") for name in ("generator", "score"))
            assert score == generator + "/score"
            first = weights(folder / "request-1-forget-0" / "unet")
            assert any(not torch.equal(value, first[key]) for key, value in weights(score).items())
        return real(args, before)

    monkeypatch.setattr(command, "unlearn", watched)
    with pytest.raises(SystemExit):
        main(arguments("0", "3"))
    assert "the same command again" in capsys.readouterr().out
    first = folder / "request-1-forget-0"
    assert (first / "score" / "config.json").is_file() and not (first / "checkpoints").exists()
    first_metrics = (first / "metrics.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["pecker-fast", *arguments("0", "3")])
    main()
    assert (first / "metrics.json").read_bytes() == first_metrics
    assert [args.request.forget_classes for args in ran] == [(0,), (0, 3), (0, 3), (0, 3)]
    starts = [args.request.initial_generator for args in ran]
    assert starts == [None, str(first), str(first), None]
    assert all(args.request.pretrained_model_name_or_path is None for args in ran)
    # The next request needs this score network; nothing needs the last one.
    assert not (first / "score").exists() and (folder / "request-2-forget-3" / "score").is_dir()

    result = json.loads((folder / "sequence.json").read_text())
    assert "sequence --method sfd" in result["command"] and f"--output-dir {folder.name} " in result["command"]
    for name in ("sequence.json", "sequence.md", "sequence.html"):
        assert str(tmp_path) not in (folder / name).read_text()
    assert [row["request"] for row in result["rows"]] == ["1: forget 0", "2: forget 3", "all at once"]
    assert [sorted(row["ua_by_class"]) for row in result["rows"]] == [["0"], ["0", "3"], ["0", "3"]]
    config = json.loads((folder / "request-2-forget-3" / "config.json").read_text())
    assert config["initial_generator"] == str(first) and config["options"]["max_train_steps"] == 2
    output = capsys.readouterr().out
    assert "UA of 3 (%)" in output and "all at once" in output and str(folder / "sequence.md") in output
    text, page = (folder / "sequence.md").read_text(), check_page((folder / "sequence.html").read_text())
    for words in ("one after the other", "UA of 3 (%)", "Method sfd, preset digits, seed 0, with class 1 as cover."):
        assert words in text and words in page.text
    # A picture, of which the page arranges three panels.
    assert len(page.pictures) == 3 and (folder / "sequence.png").is_file()

    # Finished requests are reused; a further one starts from the last.
    main(arguments("0", "3", "7"))
    assert [args.request.forget_classes for args in ran[4:]] == [(0, 3, 7), (0, 3, 7)]
    assert ran[4].request.initial_generator == str(folder / "request-2-forget-3")
    main(arguments("0", "3", "7"))
    assert len(ran) == 6
    # A shorter one is reported, although its last score network was used and removed.
    assert not (folder / "request-2-forget-3" / "score").exists()
    main(arguments("0", "3"))
    assert len(ran) == 6
    assert len(json.loads((folder / "sequence.json").read_text())["rows"]) == 3
    assert "another options" in fails(capsys, *arguments("0", "3"), "alpha=1.0")


def test_start_of_other_methods(tmp_path):
    last = tmp_path / "last"
    many_steps = command.SequenceArguments(method="esd", output_dir=str(tmp_path))
    assert many_steps.start([many_steps.run("last", (0,))]) == {"pretrained_model_name_or_path": str(last)}
    one_step = command.SequenceArguments(score="teacher", output_dir=str(tmp_path))
    assert one_step.start([one_step.run("last", (0,))]) == {"initial_generator": str(last)}


def test_first_request_starts_from_distilled_networks(capsys, tmp_path, monkeypatch):
    ran = []

    def watched(args, before=None):
        ran.append(args)
        raise SystemExit(143)

    monkeypatch.setattr(command, "unlearn", watched)
    words = [
        "sequence",
        "--forget-classes",
        "0",
        "3",
        "--distilled",
        "auto",
        "--output-dir",
        str(tmp_path / "s"),
        *SMALL,
    ]
    with pytest.raises(SystemExit):
        main([*words, "--method", "sfd"])
    assert [args.request.distilled for args in ran] == ["auto"]
    assert "salun starts from the pretrained network" in fails(capsys, *words, "--method", "salun")


def test_wrong_inputs(capsys, tmp_path):
    out = ["--output-dir", str(tmp_path / "s"), "--no-progress-bar"]
    assert "each class once" in fails(capsys, "sequence", "--forget-classes", "0", "3", "0", *out)
    assert "a class to forget" in fails(capsys, "sequence", "--forget-classes", "0", "1", "--cover-class", "1", *out)
    assert "0 to 9" in fails(capsys, "sequence", "--forget-classes", "0", "10", *out)
    assert "cover_class is 'one'" in fails(capsys, "sequence", "--cover-class", "one", *out)
    assert "pecker, pecker+, relabel, retrain" in fails(capsys, "sequence", "--method", "sdf", *out)
    assert "an option of none of sfd" in fails(capsys, "sequence", "--method", "sfd", *out, "--set", "density=0.1")
    assert "density" in fails(capsys, "sequence", *out, "--set", "density=7")
    assert "judge" in fails(capsys, "sequence", "--preset", "cifar10", *out)
    assert not (tmp_path / "s").exists()


def test_patches_one_after_the_other(tmp_path, monkeypatch):
    """Each patch builds on the last, with disjoint masks; the last one is reverted bit for bit."""
    monkeypatch.chdir(tmp_path)
    real, short = running.distillation_for, {"max_train_steps": 2, "samples_per_class": 2}
    monkeypatch.setattr(running, "distillation_for", lambda args: with_options(real(args), short))
    words = ["--method", "patch", "--forget-classes", "0", "3", "--output-dir", "s", "--no-at-once"]
    main(["sequence", *words, *SMALL, *SETS, "saliency_chunks=2"])
    requests = [tmp_path / "s" / name for name in ("request-1-forget-0", "request-2-forget-3")]
    first, second = patches = [pf.inspect_patch(folder / "patch.safetensors") for folder in requests]
    assert first.result == second.base and first.count and second.count
    assert pf.patch_mask(requests[0] / "patch.safetensors").iou(pf.patch_mask(requests[1] / "patch.safetensors")) == 0
    assert pf.Run(requests[0]).mask.iou(pf.Run(requests[1]).mask) == 0
    taken = pf.Run(requests[1]).config["options"]["disjoint_from"]
    assert taken == [str(Path("s", requests[0].name, "mask.safetensors"))]
    withdrawn = pf.revert_patch(requests[1], requests[1] / "patch.safetensors", output="withdrawn")
    before = weights(requests[0] / "unet")
    assert all(torch.equal(value, before[name]) for name, value in weights(withdrawn / "unet").items())
    rows = json.loads((tmp_path / "s" / "sequence.json").read_text())["rows"]
    sizes = [(folder / "patch.safetensors").stat().st_size for folder in requests]
    assert [row["patch_bytes"] for row in rows[:2]] == sizes
    assert [row["parameters_changed"] for row in rows[:2]] == pytest.approx([100 * patch.density for patch in patches])
    assert not any(changed_files(folder) for folder in requests)
