"""evaluate-concept on a tiny Stable Diffusion: images, their cache and their figures; wrong input."""

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pecker_fast.cli import main
from pecker_fast.diffusion import sampler as sampler_module
from pecker_fast.metrics import FeatureStatistics
from pecker_fast.models import StableDiffusion
from pecker_fast.runs.prompts import evaluation as command
from pecker_fast.runs.prompts import measure, sheets
from pecker_fast.runs.prompts import sampling as text_sampling
from tests.commands.case import fails
from tests.diffusion.tiny_sd import SIZE, tiny_unet, write_stable_diffusion
from tests.metrics.clip_model import save_clip

QUIET = ["--no-progress-bar", "--num-inference-steps", "3", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(sheets, "PICTURED_PROMPTS", 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd") / "base")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip") / "clip"))


@pytest.fixture
def lists(tmp_path):
    """Files of few prompts."""
    (tmp_path / "prompts.txt").write_text("a new picture of {concept}\n{concept} on the moon\n")
    (tmp_path / "names.txt").write_text("Green Man\nnobody\n")
    (tmp_path / "scenes.txt").write_text("a man in a coat\n")
    return tmp_path


class Named:
    """A celebrity detector: one face in bright images, green where green is most."""

    labels = ("Brad_Pitt", "Green Man")

    def describe(self):
        return {"kind": "stand-in"}

    def __call__(self, images):
        faces = []
        for image in images:
            green = image[1].float().mean() / 255
            rows = torch.stack([1 - green, green])[None]
            faces.append(rows if image.float().mean() > 100 else rows[:0])
        return faces


@pytest.fixture
def named(monkeypatch):
    module = types.ModuleType("my_celebrities")
    module.make = Named
    monkeypatch.setitem(sys.modules, "my_celebrities", module)
    return ["--celebrity-detector", "my_celebrities:make"]


def measured(*arguments) -> dict:
    main(["evaluate-concept", *map(str, arguments), *QUIET])
    return json.loads(open(arguments[arguments.index("--output") + 1]).read())


def test_a_celebrity(base, clip, lists, named, capsys, monkeypatch):
    arguments = [
        base, "--task", "celebrity", "--concept", "brad pitt", "--prompts", lists / "prompts.txt",
        "--near", lists / "names.txt", "--images-per-prompt", "3", "--near-images-per-prompt", "1", "--clip", clip,
        *named, "--output", lists / "out.json",
    ]  # fmt: skip
    monkeypatch.setattr(command, "CHUNK", 4)
    result = measured(*arguments)
    protocol = result["protocol"]
    assert protocol["samples"]["sampler"] == "ddim" and protocol["samples"]["guidance_scale"] == 7.5
    # By name only, without its path on this machine.
    assert protocol["prompts"] == {"source": "prompts.txt", "count": 2, "images_of_each": 3}
    assert protocol["near"]["concepts"] == ["Green Man", "nobody"] and protocol["near"]["count"] == 50
    assert protocol["near"]["unknown_to_the_detector"] == ["nobody"]
    assert protocol["detectors"]["celebrity_detector"] == {"kind": "stand-in"} and protocol["environment"]
    assert (result["measured_images"], result["near_measured_images"]) == (6, 50)
    assert {"near_no_face_share", "near_gcd_score", "near_clip_score", "clip_score"} <= set(result)
    # The scores are those of the kept images.
    folder = next(f for f in (lists / "evaluation").iterdir() if len(list(f.glob("chunk-*"))) == 2)
    chunks = [safetensors.torch.load_file(path) for path in sorted(folder.glob("chunk-*"))]
    images = torch.cat([part["images"] for part in chunks])
    items = torch.cat([part["labels"] for part in chunks])
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 2 * SIZE, 2 * SIZE)
    # Image j of every prompt has the seed j.
    assert items.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    faces = [rows[:, 0] for rows in Named()(images)]
    largest = [float(rows.max()) for rows in faces if len(rows)]
    assert result["no_face_share"] == pytest.approx(1 - len(largest) / 6)
    assert result["gcd_score"] == (pytest.approx(sum(largest) / len(largest)) if largest else None)
    # Each prompt alone, too.
    rows = result["by_prompt"]["concept"]
    assert [(row["prompt"], row["images"]) for row in rows] == [
        ("a new picture of brad pitt", 3), ("brad pitt on the moon", 3),
    ]  # fmt: skip
    assert sum(row["clip_score"] for row in rows) / 2 == pytest.approx(result["clip_score"])
    assert len(result["by_prompt"]["near"]) == 50
    for name in ("concept", "near"):
        assert Image.open(lists / "samples" / f"{name}.png").width > 190
    assert "CLIP score, concept" in capsys.readouterr().out
    # Drawn once: measuring again reads the images, except for the pictures.
    drawn = []
    real = sampler_module.sample_ddim
    monkeypatch.setattr(sampler_module, "sample_ddim", lambda *a, **k: drawn.append(len(a[2])) or real(*a, **k))
    assert measured(*arguments) == result and sum(drawn) == 2 * 3 + 2 * 3
    next(folder.glob("chunk-00001*")).unlink()
    drawn.clear()
    assert measured(*arguments) == result and sum(drawn) == 2 + 2 * 3 + 2 * 3


def test_images_equal_those_of_the_pipeline(base, lists):
    """Plain DDIM at guidance 7.5 equals StableDiffusionPipeline on the same noise."""
    from diffusers import StableDiffusionPipeline

    model = text_sampling.read_model(str(base))
    prompts = ["a dog", "a cat on a mat"]
    sampler = text_sampling.PromptSampler(model, text_sampling.SamplerOptions("ddim", num_inference_steps=5), prompts)
    drawn = sampler.drawing(prompts)
    images = drawn(torch.tensor([[1, 7], [0, 3]]))
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    noise = []
    for seed in (7, 3):
        generator = torch.Generator().manual_seed(seed)
        torch.randint(2**32, (), generator=generator)
        noise.append(torch.randn(4, SIZE, SIZE, generator=generator))
    expected = pipe([prompts[1], prompts[0]], num_inference_steps=5, guidance_scale=7.5, latents=torch.stack(noise),
                    output_type="pt").images  # fmt: skip
    assert (images.float() / 255 - expected).abs().max() <= 1.5 / 255
    # Each prompt has its own scale and its own call: drawn alone it is the same image, bit for bit.
    own, (alone,) = sampler.drawing(prompts, [1.0, 7.5])(torch.tensor([[1, 7], [0, 3]])), drawn(torch.tensor([[1, 7]]))
    assert torch.equal(own[0], alone) and not torch.equal(own[1], images[1])


def test_one_step_and_sld_and_their_settings(base, lists):
    model = text_sampling.read_model(str(base))
    options = text_sampling.SamplerOptions
    drawn = {}
    for name, sampler_options in {
        "ddim": options("ddim", num_inference_steps=3),
        "late": options("sld", num_inference_steps=3, sld="weak", safety_text="a man"),
        "max": options("sld", num_inference_steps=3, sld="max", safety_text="a man"),
        "one": options("one_step", t_init=625),
    }.items():
        sampler = text_sampling.PromptSampler(model, sampler_options, ["a dog"])
        drawn[name] = sampler.drawing(["a dog"])(torch.tensor([[0, 1]])).float()
    # Three steps are within the warm-up of "weak".
    assert (drawn["late"] - drawn["ddim"]).abs().max() <= 1
    assert (drawn["max"] - drawn["ddim"]).abs().max() > 1 and (drawn["one"] - drawn["ddim"]).abs().max() > 1
    assert options("sld", safety_text="x").sampler_of(model).sld == "max"
    with pytest.raises(ValueError, match="t_init is not given"):
        options("one_step").sampler_of(model)
    with pytest.raises(ValueError, match="safety_text is not given"):
        options("sld").sampler_of(model)
    with pytest.raises(ValueError, match="resolution is 17"):
        text_sampling.PromptSampler(model, options("ddim", resolution=17), ["a dog"])
    assert text_sampling.PromptSampler(model, options("ddim", resolution=32), []).settings["latent_size"] == 16


def test_a_name_on_the_hub(base, monkeypatch):
    import huggingface_hub

    names = []

    def fetch(name, **options):
        names.append(name)
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = text_sampling.read_model("someone/tiny-sd")
    assert model.parts.folder == base and model.source == "hub:someone/tiny-sd"
    assert model.t_init is None and names == ["someone/tiny-sd"] * 2
    with pytest.raises(ValueError, match=r"model is '/no/such'.*by --base$"):
        text_sampling.read_model("/no/such")


def test_cached_images_depend_on_weights_prompts_and_settings(base):
    model = text_sampling.read_model(str(base))

    def key(prompts, requested, **settings):
        sampler = text_sampling.PromptSampler(model, text_sampling.SamplerOptions("ddim", **settings), prompts)
        return sampler.describe(requested)

    one = key(["a dog", "a man"], ["a dog"])
    # Other requested prompts do not matter; everything that the images depend on does.
    assert key(["a cat", "a dog"], ["a dog"]) == one
    assert key(["a dog", "a man"], ["a man"]) != one and key(["a dog"], ["a dog"], guidance_scale=2.0) != one
    unet = model.load_unet()
    with torch.no_grad():
        next(unet.parameters()).add_(1)
    model = replace(model, unet=unet)
    assert key(["a dog"], ["a dog"])["unet_sha256"] != one["unet_sha256"]


def test_nudity_with_two_detectors(base, clip, lists, nudenet, capsys):
    np.save(lists / "q16.npy", np.random.randn(2, 8).astype(np.float32))
    (lists / "eval.txt").write_text("\n".join(f"picture number {i}" for i in range(26)))
    result = measured(
        base, "--task", "nudity", "--prompts", lists / "eval.txt", "--near", lists / "scenes.txt",
        "--images-per-prompt", "2", "--sampler", "sld", "--sld", "medium", "--q16", lists / "q16.npy", "--clip", clip,
        "--output", lists / "out.json",
    )  # fmt: skip
    protocol = result["protocol"]
    assert (
        protocol["detectors"]["nudenet"]["min_prob"] == 0.6 and protocol["detectors"]["nudenet"]["version"] == "3.4.2"
    )
    assert protocol["detectors"]["q16"]["embeddings"].endswith("q16.npy")
    assert protocol["samples"]["sld"] == "medium" and "nudity" in protocol["samples"]["safety_text"]
    either = result["inappropriate_probability"]
    assert max(result["nudenet_probability"], result["q16_probability"]) <= either + 1e-9
    assert either <= result["nudenet_probability"] + result["q16_probability"] + 1e-9
    assert result["max_expected_inappropriateness"] >= either - 1e-9
    assert result["near_max_expected_inappropriateness"] is None and result["near_measured_images"] == 5
    capsys.readouterr()


def test_i2p_sets_seeds_and_guidance(base, lists, nudenet, monkeypatch, capsys):
    (lists / "i2p.csv").write_text("prompt,sd_seed,sd_guidance_scale\na,11,7.5\nb,11,3.0\nb,12,3.0\n")
    calls = []
    real = sampler_module.sample_ddim

    def watched(network, schedule, labels, steps, **options):
        calls.append((labels.tolist(), options["guidance_scale"], options["seed"]))
        return real(network, schedule, labels, steps, **options)

    monkeypatch.setattr(sampler_module, "sample_ddim", watched)
    result = measured(
        base, "--task", "nudity", "--protocol", "paper", "--prompts", lists / "i2p.csv", "--near",
        lists / "scenes.txt", "--images-per-prompt", "2", "--near-images-per-prompt", "1",
        "--output", lists / "out.json",
    )  # fmt: skip
    (low, scale, seeds), (high, other, more), *_ = calls
    assert (scale, other, len(low), len(high)) == (3.0, 7.5, 4, 2) and low[0] == low[3]
    # Seeds follow from the prompt's seed and the image's number: equal seeds give equal noise.
    assert seeds[:2] == more and len({*seeds}) == 4
    assert result["protocol"]["samples"]["seeds_of_prompts"] and result["protocol"]["arguments"]["protocol"] == "paper"
    capsys.readouterr()


def test_user_captions(base, clip, lists, monkeypatch, capsys):
    (lists / "captions.txt").write_text("\n".join(f"caption {i}" for i in range(5)))
    (lists / "coco").mkdir()
    for i in range(4):
        Image.fromarray(np.full((20, 30, 3), 60 * i, np.uint8)).save(lists / "coco" / f"{i}.jpg", quality=95)
    weights = lists / "inception.pth"
    weights.write_bytes(b"")

    def quality(generated, real, **options):
        assert (len(generated), len(real)) == (5, 4) and options["weights"] == str(weights)
        pictures = [torch.stack([data[i] for i in range(len(data))]) for data in (generated, real)]
        assert all(part.shape[1:] == (3, 2 * SIZE, 2 * SIZE) for part in pictures)
        assert (pictures[1].float().mean((1, 2, 3)) - 60 * torch.arange(4)).abs().max() < 2
        statistics = [FeatureStatistics.of(part.double().mean((2, 3))) for part in pictures]
        return {"fid": 1.0 + len(statistics), "protocol": {"k": 3}}

    monkeypatch.setattr(command, "image_quality", quality)
    monkeypatch.setattr(measure, "check_inception_weights", str)
    monkeypatch.setattr(command, "CHUNK", 2)
    (lists / "one.txt").write_text("{concept} somewhere\n")
    result = measured(
        base, "--task", "celebrity", "--concept", "brad pitt", "--prompts", lists / "one.txt", "--images-per-prompt",
        "1", "--near-images-per-prompt", "1", "--clip", clip, "--coco-captions", lists / "captions.txt",
        "--coco-images", lists / "coco", "--inception-weights", weights, "--output", lists / "out.json",
    )  # fmt: skip
    assert result["fid"] == 3.0 and result["coco_images"] == 5 and 0 <= result["coco_clip_score"] <= 100
    assert result["protocol"]["coco"]["image_quality"]["k"] == 3
    assert "gcd_score" not in result
    capsys.readouterr()


def test_a_unet_with_its_base(base, lists, named, capsys):
    unet = tiny_unet()
    unet.save_pretrained(lists / "edited")
    arguments = [
        lists / "edited", "--base", base, "--task", "celebrity", "--concept", "Brad Pitt", "--prompts",
        lists / "prompts.txt", "--images-per-prompt", "1", "--near-images-per-prompt", "1", *named,
    ]  # fmt: skip
    result = measured(*arguments, "--output", lists / "out.json")
    assert result["protocol"]["samples"]["unet_sha256"] == text_sampling.weights_hash(unet)
    # The detector knows none of the near names shipped with the package.
    assert result["near_gcd_score"] is None and len(result["protocol"]["near"]["unknown_to_the_detector"]) == 15
    # Two sheets: before, by the base, and after.
    single = 190 + 3 * (2 * SIZE * 2 + 2) + 2
    assert Image.open(lists / "samples" / "concept.png").width == single + (single - 190) + 12
    capsys.readouterr()


def test_wrong_inputs(base, lists, capsys, monkeypatch, named):
    base_args = ["evaluate-concept", str(base), *QUIET]
    brad = [*base_args, "--task", "celebrity", "--concept", "brad pitt"]
    assert "task is not given" in fails(capsys, *base_args)
    assert "concept is None" in fails(capsys, *base_args, "--task", "celebrity")
    assert "I2P" in fails(capsys, *base_args, "--task", "nudity", "--protocol", "paper")
    assert "near_images_per_prompt is 0" in fails(capsys, *brad, "--near-images-per-prompt", "0")
    assert "is not the folder of a Stable Diffusion" in fails(
        capsys, "evaluate-concept", str(lists), "--task", "celebrity", "--concept", "x"
    )
    (lists / "trained.txt").write_text("a photo of brad pitt\n")
    assert "were trained on" in fails(capsys, *brad, "--prompts", str(lists / "trained.txt"))
    assert "q16 is given, but not clip" in fails(capsys, *base_args, "--task", "nudity", "--no-nudenet", "--q16", "x")
    assert "coco_images is given" in fails(capsys, *brad, "--coco-images", str(lists))
    assert "inception-2015" in fails(
        capsys, *brad, "--coco-captions", str(lists / "prompts.txt"), "--coco-images", str(lists)
    )
    assert "no folder" in fails(capsys, *brad, "--output", str(lists / "none" / "out.json"))
    assert "does not know 'cary grant'" in fails(
        capsys, *base_args, "--task", "celebrity", "--concept", "cary grant", *named
    )
    assert "t_init is not given" in fails(capsys, *brad, "--sampler", "one_step")
    monkeypatch.setitem(sys.modules, "nudenet", None)
    assert "pip install 'nudenet>=3'" in fails(capsys, *base_args, "--task", "nudity")
    assert not (base / "evaluation.json").exists() and StableDiffusion(base)
