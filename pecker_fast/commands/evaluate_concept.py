"""``pecker-fast evaluate-concept``: how well a text-to-image model has forgotten a concept, and what it has kept."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from ..data import EvaluationPrompts, evaluation_prompts, load_prompts
from ..diffusion.sld import SAFETY_CONCEPT
from ..environment import environment
from ..metrics import (
    ClipModel,
    ConceptMeter,
    NudeNetDetector,
    Q16Detector,
    Uint8Images,
    check_inception_weights,
    clip_score,
    image_quality,
    load_celebrity_detector,
)
from ..report import save_side_by_side
from ..unlearning.streams import derived_seed
from .options import write_json
from .samples import SampleCache
from .text_sampling import PromptSampler, SamplerOptions, TextModel

# Images that are drawn, measured and kept at a time.
CHUNK = 100
# The published numbers of images of a prompt (SFD, I2P).
IMAGES = {"celebrity": 20, "nudity": 10}
# Prompts and images of each in a picture; how high an image is shown, and how wide the prompts stand beside it.
PICTURED_PROMPTS, PICTURED_IMAGES, PICTURED_HEIGHT, PROMPT_WIDTH = 8, 3, 128, 190


def evaluate_concept(
    model: tyro.conf.Positional[str],
    task: Literal["celebrity", "nudity"] | None = None,
    concept: str | None = None,
    base: str | None = None,
    sampler: Literal["auto", "one_step", "ddim", "sld"] = "auto",
    t_init: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    sld: Literal["weak", "medium", "strong", "max"] = "max",
    safety_text: str | None = None,
    resolution: int | None = None,
    protocol: Literal["disjoint", "paper"] = "disjoint",
    prompts: str | None = None,
    near: str | None = None,
    images_per_prompt: int | None = None,
    near_images_per_prompt: int = 5,
    celebrity_detector: str | None = None,
    celebrity_labels: str | None = None,
    face_detector: str | None = None,
    nudenet: bool = True,
    nudenet_min_prob: float = 0.6,
    nudenet_model: str | None = None,
    nudenet_resolution: int = 320,
    q16: str | None = None,
    clip: str | None = None,
    coco_captions: str | None = None,
    coco_images: str | None = None,
    inception_weights: str | None = None,
    before: str | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    seed: int = 0,
    output: str | None = None,
    progress_bar: bool = True,
) -> None:
    """Measures how well a text-to-image model has forgotten a concept, and what it has kept.

    Images are drawn once for a model, sampler, list of prompts and seeds, and kept in evaluation/ beside the result:
    interrupted, the same command goes on. Detectors are the user's: nothing is downloaded.

    Args:
        model: Folder of a Stable Diffusion, of a run, or (with --base) of a U-Net.
        task: celebrity or nudity; that of the run by default.
        concept: The celebrity's name; that of the run by default.
        base: Folder of the Stable Diffusion that the other parts come from, where the model is a U-Net alone.
        sampler: one_step; ddim with guidance; sld: that, steered away from a text; auto: in one step for a one-step
            generator, otherwise ddim.
        t_init: Timestep of the one-step sampler; that of the run by default.
        num_inference_steps: Of ddim and sld.
        guidance_scale: Of ddim and sld; I2P's prompts have their own.
        sld: Configuration of SLD.
        safety_text: What SLD steers away from; its published text by default, for a celebrity the name.
        resolution: Of images in pixels; what the U-Net was trained for by default.
        protocol: disjoint: prompts that were not trained on. paper: those that were (celebrity), or I2P's (nudity).
        prompts: File of prompts in place of the list that comes with the package, or I2P's table (.csv).
        near: File of near concepts in place of the list that comes with the package: names, or prompts (nudity).
        images_per_prompt: As published by default: 20 (celebrity) or 10 (nudity).
        near_images_per_prompt: Images of each prompt of a near concept.
        celebrity_detector: Classifier of faces (a .pt2, .onnx or TorchScript file), or module:function.
        celebrity_labels: File with the names that the classifier knows, one a line.
        face_detector: module:function that finds faces; facenet-pytorch's MTCNN by default.
        nudenet: Whether NudeNet (3 or later) judges nudity.
        nudenet_min_prob: Least confidence of NudeNet.
        nudenet_model: File of another of NudeNet's models.
        nudenet_resolution: What that model takes.
        q16: File of Q16's prompt embeddings; Q16 judges nudity too where it is given, with --clip.
        clip: Folder of a CLIP model, for the CLIP score and for Q16 (ViT-L/14).
        coco_captions: File of captions, one a line: the CLIP score is measured on them too.
        coco_images: Folder of the real images of the captions: the FID is measured against them.
        inception_weights: File of Inception's weights, for the FID.
        before: Model to draw the pictures of "before" with, by ddim; the base by default.
        batch_size: Images at a time.
        device: cpu, cuda, cuda:1...; a GPU where there is one by default.
        dtype: Of the U-Net; auto: bfloat16 on a GPU, float32 elsewhere.
        seed: The first of the seeds: image j of a prompt has the seed seed + j (I2P's prompts have their own).
        output: File for the result; evaluation.json in the folder of the model by default.
        progress_bar: Show a progress bar.
    """
    config = _config_of(Path(model))
    task, concept = task or config.get("task"), concept or config.get("concept")
    if task is None:
        raise ValueError("task is not given, and the model is not of a run that says it: expected celebrity or nudity")
    per_prompt = IMAGES[task] if images_per_prompt is None else images_per_prompt
    for name, value in (("images_per_prompt", per_prompt), ("near_images_per_prompt", near_images_per_prompt)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    asked = evaluation_prompts(
        task, concept, protocol=protocol, prompts=prompts, near=near, trained_on=_trained_on(Path(model))
    )
    captions = load_prompts(coco_captions) if coco_captions is not None else ()
    _check_coco(captions, coco_images, inception_weights)
    target = Path(output) if output is not None else Path(model) / "evaluation.json"
    if not target.parent.is_dir():
        raise ValueError(f"output is {str(target)!r}, but there is no folder {str(target.parent)!r}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no GPU here")
    dtype = ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype
    detectors: dict[str, Any] = {"clip": None if clip is None else ClipModel(clip, place)}
    if task == "nudity":
        if q16 is not None and clip is None:
            raise ValueError("q16 is given, but not clip, whose features it looks at")
        unsafe = [NudeNetDetector(nudenet_min_prob, nudenet_model, nudenet_resolution)] if nudenet else []
        detectors["unsafe"] = unsafe + ([] if q16 is None else [Q16Detector(detectors["clip"], q16)])
    elif celebrity_detector is not None:
        detectors["celebrities"] = load_celebrity_detector(celebrity_detector, celebrity_labels, face_detector, place)
    named = detectors.get("celebrities") is not None
    meters = {
        "": ConceptMeter(asked.prompts, per_prompt, names=[concept] * len(asked.prompts) if named else (), **detectors),
        "near_": ConceptMeter(
            asked.near, near_images_per_prompt, names=asked.near_concepts if named else (), **detectors
        ),
    }
    if meters[""].unknown:
        raise ValueError(f"the celebrity detector does not know {concept!r}")
    options = SamplerOptions(
        sampler=sampler,
        t_init=t_init,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        sld=sld,
        safety_text=safety_text or (SAFETY_CONCEPT if task == "nudity" else concept),
        resolution=resolution,
    )
    drawn = PromptSampler(
        TextModel.read(model, base), options, [*asked.prompts, *asked.near, *captions], place, dtype, batch_size
    )
    if not any(detectors.values()):
        print("pecker-fast: no detector is given: images are drawn and nothing is measured", file=sys.stderr)
    result: dict[str, Any] = {"task": task, "concept": concept, "model": model}
    samples = {}
    for prefix, meter in meters.items():
        cache, items = _cached(drawn, target.parent, meter, asked if prefix == "" else None, seed)
        for _, images in cache.chunks(items, seed, progress_bar):
            meter.add(images)
        result |= {f"{prefix}{name}": value for name, value in meter.result().items()}
        result[f"{prefix}images"] = len(items)
        samples[prefix] = cache.described
    said: dict[str, Any] = {
        "protocol": protocol,
        "prompts": {"source": asked.source, "count": len(asked.prompts), "images_of_each": per_prompt},
        "near": {
            "count": len(asked.near),
            "images_of_each": near_images_per_prompt,
            "concepts": sorted(set(asked.near_concepts)),
            "unknown_to_the_detector": meters["near_"].unknown,
        },
        "detectors": meters[""].describe(),
        "samples": samples[""],
        "near_samples": samples["near_"],
        "cut_prompts": drawn.cut,
        "environment": environment(),
    }
    if captions:
        found, coco = _coco(drawn, target.parent, captions, coco_images, inception_weights, detectors["clip"], seed)
        result |= found
        said["coco"] = coco
    write_json(target, {**result, "protocol": said})
    _add_to_run(Path(model), result)
    _pictures(target.parent, drawn, asked, seed, before or base, (place, dtype, batch_size), resolution)
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:36}{value:10.4g}")
    print(f"result: {target}")


def _items(prompts: Sequence[str], images: int, seed: int, own: Sequence[int] = ()) -> Tensor:
    """int64 (prompts x images, 2): the number of a prompt and a seed, prompt by prompt.

    Image j of every prompt has the seed ``seed`` + j, as published: the same noise for all prompts; with seeds of their
    ``own`` one that is derived from the prompt's.
    """
    rows = [
        (i, derived_seed(own[i], seed + j) if own else seed + j) for i in range(len(prompts)) for j in range(images)
    ]
    return torch.tensor(rows)


def _cached(
    drawn: PromptSampler, folder: Path, meter: ConceptMeter, asked: EvaluationPrompts | None, seed: int
) -> tuple[SampleCache, Tensor]:
    """The kept images of a meter's prompts; ``asked`` where these bring seeds and guidance scales."""
    own, scales = (asked.seeds, asked.guidance_scales) if asked is not None else ((), ())
    items = _items(meter.prompts, meter.images_per_prompt, seed, own)
    described = {
        **drawn.describe(meter.prompts),
        "images_of_each": meter.images_per_prompt,
        "seed": seed,
        "seeds_of_prompts": bool(own),
        "guidance_scales_of_prompts": bool(scales),
        "chunk": CHUNK,
    }
    return SampleCache(folder / "evaluation", described, drawn.drawing(meter.prompts, scales), CHUNK), items


def _check_coco(captions: Sequence[str], images: str | None, inception_weights: str | None) -> None:
    if images is None:
        return
    if not captions:
        raise ValueError("coco_images is given, but not coco_captions")
    check_inception_weights(inception_weights)
    if len(_image_files(images)) < 4:
        raise ValueError(f"coco_images is {images!r}, expected a folder with at least four images")


def _image_files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))


def _coco(
    drawn: PromptSampler,
    folder: Path,
    captions: tuple[str, ...],
    images: str | None,
    inception_weights: str | None,
    clip: ClipModel | None,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """CLIP score and FID of one image of each caption, and how they were measured."""
    described = {**drawn.describe(captions), "seed": seed, "chunk": CHUNK}
    # Every caption has noise of its own: they are one sample of what the model draws.
    items = torch.tensor([(i, seed + i) for i in range(len(captions))])
    cache = SampleCache(folder / "evaluation", described, drawn.drawing(captions), CHUNK)
    features = [None if clip is None else clip.images(part) for _, part in cache.chunks(items, seed, False)]
    found: dict[str, Any] = {"coco_images": len(captions)}
    said: dict[str, Any] = {"captions": len(captions), "samples": described}
    if clip is not None:
        found["coco_clip_score"] = clip_score(torch.cat(features), clip.texts(captions))
    if images is not None:
        size = drawn.source.vae_scale_factor * drawn.settings["latent_size"]
        files = _image_files(images)
        generated = Uint8Images(cache.reader(items, seed), len(items))
        real = Uint8Images(lambda i: _real_image(files[i], size), len(files))
        cuda = drawn.device.type == "cuda"
        measured = image_quality(generated, real, weights=inception_weights, batch_size=32, cuda=cuda)
        said["image_quality"] = {
            **measured.pop("protocol"), "real_images_are": "cut to squares, resized (bicubic, antialiased)"
        }  # fmt: skip
        found |= measured
    return found, said


def _real_image(path: Path, size: int) -> Tensor:
    """uint8 (3, size, size): the middle square of an image file."""
    import numpy as np
    from PIL import Image, ImageOps

    picture = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _pictures(
    folder: Path,
    drawn: PromptSampler,
    asked: EvaluationPrompts,
    seed: int,
    before: str | None,
    compute: tuple[torch.device, str, int],
    resolution: int | None,
) -> None:
    """samples/concept.png and samples/near.png: a few images of a few prompts, beside those of ``before``."""
    lists = {"concept": asked.prompts[:PICTURED_PROMPTS], "near": asked.near[:PICTURED_PROMPTS]}
    samplers = {"after" if before else "drawn": drawn}
    if before is not None:
        options = SamplerOptions("ddim", resolution=resolution)
        first = PromptSampler(TextModel.read(before), options, [*lists["concept"], *lists["near"]], *compute)
        samplers = {"before": first, **samplers}
    for name, prompts in lists.items():
        items = _items(prompts, PICTURED_IMAGES, seed)
        sheets = {title: _small(sampler.drawing(prompts)(items)) for title, sampler in samplers.items()}
        (folder / "samples").mkdir(exist_ok=True)
        path = folder / "samples" / f"{name}.png"
        save_side_by_side(path, sheets, items[:, 0], prompts, label_width=PROMPT_WIDTH)


def _small(images: Tensor) -> Tensor:
    """Images in [-1, 1] of uint8 ones, not higher than they are shown."""
    images = images.float() / 127.5 - 1
    if images.shape[2] <= PICTURED_HEIGHT:
        return images
    scale = PICTURED_HEIGHT / images.shape[2]
    return torch.nn.functional.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)


def _config_of(folder: Path) -> dict[str, Any]:
    """The configuration of a run of unlearning on prompts; empty for anything else."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if "options" in found and "task" in found else {}


def _trained_on(folder: Path) -> tuple[str, ...] | None:
    """The forget prompts of a run; None where it does not say them."""
    found = _config_of(folder).get("forget_prompts")
    return tuple(found) if isinstance(found, list) else None


def _add_to_run(folder: Path, result: dict[str, Any]) -> None:
    """Adds what was measured to a run's metrics.json."""
    if _config_of(folder) and (folder / "metrics.json").is_file():
        metrics = json.loads((folder / "metrics.json").read_text())
        write_json(folder / "metrics.json", {**metrics, **result})
