"""``pecker-fast sequence`` on concepts of a small Stable Diffusion."""

import json

import pytest
import torch

from pecker_fast import SaliencyMask
from pecker_fast.cli import main
from pecker_fast.models import resolve_text
from pecker_fast.runs.prompts import sequence as module
from pecker_fast.runs.prompts import sheets
from pecker_fast.runs.several import ended
from tests.commands.case import fails
from tests.commands.test_concepts import place  # noqa: F401  (a fixture)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(sheets, "PICTURED_PROMPTS", 2)


def words(place, folder, *more: str) -> list[str]:  # noqa: F811
    options = {
        "method": "patch",
        "output_dir": str(folder),
        "device": "cpu",
        "pretrained_model_name_or_path": str(place / "base"),
        "initial_generator": str(place / "base" / "unet"),
        "retain_prompts": str(place / "retain.txt"),
        "forget_prompts": str(place / "forget.txt"),
        "concepts": str(place / "two.txt"),
        "max_train_steps": "1",
        "clip": str(place / "clip"),
        "prompts": str(place / "eval.txt"),
        "near": str(place / "near.txt"),
        "images_per_prompt": "1",
        "near_images_per_prompt": "1",
    }
    shared = ("gradient_accumulation_steps=1", "density=0.1", "saliency_chunks=2", "sample_steps=2")
    shared += ("samples_per_prompt=1",)
    command = ["sequence", "--preset", "sd15-celebrity", "--no-progress_bar", "--set", *shared]
    return [*command, *(word for name, value in options.items() for word in (f"--{name}", value)), *more]


def test_concepts_one_after_the_other(place, tmp_path, capsys, monkeypatch):  # noqa: F811
    (place / "two.txt").write_text("brad pitt, a man\nvan gogh, a painter\n")
    folder = tmp_path / "sequence"
    main(words(place, folder))
    record = json.loads((folder / "sequence.json").read_text())
    assert [row["request"] for row in record["rows"]] == ["1: forget brad pitt", "2: forget van gogh", "all at once"]
    assert [list(row["by_concept"]) for row in record["rows"]] == [["brad pitt"], *[["brad pitt", "van gogh"]] * 2]
    for row in record["rows"]:
        assert all(0 <= values["clip_ua"] <= 100 for values in row["by_concept"].values()) and row["patch_bytes"] > 0
    output = capsys.readouterr().out
    assert "van gogh: CLIP UA" in output and "all at once" in output
    assert "“van gogh” by “a painter”" in (folder / "sequence.md").read_text()
    # The second request starts from the first one's networks and leaves alone what it changed.
    first, second = folder / "request-1", folder / "request-2"
    config = json.loads((second / "config.json").read_text())
    assert config["initial_generator"] == str(first) and config["concepts"] == [
        ["brad pitt", "a man"],
        ["van gogh", "a painter"],
    ]
    assert config["options"]["t_init"] == json.loads((first / "config.json").read_text())["options"]["t_init"]
    one, two = (SaliencyMask.load(run / "mask.safetensors") for run in (first, second))
    assert (one & two).count == 0 and one.count > 0 and two.count > 0
    base, mid, last = (resolve_text(place / "base"), resolve_text(first), resolve_text(second))
    base, mid, last = (model.load_unet().state_dict() for model in (base, mid, last))
    moved = [((base[name] != mid[name]), (mid[name] != last[name])) for name in base]
    assert sum(a.sum().item() for a, _ in moved) > 0 and not any(torch.logical_and(*pair).any() for pair in moved)
    # Called again, nothing is trained or measured.
    monkeypatch.setattr(module, "evaluate", lambda *_: pytest.fail("measured again"))
    main(words(place, folder))
    # The report of the whole and that of a request are written again.
    text = (folder / "sequence.md").read_text()
    (folder / "sequence.md").unlink()
    main(["report", str(folder)])
    assert (folder / "sequence.md").read_text() == text
    (second / "report.md").unlink()
    main(["report", str(second)])
    assert "van gogh" in (second / "report.md").read_text()
    # With a further concept, requests are added: nothing that has ended is in the way.
    (place / "three.txt").write_text((place / "two.txt").read_text() + "grace hopper, a woman\n")
    plans = []

    def plan_only(args, plan, once, *_):
        plans.append([*plan, once])
        raise SystemExit(130)

    monkeypatch.setattr(module, "run_requests", plan_only)
    with pytest.raises(SystemExit):
        main(words(place, folder, "--concepts", str(place / "three.txt")))
    assert [ended(run) for run in plans[0]] == [True, True, False, False]


def test_wrong_options(place, capsys, tmp_path):  # noqa: F811
    (place / "two.txt").write_text("brad pitt, a man\nvan gogh, a painter\n")
    start = ["sequence", "--preset", "sd15-celebrity", "--output_dir", str(tmp_path / "run")]
    assert "concepts is not given" in fails(capsys, *start)
    assert "expected one of them, to measure" in fails(capsys, *start, "--concepts", str(place / "two.txt"))
    (tmp_path / "bad.txt").write_text("x\n")
    assert "line 1: 'x' has no cover" in fails(
        capsys, *words(place, tmp_path / "run", "--concepts", str(tmp_path / "bad.txt"))
    )
    assert not (tmp_path / "run").exists()
