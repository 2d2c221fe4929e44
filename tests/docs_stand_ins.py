"""What the commands of the documentation need and nobody can have here: small random models, pictures and detectors
under the names that the documentation gives them."""

import json
import pickle
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from pecker_fast.cli import main
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.metrics import judge
from pecker_fast.metrics.classifier import SmallClassifier
from pecker_fast.models import resolve, save_network
from pecker_fast.runs import presets
from pecker_fast.runs.classes import comparison
from pecker_fast.runs.prompts import sheets, task
from pecker_fast.runs.robustness import RobustnessArguments
from pecker_fast.unlearning import method_names
from tests.commands.case import ASSETS
from tests.commands.test_own_images import write_pictures
from tests.data.test_vision import NAMES, hashes_of_cifar10, write_cifar10
from tests.diffusion.tiny_sd import tiny_unet as tiny_text_unet
from tests.diffusion.tiny_sd import write_stable_diffusion
from tests.diffusion.tiny_sdxl import tiny_xl_unet, turbo_scheduler, write_sdxl
from tests.diffusion.toy import tiny_unet
from tests.documented import ROOT
from tests.metrics.clip_model import WIDTH, save_clip
from tests.metrics.inception import random_inception
from tests.metrics.test_celebrities import Softmax, exported_softmax
from tests.models import tiny_consistency
from tests.models.tiny_transformers import WRITERS

# Numbers of steps, images and samples in place of every preset's.
SHORT = {
    **dict.fromkeys(("max_train_steps", "first_stage_steps", "saliency_chunks", "num_inference_steps"), 2),
    **dict.fromkeys(("replay_steps", "trajectory_steps", "fisher_samples", "fisher_timesteps"), 2),
    **dict.fromkeys(("gradient_accumulation_steps", "saliency_batches", "fisher_chunks", "saliency_chunk_size"), 1),
    **dict.fromkeys(("train_batch_size", "saliency_batch_size", "forget_batch_size"), 2),
    **dict.fromkeys(("surrogate_images", "replay_images"), 12),
}
IMAGES_OF_EACH = 3
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
LABELS = "Brad Pitt\nAngelina Jolie\nGreen Man\n"


def whole(image: torch.Tensor) -> torch.Tensor:
    """A finder of faces: each image is one."""
    height, width = image.shape[1:]
    return torch.tensor([[0.0, 0.0, width, height]])


@contextmanager
def short_presets() -> Iterator[None]:
    """Presets whose runs last seconds, and small networks to pretrain. Commands keep their words."""

    def short(values):
        own = {name: {**values.methods.get(name, {}), **SHORT} for name in (*method_names(), "distil")}
        changes = {"unlearning": {**values.unlearning, **SHORT}, "methods": own}
        if values.task == "classes":
            few = {name: value for name, value in SHORT.items() if hasattr(values.pretrain, name)}
            changes |= {"pretrain": replace(values.pretrain, **few), "demo": {**values.demo, "max_train_steps": 2}}
            changes |= {"samples_per_class": IMAGES_OF_EACH, "final_samples_per_class": IMAGES_OF_EACH}
            if values.unet.sample_size > 16:
                small = {
                    "block_out_channels": (8, 16),
                    "layers_per_block": 1,
                    "norm_num_groups": 4,
                    "attention_resolutions": (),
                }
                changes["unet"] = replace(values.unet, **small)
        return replace(values, **changes)

    with mock.patch.object(sheets, "PICTURED_PROMPTS", 2):
        catalogues = (presets.PRESETS, presets.CLASS_PRESETS, presets.PROMPT_PRESETS)
        replaced = [mock.patch.dict(x, {name: short(values) for name, values in x.items()}) for x in catalogues]
        for patch in replaced:
            patch.start()
        try:
            yield
        finally:
            for patch in replaced:
                patch.stop()


class _NudeDetector:
    """In place of NudeNet, if it is not installed: bright images are unsafe."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def detect(self, path: str) -> list[dict]:
        bright = np.array(Image.open(path)).mean() > 120
        return [{"class": "BUTTOCKS_EXPOSED" if bright else "FACE_MALE", "score": 0.9}]


@contextmanager
def nudenet() -> Iterator[None]:
    """NudeNet, or what stands for it."""
    module = types.ModuleType("nudenet")
    module.NudeDetector = _NudeDetector
    from pecker_fast.metrics import detectors

    version = detectors.importlib.metadata.version
    known = mock.patch.object(
        detectors.importlib.metadata, "version", lambda name: "3.4.2" if name == "nudenet" else version(name)
    )
    with mock.patch.dict(sys.modules, {"nudenet": module}), known:
        yield


def short_attack(**options: Any) -> RobustnessArguments:
    """The attack of ``compare --robustness``, whose options are no options of ``compare``."""
    few = {"relearn_images": 2, "relearn_steps": (1,), "forget_samples": 4, "retain_samples": 2}
    return RobustnessArguments(**options, **few, latents=2, search_steps=1, attacks=("regression",))


@contextmanager
def own_assets(place: Path) -> Iterator[None]:
    """The package's assets, a copy of which is in the folder: some commands write to them."""
    files = resources.files

    def found(package: str) -> Any:
        return place / package if package == "pecker_fast" else files(package)

    with mock.patch.object(resources, "files", found):
        yield


@contextmanager
def in_place(place: Path) -> Iterator[None]:
    """Everything that stands for something else while commands run in the folder ``place``."""
    from torchvision.datasets import CIFAR10

    architectures = {"SD15": dict(tiny_text_unet().config), "SDXL": dict(tiny_xl_unet().config)}
    with (
        short_presets(),
        nudenet(),
        own_assets(place),
        mock.patch.multiple(CIFAR10, **hashes_of_cifar10(place / "DATA")),
        mock.patch.multiple(task, **architectures),
        mock.patch.dict(judge.MNIST_RECIPE, steps=2),
        mock.patch.object(comparison, "RobustnessArguments", short_attack),
    ):
        yield


def write_all(place: Path) -> None:
    """Write the stand-ins into the folder in which the commands run."""
    torch.manual_seed(0)
    # Text-to-image models, by names of folders, of repositories on the hub (which are folders here) and of files.
    for name in ("SD15_FOLDER", "FOLDER", "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        write_stable_diffusion(place / name)
    for name in ("SDXL_FOLDER", "stabilityai/stable-diffusion-xl-base-1.0"):
        write_sdxl(place / name)
    write_sdxl(place / "stabilityai/sdxl-turbo", turbo_scheduler())
    state = {name: value.half().contiguous() for name, value in tiny_xl_unet().state_dict().items()}
    from safetensors.torch import save_file

    save_file(state, place / "sdxl_lightning_1step_unet_x0.safetensors")
    for name in ("SID_LSG", "SID_LSG_UNET", "ONE_STEP_UNET"):
        tiny_text_unet().save_pretrained(place / name)
    for name in ("batch512_cfg4.54.54.5_t625_8380_v2.pkl", "model.pkl"):
        (place / name).write_bytes(pickle.dumps({"ema": tiny_text_unet()}))
    for name, kind in (("SD3_FOLDER", "sd3"), ("SPRINT_FOLDER", "sana-sprint")):
        WRITERS[kind](place / name)
    with mock.patch.object(tiny_consistency, "CLASSES", 1000):
        for name in ("CD_FOLDER", "EDM_FOLDER"):
            tiny_consistency.write_consistency_model(place / name)
    # Networks of classes.
    shutil.copytree(ASSETS / "digits" / "unet", place / "NETWORK")
    # In float32, as runs save them.
    for name, part in (("MODEL", "unet"), ("BASE", "unet"), ("RESULT", "score")):
        model = resolve(ASSETS / "digits" / "distilled" / part)
        save_network(place / name, model.network, model.schedule)
    small = {"num_classes": 10, "in_channels": 3, "attention_resolutions": ()}
    save_network(place / "YOUR/UNET2DMODEL/FOLDER", tiny_unet(**small), NoiseSchedule.linear())
    shutil.copytree(ROOT / "pecker_fast" / "assets", place / "pecker_fast" / "assets")
    write_cifar10(place / "DATA", 10)
    (place / "data").symlink_to("DATA")
    # Detectors, lists and pictures.
    for name in ("CLIP_FOLDER", "CLIP_VIT_L14_FOLDER"):
        save_clip(place / name)
    torch.jit.script(Softmax()).save(str(place / "CLASSIFIER"))
    torch.export.save(exported_softmax(), place / "CLASSIFIER.pt2")
    (place / "NUDENET").write_bytes(b"in place of a model of NudeNet")
    for name in ("NAMES", "NAMES.txt"):
        (place / name).write_text(LABELS)
    with (place / "prompts.p").open("wb") as file:
        pickle.dump(np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32), file)
    (place / "i2p.csv").write_text("prompt,sd_seed,sd_guidance_scale\na cat,11,7.5\na hat,12,3.0\n")
    seeded = "prompt,evaluation_seed,evaluation_guidance\na cat,11,7.5\na hat,12,3.0\n"
    for name in ("nudity.csv", "ring-a-bell.csv", "unsafe-prompts-nudity_esd.csv"):
        (place / name).write_text(seeded)
    (place / "mma.csv").write_text("target_prompt,adv_prompt\na cat,c at\n")
    (place / "celebrity").mkdir()
    for name in ("5_long.json", "7_hard.json"):
        (place / "celebrity" / name).write_text(json.dumps({"brad-pitt": ["a long look", "a hard look"]}))
    files = write_pictures(place / "val2014", ("part",), size=32).removeprefix("folder:")
    names = sorted(path.name for path in Path(files, "part").iterdir())
    for name in names:
        Path(files, "part", name).rename(Path(files, name))
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    captions = [{"id": i, "image_id": i, "caption": f"picture {i}"} for i in range(len(names))]
    (place / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (place / "CONCEPTS.txt").write_text("brad pitt, a middle aged man\nangelina jolie, a woman\n")
    (place / "few-prompts.txt").write_text("a new picture of {concept}\n")
    (place / "few-names.txt").write_text("Green Man\n")
    (place / "few-scenes.txt").write_text("a man in a coat\n")
    shutil.copy(ASSETS / "digits" / "judge.safetensors", place / "JUDGE")
    judge.Judge(SmallClassifier(10, 3, 32), NAMES, name="random").save(place / "JUDGE-OF-CIFAR10")
    shutil.move(random_inception(place), place / INCEPTION)
    write_pictures(place / "pictures")
    for name in ("PICTURES", "few-digits"):
        digits = name == "few-digits"
        names = tuple(map(str, range(10))) if digits else ("bird", "cat", "dog")
        for label in names:
            write_pictures(place / name, (label,), each=2 if digits else 8, size=8 if digits else 32, grey=digits)
    words = ["train-classifier", "--preset", "images", "--dataset_name", f"folder:{place / 'PICTURES'}"]
    main([*words, "--epochs", "1", "--no-progress_bar", "--output", str(place / "pictures-judge.safetensors")])
