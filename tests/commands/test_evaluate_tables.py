"""evaluate-concept on tables of prompts and on captions of COCO, with a tiny Stable Diffusion."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pecker_fast.cli import main
from pecker_fast.models import StableDiffusion
from pecker_fast.runs.prompts import evaluation as command
from pecker_fast.runs.prompts import measure, sampling, sheets
from tests.commands.case import fails
from tests.diffusion.tiny_sd import SIZE, write_stable_diffusion
from tests.metrics.clip_model import save_clip

QUIET = ["--no-progress-bar", "--num-inference-steps", "2", "--near-images-per-prompt", "1"]


@pytest.fixture(autouse=True)
def one_picture(monkeypatch):
    monkeypatch.setattr(sheets, "PICTURED_PROMPTS", 1)
    monkeypatch.setattr(sheets, "PICTURED_IMAGES", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_stable_diffusion(folder / "sd")
    save_clip(folder / "clip")
    (folder / "near.txt").write_text("a man in a coat\n")
    return folder


def words_for(place, *more) -> list[str]:
    return ["evaluate-concept", str(place / "sd"), "--task", "nudity", *map(str, more), *QUIET]


def measured(place, *more) -> dict:
    main(words_for(place, *more, "--near", place / "near.txt", "--output", place / "out.json"))
    return json.loads((place / "out.json").read_text())


def test_a_table_of_an_attack(place, nudenet, capsys):
    """NudeNet's stand-in calls bright images unsafe."""
    table = place / "attack.csv"
    table.write_text("case_number,prompt,evaluation_seed\n0,tre e,11\n1,bo at,12\n2,bo at,13\n")
    result = measured(place, "--prompts", table, "--images-per-prompt", "3")
    assert result["protocol"]["samples"]["seeds_of_prompts"] and result["measured_images"] == 9
    assert not result["protocol"]["samples"]["guidance_scales_of_prompts"]
    shares = [row["inappropriate_probability"] for row in result["by_prompt"]["concept"]]
    assert result["attack_success_rate"] == pytest.approx(100 * sum(share > 0 for share in shares) / 3)
    assert result["inappropriate_probability"] == pytest.approx(sum(shares) / 3)
    assert "Attack success rate" in capsys.readouterr().out
    # Not a figure of lists of one's own.
    lines = place / "lines.txt"
    lines.write_text("tre e\n")
    assert "attack_success_rate" not in measured(place, "--prompts", lines, "--images-per-prompt", "1")


def test_captions_of_coco(place, nudenet, monkeypatch, capsys):
    """A part of the captions, against their own images; a block of captions is in memory at a time."""
    images = place / "val2014"
    images.mkdir()
    names = [f"{i}.png" for i in range(7)]
    for i, name in enumerate(names):
        Image.fromarray(np.full((20, 30, 3), 30 * i, np.uint8)).save(images / name)
    listed = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    annotations = [{"image_id": i, "id": 10 + i, "caption": f"caption {i}"} for i in range(7)]
    captions = place / "captions.json"
    captions.write_text(json.dumps({"images": listed, "annotations": annotations}))
    (place / "weights.pth").write_bytes(b"")
    (place / "one.txt").write_text("a tree\n")
    compared = []

    def quality(generated, real, **options):
        compared.append([torch.stack([data[i] for i in range(len(data))]) for data in (generated, real)])
        return {"fid": 2.5, "protocol": {}}

    monkeypatch.setattr(command, "image_quality", quality)
    monkeypatch.setattr(measure, "check_inception_weights", str)
    monkeypatch.setattr(command, "CHUNK", 2)
    monkeypatch.setattr(sampling, "BLOCK", 2)
    encoded = []
    real_encode = StableDiffusion.encode
    monkeypatch.setattr(
        StableDiffusion, "encode", lambda self, texts, *a: encoded.append(list(texts)) or real_encode(self, texts, *a)
    )
    arguments = ["--prompts", place / "one.txt", "--images-per-prompt", "1", "--clip", place / "clip"]
    arguments += ["--coco-captions", captions, "--coco-images", images, "--coco-count", "5"]
    arguments += ["--inception-weights", place / "weights.pth"]
    result = measured(place, *arguments)
    (generated, real), chosen = compared[0], [texts[1:] for texts in encoded if "caption" in texts[-1]]
    assert result["fid"] == 2.5 and result["coco_images"] == 5 and [len(texts) for texts in chosen] == [2, 2, 1]
    texts = [text for part in chosen for text in part]
    # The real images are those of the chosen captions, in their order, and the choice is the same in every run.
    numbers = [int(text.split()[1]) for text in texts]
    assert numbers == sorted(numbers) and len(set(numbers)) == 5
    assert real.shape[1:] == (3, 2 * SIZE, 2 * SIZE) and (real.float().mean((1, 2, 3)) / 30).round().tolist() == numbers
    # As if all captions had been encoded and drawn at once; caption i has the seed i.
    options = sampling.SamplerOptions("ddim", num_inference_steps=2)
    sampler = sampling.PromptSampler(sampling.read_model(str(place / "sd")), options, texts)
    expected = sampler.drawing(texts)(torch.tensor([[i, i] for i in range(5)]))
    assert (generated.int() - expected.int()).abs().max() <= 1
    # An interrupted command draws what is missing.
    folder = next(f for f in (place / "evaluation").iterdir() if len(list(f.glob("chunk-*"))) == 3)
    (folder / "chunk-00001.safetensors").unlink()
    encoded.clear()
    again = measured(place, *arguments)
    assert [texts[1:] for texts in encoded if "caption" in texts[-1]] == [texts[2:4]]
    assert again["coco_clip_score"] == pytest.approx(result["coco_clip_score"]) and torch.equal(
        compared[1][0], generated
    )
    # A table has seeds of its own.
    (place / "coco.csv").write_text("case_number,prompt,evaluation_seed\n0,caption 0,41\n")
    result = measured(place, *arguments[:6], "--coco-captions", place / "coco.csv")
    assert result["coco_images"] == 1 and result["protocol"]["coco"]["samples"]["seeds_of_prompts"]
    capsys.readouterr()


def test_wrong_tables_write_nothing(place, tmp_path, nudenet, monkeypatch, capsys):
    monkeypatch.setattr(measure, "check_inception_weights", str)
    (tmp_path / "a.csv").write_text("question\na\n")
    (tmp_path / "b.csv").write_text("prompt,evaluation_seed\na,x\n")
    (tmp_path / "c.json").write_text('{"annotations": [{"id": 1, "image_id": 2, "caption": "a"}], "images": '
                                     '[{"id": 2, "file_name": "../2.png"}]}')  # fmt: skip
    (tmp_path / "lines.txt").write_text("a\nb\n")

    def refused(*more) -> str:
        return fails(capsys, *words_for(place, *more))

    assert "has the columns question, expected prompt" in refused("--prompts", tmp_path / "a.csv")
    assert "row 1: evaluation_seed is 'x'" in refused("--prompts", tmp_path / "b.csv")
    assert "expected target" in refused("--prompts", tmp_path / "b.csv", "--prompt-column", "target")
    assert "prompts is no table" in refused("--prompts", tmp_path / "lines.txt", "--prompt-column", "target")
    assert "coco_count is given, but not coco_captions" in refused("--coco-count", "3")
    lines = ["--coco-captions", tmp_path / "lines.txt"]
    assert "coco_count is 3" in refused(*lines, "--coco-count", "3")
    assert "at least four images" in refused(*lines, "--coco-images", tmp_path)
    named = ["--coco-captions", tmp_path / "c.json", "--coco-images", tmp_path]
    assert "names the image '../2.png'" in refused(*named)
    (tmp_path / "c.json").write_text((tmp_path / "c.json").read_text().replace("../", ""))
    assert "which lacks '2.png'" in refused(*named)
