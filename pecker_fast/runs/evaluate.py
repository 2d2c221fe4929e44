"""``pecker-fast evaluate``: measures a run or a network, with samples that are drawn once and kept."""

import contextlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..data import LabelledImages
from ..diffusion import (
    null_label,
    num_classes,
)
from ..environment import environment
from ..files import write_json
from ..hashing import weights_hash
from ..metrics import Evaluator, Judge, Uint8Images, check_inception_weights, image_quality, load_judge, to_uint8
from ..models import resolve
from ..report import portable
from ..training.presets import preset
from ..unlearning import ForgetRequest
from .audit import update_metrics
from .evaluation import protocol_of, real_split
from .options import (
    DataArguments,
    OptionalPresetName,
    RunOrModel,
    check_output,
    device_of,
    run_config,
    run_or_model,
)
from .samples import CHUNK, SampleCache
from .unlearn import UnlearnArguments, load_images


def evaluate(
    run: RunOrModel = None,
    pretrained_model_name_or_path: str | None = None,
    preset_name: OptionalPresetName = None,
    forget_classes: tuple[int, ...] | None = None,
    cover_class: str | None = None,
    samples_per_class: int | None = None,
    sampler: Literal["auto", "one_step", "ddim", "ddpm"] = "auto",
    t_init: int | None = None,
    num_inference_steps: int | None = None,
    judge: str | None = None,
    inception_weights: str | None = None,
    dataset_name: str | None = None,
    data_root: str | None = None,
    batch_size: int = 256,
    device: str | None = None,
    seed: int = 0,
    output: str | None = None,
    features_dir: str | None = None,
    progress_bar: bool = True,
) -> None:
    """Measures forgetting and image quality of a run, or of any network, and writes evaluation.json.

    Samples are drawn once for a network, sampler and seed, and kept in evaluation/ beside it, and so are Inception's
    features: interrupted, the same command goes on, and further measurements draw nothing.

    Args:
        run: Folder of a run or of a network, or a checkpoint; the network that comes with the preset by default.
        pretrained_model_name_or_path: The same, by the name that it has elsewhere.
        preset_name: digits, cifar10 or stl10; that of the run by default, otherwise digits.
        forget_classes: Classes that are to be forgotten; those of the run by default, otherwise none.
        cover_class: What is to be drawn in their place, or "random"; that of the run by default.
        samples_per_class: Images of each class; as published by default (cifar10 5000, stl10 1300), digits 100.
        sampler: auto: as a run of unlearning or a pipeline draws (in one step at its t_init, or by the run's sampler),
            DDIM otherwise.
        t_init: Timestep of the one-step sampler; that of the run by default.
        num_inference_steps: Of ddim and ddpm; those of the run, or 50, by default.
        judge: File of the classifier; the one that comes with the preset by default.
        inception_weights: File of Inception's weights, for FID, sFID, IS, KID, precision and recall. Without it the
            judge's features serve, and nothing is called by these names.
        dataset_name: digits, cifar10, stl10 or folder:<path>; the preset's by default.
        data_root: Folder with the files of cifar10 or stl10.
        batch_size: Images at a time.
        device: cpu, cuda, cuda:1...; a GPU where there is one by default.
        seed: Of the samples.
        output: File for the result; evaluation.json in the folder by default.
        features_dir: Folder for Inception's features, which several runs can share; evaluation/features beside the
            result by default.
        progress_bar: Show a progress bar.
    """
    path = run_or_model(run, pretrained_model_name_or_path)
    folder = None if path is None else Path(path)
    config = run_config(folder, "forget_classes")
    preset_name = preset_name or config.get("preset", "digits")
    found = preset(preset_name)
    model = resolve(path, shipped=found.network)
    network = model.network
    classes = num_classes(network)
    forgotten = tuple(config.get("forget_classes", ()) if forget_classes is None else forget_classes)
    cover = config.get("cover_class") if cover_class is None else UnlearnArguments.cover_of(cover_class)
    if forgotten:
        ForgetRequest(classes, forgotten, cover)
    if inception_weights is not None:
        check_inception_weights(inception_weights)
    count = samples_per_class or found.final_samples_per_class or found.samples_per_class
    if count < 2:
        raise ValueError(f"samples_per_class is {count}, expected at least 2")
    judge_file = judge or config.get("judge")
    if judge_file is None and found.judge is None:
        raise ValueError(f"judge is not given, and none comes with the preset {preset_name}: a classifier is needed")
    judging = Judge.load(judge_file) if judge_file else load_judge(found.judge)
    if judging.num_classes != classes:
        raise ValueError(f"the judge knows {judging.num_classes} classes, the network has {classes} classes")
    data = DataArguments(dataset_name or config.get("dataset_name"), data_root or config.get("data_root"))
    real = load_images(data, preset_name, found.reference_split, network.config["sample_size"])
    place = device_of(device)
    judging.model.to(place)
    evaluator = Evaluator(real, judging, forgotten, cover if forgotten else None)
    drawn_by = model.sampler(sampler, t_init, num_inference_steps, batch_size)
    target = check_output(output or _result_of(folder))
    labels = torch.arange(classes).repeat_interleave(count)
    described = {
        "pretrained_sha256": weights_hash(network),
        **drawn_by.describe(),
        "samples_per_class": count,
        "num_classes": classes,
        "null_label": null_label(network),
        "seed": seed,
        "chunk": CHUNK,
    }
    network, schedule = network.to(place), model.schedule.to(place)

    def draw(labels: Tensor, seed: int) -> Tensor:
        return drawn_by.draw(network, schedule, labels, seed)

    cache = SampleCache(target.parent / "evaluation", described, draw, CHUNK)
    images = cache.samples(labels, seed, progress_bar)
    result: dict[str, Any] = {"pretrained": model.source, **evaluator(images, labels)}
    retained = torch.isin(labels, torch.tensor(forgotten, dtype=torch.int64)).logical_not()
    result["frechet_real_split"] = real_split(evaluator, int(retained.sum()))
    reference = {"dataset": data.dataset_name or found.dataset, "split": found.reference_split}
    protocol: dict[str, Any] = {
        **protocol_of(evaluator, described, reference, int(retained.sum())),
        "environment": environment(),
    }
    kept = real.of_classes([label for label in range(classes) if label not in forgotten])
    options = {
        "batch_size": min(batch_size, 64),
        "verbose": progress_bar,
        "cache": Path(features_dir or cache.folder.parent / "features"),
    }
    measured = _quality(images[retained], kept, judging, inception_weights, place, options)
    if measured is not None:
        protocol["image_quality"] = measured.pop("protocol")
        result |= measured
    protocol, result = portable(protocol), portable(result)
    write_json(target, {**result, "protocol": protocol})
    _add_to_run(folder, result, protocol)
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:28}{value:10.4g}")
    print(f"result: {target}")


def _quality(
    images: Tensor, kept: LabelledImages, judge: Judge, weights: str | None, place: torch.device, options: dict
) -> dict[str, Any] | None:
    """``image_quality`` of images of the retained classes, in Inception's features where there are its weights,
    otherwise in the judge's. None where torch-fidelity is missing and nobody asked for what needs it."""
    extractor = {"weights": weights}
    if weights is None:
        if find_spec("torch_fidelity") is None:
            print(
                "pecker-fast: no precision and recall: torch-fidelity is not installed (pip install "
                "'pecker-fast[demo]')",
                file=sys.stderr,
            )
            return None
        from ..metrics.extractors import register_judge

        extractor = {"feature_extractor": register_judge(judge)}
    # torch-fidelity computes on the current GPU.
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        return image_quality(
            Uint8Images(to_uint8(images)),
            Uint8Images(lambda i: to_uint8(kept.batch(torch.tensor([i])))[0], len(kept)),
            cuda=place.type == "cuda",
            **extractor,
            **options,
        )


def _result_of(folder: Path | None) -> Path:
    # A name on the hub is no place here.
    if folder is None or not folder.exists():
        return Path("evaluation.json")
    return (folder if folder.is_dir() else folder.parent) / "evaluation.json"


def _add_to_run(folder: Path | None, result: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Adds to a run's metrics.json what it has not measured itself, such as the FID, and how that was measured; its
    report says it too."""
    if folder is None or not run_config(folder, "forget_classes") or not (folder / "metrics.json").is_file():
        return
    metrics = json.loads((folder / "metrics.json").read_text())
    before = metrics.get("protocol", {})
    # What an earlier evaluation added is this one's to replace.
    added = before.get("evaluation", {}).get("measured", [])
    metrics = {name: value for name, value in metrics.items() if name not in added}
    new = {name: value for name, value in result.items() if metrics.get(name) is None}
    said = {name: value for name, value in protocol.items() if name != "environment"}
    said |= {"packages": protocol["environment"]["packages"], "measured": list(new)}
    update_metrics(folder, {**metrics, **new, "protocol": {**before, "evaluation": said}})
