"""Several concepts in one run of a small Stable Diffusion: what is trained, measured and reported."""

import json

import pytest
import torch

from pecker_fast import SaliencyMask
from pecker_fast.cli import main
from pecker_fast.metrics import ClipModel, ConceptMeter, clip_score
from pecker_fast.models import StableDiffusion
from pecker_fast.runs.presets import prompt_preset
from pecker_fast.runs.prompts import sheets
from pecker_fast.runs.prompts.request import PromptRequestArguments, resolve_prompts
from tests.commands.case import fails
from tests.diffusion.tiny_sd import write_stable_diffusion
from tests.metrics.clip_model import save_clip

SMALL = ["--max_train_steps", "1", "--no-progress_bar", "--device", "cpu", "--checkpointing_steps", "1"]
SMALL += ["--gradient_accumulation_steps", "2", "--sample_steps", "2", "--samples_per_prompt", "1"]
CONCEPTS = "brad pitt, a middle aged man\nangelina jolie, a middle aged woman\nvan gogh, a painter\n"


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(sheets, "PICTURED_PROMPTS", 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts")
    write_stable_diffusion(folder / "base")
    save_clip(folder / "clip")
    (folder / "concepts.txt").write_text(CONCEPTS)
    (folder / "retain.txt").write_text("a dog\na cat\n")
    (folder / "forget.txt").write_text("a photo of {concept}\n{concept} smiles\n")
    (folder / "near.txt").write_text("tom cruise\nmatt damon\n")
    (folder / "eval.txt").write_text("a new picture of {concept}\n{concept} on the moon\n")
    return folder


def options(place) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(place / "base"), "--retain_prompts", str(place / "retain.txt")),
        *("--concepts", str(place / "concepts.txt"), "--forget_prompts", str(place / "forget.txt")),
    ]


def resolved(place, **more):
    args = PromptRequestArguments(
        concepts=str(place / "concepts.txt"), retain_prompts=str(place / "retain.txt"), **more
    )
    return resolve_prompts(args, prompt_preset("sd15-celebrity"), 0)


def test_prompts_of_all_concepts(place):
    prompts = resolved(place, forget_prompts=str(place / "forget.txt"))
    assert prompts.request.forget == (
        *("a photo of brad pitt", "brad pitt smiles", "a photo of angelina jolie", "angelina jolie smiles"),
        *("a photo of van gogh", "van gogh smiles"),
    )
    assert prompts.request.cover[-2:] == ("a photo of a painter", "a painter smiles")
    assert prompts.concepts[2] == ("van gogh", "a painter") and prompts.concept == "brad pitt, angelina jolie, van gogh"
    # By default the list that comes with the package; every concept is pictured, and equally often drawn.
    default = resolved(place)
    forget = default.request.forget
    counts = [sum(name in text for text in forget) for name, _ in default.concepts]
    assert len(set(counts)) == 1 and sum(counts) == len(forget)
    shown = default.pictured[: default.forgotten]
    assert all(any(name in text for text in shown) for name, _ in default.concepts)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"concept": "x"}, "concept is 'x', and concepts is given too"),
        ({"cover_prompts": "x"}, "cover_prompts is 'x', and concepts is given too"),
        ({"forget_prompts": "retain"}, "expected templates with {concept}"),
    ],
)
def test_wrong_requests(place, more, message):
    with pytest.raises(ValueError, match=message):
        resolved(place, **more)


def test_prompts_to_preserve_name_no_concept(place, tmp_path):
    (tmp_path / "retain.txt").write_text("a dog\nvan  Gogh by the sea\n")
    args = PromptRequestArguments(concepts=str(place / "concepts.txt"), retain_prompts=str(tmp_path / "retain.txt"))
    with pytest.raises(ValueError, match="retain_prompts has 'van  Gogh by the sea', which names 'van gogh'"):
        resolve_prompts(args, prompt_preset("sd15-celebrity"), 0)


@pytest.fixture(scope="module")
def run(place):
    """One patch over all concepts, measured by CLIP."""
    folder = place / "patch"
    words = ["unlearn", "--preset", "sd15-celebrity", "--method", "patch", "--output_dir", str(folder), *SMALL]
    words += ["--density", "0.1", "--saliency_chunks", "2"]
    main([*words, *options(place), "--initial_generator", str(place / "base" / "unet")])
    words = ["evaluate-concept", str(folder), "--clip", str(place / "clip"), "--prompts", str(place / "eval.txt")]
    words += ["--near", str(place / "near.txt"), "--images-per-prompt", "2", "--near-images-per-prompt", "1"]
    main([*words, "--no-progress-bar", "--batch-size", "8"])
    return folder


def test_one_patch_over_all_concepts(run, place):
    config = json.loads((run / "config.json").read_text())
    assert config["concepts"] == [line.split(", ") for line in CONCEPTS.splitlines()]
    assert len(config["prompts"]["forget"]) == 6
    old, new = (StableDiffusion(folder).load_unet().state_dict() for folder in (place / "base", run))
    changed = sum((old[name] != new[name]).sum().item() for name in old)
    mask = SaliencyMask.load(run / "mask.safetensors")
    assert 0 < changed <= mask.count and mask.density == pytest.approx(0.1, abs=0.01)


def test_each_concept_is_measured(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["concepts"]) == ["brad pitt", "angelina jolie", "van gogh"]
    for values in metrics["concepts"].values():
        assert 0 <= values["clip_ua"] <= 100 and 0 <= values["near_clip_recognised"] <= 100
    assert metrics["concepts"]["van gogh"]["cover"] == "a painter"
    # Each has as many images, so the figures of all are the mean of theirs.
    for key in ("clip_ua", "clip_score"):
        mean = sum(values[key] for values in metrics["concepts"].values()) / 3
        assert metrics[key] == pytest.approx(mean)
    assert metrics["measured_images"] == 3 * 2 * 2
    report = (run / "report.md").read_text()
    assert "Concept by concept" in report and "van gogh" in report and "a painter" in report
    assert (run / "samples" / "concept.png").is_file()


def test_parts_of_a_meter(place):
    """The figures of some prompts are those of a meter that saw these alone, written out."""
    clip = ClipModel(str(place / "clip"), torch.device("cpu"))
    prompts, others = ("a dog", "a cat", "a man"), ("a bird", "a fish", "a woman")
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    whole = ConceptMeter(prompts, 2, clip=clip, alternatives=others)
    for part in images.split(4):
        whole.add(part)
    alone = ConceptMeter(prompts[1:], 2, clip=clip, alternatives=others[1:])
    alone.add(images[2:])
    part = whole.only(range(1, 3)).result()
    assert part == pytest.approx(alone.result())
    features, texts, alternatives = clip.images(images[2:]), clip.texts(prompts[1:]), clip.texts(others[1:])
    cosine = lambda a: torch.nn.functional.cosine_similarity(  # noqa: E731
        features.double(), a.repeat_interleave(2, 0).double()
    )
    assert part["clip_recognised"] == 100 * (cosine(texts) > cosine(alternatives)).double().mean().item()
    assert part["clip_score"] == clip_score(features, texts.repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="alternatives has 1 prompts, expected 3"):
        ConceptMeter(prompts, 2, clip=clip, alternatives=others[:1])


def test_wrong_files_are_one_line(place, capsys, tmp_path):
    (tmp_path / "concepts.txt").write_text("brad pitt, a man\nnobody known\n")
    words = ["unlearn", "--preset", "sd15-celebrity", "--method", "sfd", "--output_dir", str(tmp_path / "run")]
    words += [*options(place), "--concepts", str(tmp_path / "concepts.txt")]
    line = fails(capsys, *words)
    assert "line 2: 'nobody known' has no cover" in line and not (tmp_path / "run").exists()
