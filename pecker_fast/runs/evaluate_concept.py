"""``pecker-fast evaluate-concept``: how well a text-to-image model has forgotten a concept, and what it has kept."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
import tyro
from torch import Tensor

from ..data import EvaluationPrompts
from ..diffusion.sld import SAFETY_CONCEPT
from ..environment import environment
from ..files import save_tensors, write_json
from ..metrics import ClipModel, ConceptMeter, Uint8Images, clip_score, image_quality
from ..report import portable, save_side_by_side
from ..unlearning.streams import derived_seed
from .concept_arguments import DetectorArguments, MeasureArguments, image_files
from .options import check_output, device_of, run_config
from .samples import SampleCache
from .text_sampling import PromptSampler, SamplerOptions, read_model

# Images that are drawn, measured and kept at a time.
CHUNK = 100
# Prompts and images of each in a picture; how high an image is shown, and how wide the prompts stand beside it.
PICTURED_PROMPTS, PICTURED_IMAGES, PICTURED_HEIGHT, PROMPT_WIDTH = 8, 3, 128, 190
PICTURED = "pictured.safetensors"


def evaluate_concept(
    model: tyro.conf.Positional[str],
    task: Literal["celebrity", "nudity"] | None = None,
    concept: str | None = None,
    base: str | None = None,
    sampler: Literal["auto", "one_step", "ddim", "sld"] = "auto",
    t_init: int | None = None,
    sld: Literal["weak", "medium", "strong", "max"] = "max",
    before: str | None = None,
    measure: Annotated[MeasureArguments, tyro.conf.arg(name="")] = MeasureArguments(),  # noqa: B008
    detectors: Annotated[DetectorArguments, tyro.conf.arg(name="")] = DetectorArguments(),  # noqa: B008
    device: str | None = None,
    output: str | None = None,
    progress_bar: bool = True,
) -> None:
    """Measures how well a text-to-image model has forgotten a concept, and what it has kept.

    Images are drawn once for a model, sampler, list of prompts and seeds, and kept in evaluation/ beside the result:
    interrupted, the same command goes on. Detectors are the user's: nothing is downloaded.

    Args:
        model: A Stable Diffusion (a folder, or a name on the Hugging Face hub), the folder of a run, or (with --base)
            that of a U-Net.
        task: celebrity or nudity; that of the run by default.
        concept: The celebrity's name; that of the run by default.
        base: Folder of the Stable Diffusion that the other parts come from, where the model is a U-Net alone.
        sampler: one_step; ddim with guidance; sld: that, steered away from a text; auto: in one step for a one-step
            generator, otherwise ddim.
        t_init: Timestep of the one-step sampler; that of the run by default.
        sld: Configuration of SLD.
        before: Model to draw the pictures of "before" with, by ddim; the base by default.
        measure: What is drawn.
        detectors: What it is measured with.
        device: cpu, cuda, cuda:1...; a GPU where there is one by default.
        output: File for the result; evaluation.json in the folder of the model by default, of a model on the hub here.
        progress_bar: Show a progress bar.
    """
    config = run_config(Path(model), "task")
    task, concept = task or config.get("task"), concept or config.get("concept")
    if task is None:
        raise ValueError("task is not given, and the model is not of a run that says it: expected celebrity or nudity")
    asked, count, captions = measure.asked(task, concept, config.get("prompts", {}).get("forget"))
    beside = Path(model) if Path(model).is_dir() else Path()
    target = check_output(output or beside / "evaluation.json")
    place = device_of(device)
    given = detectors.load(task, place)
    named = given.get("celebrities") is not None
    meters = {
        "": ConceptMeter(asked.prompts, count, names=[concept] * len(asked.prompts) if named else (), **given),
        "near_": ConceptMeter(
            asked.near, measure.near_images_per_prompt, names=asked.near_concepts if named else (), **given
        ),
    }
    if meters[""].unknown:
        raise ValueError(f"the celebrity detector does not know {concept!r}")
    options = SamplerOptions(
        sampler=sampler,
        t_init=t_init,
        num_inference_steps=measure.num_inference_steps,
        guidance_scale=measure.guidance_scale,
        sld=sld,
        safety_text=measure.safety_text or (SAFETY_CONCEPT if task == "nudity" else concept),
        resolution=measure.resolution,
    )
    drawing = {"device": place, "dtype": measure.dtype, "batch_size": measure.batch_size}
    drawn = PromptSampler(read_model(model, base), options, [*asked.prompts, *asked.near, *captions], **drawing)
    if not any(given.values()):
        print("pecker-fast: no detector is given: images are drawn and nothing is measured", file=sys.stderr)
    seed, folder = measure.sample_seed, target.parent
    result: dict[str, Any] = {"task": task, "concept": concept, "model": model}
    samples = {}
    for prefix, meter in meters.items():
        cache, items = _cached(drawn, folder, meter, asked if prefix == "" else None, seed)
        for _, images in cache.chunks(items, seed, progress_bar):
            meter.add(images)
        result |= {f"{prefix}{name}": value for name, value in meter.result().items()}
        result[f"{prefix}measured_images"] = len(items)
        samples[prefix] = cache.described
    said: dict[str, Any] = {
        "arguments": {**dataclasses.asdict(measure), **dataclasses.asdict(detectors)},
        "prompts": {"source": asked.source, "count": len(asked.prompts), "images_of_each": count},
        "near": {
            "count": len(asked.near),
            "images_of_each": measure.near_images_per_prompt,
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
        found, said["coco"] = _coco(drawn, folder, captions, measure, given["clip"])
        result |= found
    write_json(target, portable({**result, "protocol": said}))
    _add_to_run(Path(model), result, said)
    first = None
    if before or base:
        settings = dataclasses.replace(options, sampler="ddim")
        first = PromptSampler(read_model(before or base), settings, _pictured(asked), **drawing)
    _pictures(folder, drawn, first, asked, seed)
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


def _coco(
    drawn: PromptSampler, folder: Path, captions: tuple[str, ...], measure: MeasureArguments, clip: ClipModel | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """CLIP score and FID of one image of each caption, and how they were measured."""
    seed = measure.sample_seed
    described = {**drawn.describe(captions), "seed": seed, "chunk": CHUNK}
    # Every caption has noise of its own: they are one sample of what the model draws.
    items = torch.tensor([(i, seed + i) for i in range(len(captions))])
    cache = SampleCache(folder / "evaluation", described, drawn.drawing(captions), CHUNK)
    features = [None if clip is None else clip.images(part) for _, part in cache.chunks(items, seed, False)]
    found: dict[str, Any] = {"coco_images": len(captions)}
    said: dict[str, Any] = {"captions": len(captions), "samples": described}
    if clip is not None:
        found["coco_clip_score"] = clip_score(torch.cat(features), clip.texts(captions))
    if measure.coco_images is not None:
        size = drawn.source.vae_scale_factor * drawn.settings["latent_size"]
        files = image_files(measure.coco_images)
        generated = Uint8Images(cache.reader(items, seed), len(items))
        real = Uint8Images(lambda i: _real_image(files[i], size), len(files))
        cuda = drawn.device.type == "cuda"
        measured = image_quality(generated, real, weights=measure.inception_weights, batch_size=32, cuda=cuda)
        resized = {"real_images_are": "cut to squares, resized (bicubic, antialiased)"}
        said["image_quality"] = {**measured.pop("protocol"), **resized}
        found |= measured
    return found, said


def _real_image(path: Path, size: int) -> Tensor:
    """uint8 (3, size, size): the middle square of an image file."""
    import numpy as np
    from PIL import Image, ImageOps

    picture = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _pictured(asked: EvaluationPrompts) -> list[str]:
    return [*asked.prompts[:PICTURED_PROMPTS], *asked.near[:PICTURED_PROMPTS]]


def _pictures(
    folder: Path, drawn: PromptSampler, first: PromptSampler | None, asked: EvaluationPrompts, seed: int
) -> None:
    """samples/concept.png and samples/near.png: a few images of a few prompts, beside those of ``first``; and the
    images in a file, for pictures of several models."""
    (folder / "samples").mkdir(exist_ok=True)
    kept = {}
    for name, prompts in (("concept", asked.prompts[:PICTURED_PROMPTS]), ("near", asked.near[:PICTURED_PROMPTS])):
        items = _items(prompts, PICTURED_IMAGES, seed)
        kept[name] = _small(drawn.drawing(prompts)(items))
        sheets = {"drawn": kept[name]}
        if first is not None:
            sheets = {"before": _small(first.drawing(prompts)(items)), "after": kept[name]}
        path = folder / "samples" / f"{name}.png"
        save_side_by_side(path, sheets, items[:, 0], prompts, label_width=PROMPT_WIDTH)
    save_tensors(folder / "samples" / PICTURED, kept)


def save_pictures_of_all(folder: Path, runs: dict[str, Path], asked: EvaluationPrompts) -> None:
    """concept.png and near.png in ``folder``: the pictured images of several models, title to the folder of each."""
    kept = {title: safetensors.torch.load_file(run / "samples" / PICTURED) for title, run in runs.items()}
    for name, prompts in (("concept", asked.prompts[:PICTURED_PROMPTS]), ("near", asked.near[:PICTURED_PROMPTS])):
        sheets = {title: images[name] for title, images in kept.items()}
        rows = torch.arange(len(prompts)).repeat_interleave(PICTURED_IMAGES)
        save_side_by_side(folder / f"{name}.png", sheets, rows, prompts, label_width=PROMPT_WIDTH)


def _small(images: Tensor) -> Tensor:
    """Images in [-1, 1] of uint8 ones, not higher than they are shown."""
    images = images.float() / 127.5 - 1
    if images.shape[2] <= PICTURED_HEIGHT:
        return images
    scale = PICTURED_HEIGHT / images.shape[2]
    return torch.nn.functional.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)


def _add_to_run(folder: Path, result: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Adds what was measured, and how, to a run's metrics.json."""
    if run_config(folder, "task") and (folder / "metrics.json").is_file():
        metrics = json.loads((folder / "metrics.json").read_text())
        protocol = {**metrics.get("protocol", {}), "concept": protocol}
        write_json(folder / "metrics.json", {**metrics, **result, "protocol": protocol})
