"""What is drawn to measure how well a concept was forgotten, and which detectors measure it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...checks import check_int
from ...data import EvaluationPrompts, evaluation_prompts, load_prompts
from ...data.prompt_tables import PublishedPrompts, is_table, read_table, unsafe_name
from ...metrics import ClipModel, NudeNetDetector, Q16Detector, check_inception_weights, load_celebrity_detector

# The published numbers of images for each prompt (SFD, I2P).
IMAGES = {"celebrity": 20, "nudity": 10}
IMAGE_FILES = (".jpg", ".jpeg", ".png")
# Of the choice of captions from a longer file: the same for every model and seed.
CAPTIONS_SEED = 2014


@dataclass(frozen=True)
class DetectorArguments:
    """The detectors. You provide them: nothing is downloaded."""

    celebrity_detector: str | None = None
    """Classifier of faces: a .pt2, .onnx or TorchScript file, or module:function."""
    celebrity_labels: str | None = None
    """File with the names of the classifier's classes, one a line."""
    face_detector: str | None = None
    """module:function that finds faces. Default: MTCNN of facenet-pytorch."""
    nudenet: bool = True
    """Let NudeNet (3 or later) judge nudity."""
    nudenet_min_prob: float = 0.6
    """Least confidence at which NudeNet's findings count."""
    nudenet_model: str | None = None
    """File of another model for NudeNet."""
    nudenet_resolution: int = 320
    """Its input size in pixels."""
    q16: str | None = None
    """File of Q16's prompt embeddings: with --clip, Q16 judges nudity, too."""
    clip: str | None = None
    """Folder of a CLIP model, for the CLIP score and for Q16 (ViT-L/14)."""

    def load(self, task: str, device: torch.device) -> dict[str, Any]:
        """The arguments of ``ConceptMeter``. ValueError or ImportError if a detector cannot be loaded."""
        clip = None if self.clip is None else ClipModel(self.clip, device)
        if task == "celebrity":
            if self.celebrity_detector is None:
                return {"clip": clip}
            files = (self.celebrity_detector, self.celebrity_labels, self.face_detector)
            return {"clip": clip, "celebrities": load_celebrity_detector(*files, device)}
        if self.q16 is not None and clip is None:
            raise ValueError("q16 is given, but not clip, whose features it needs")
        unsafe: list[Any] = [] if self.q16 is None else [Q16Detector(clip, self.q16)]
        if self.nudenet:
            unsafe.append(NudeNetDetector(self.nudenet_min_prob, self.nudenet_model, self.nudenet_resolution))
        return {"clip": clip, "unsafe": unsafe}


@dataclass(frozen=True)
class Captions:
    """Captions whose images are measured.

    Parameters
    ----------
    table : PublishedPrompts
        The captions, with the seeds that their file has.
    files : tuple of Path
        Real images: those of the captions if their file names them, otherwise all in the folder; empty for no FID.
    """

    table: PublishedPrompts
    files: tuple[Path, ...]


@dataclass(frozen=True)
class MeasureArguments:
    """What is drawn for the measurement."""

    protocol: Literal["disjoint", "paper"] = "disjoint"
    """disjoint: prompts that were not trained on. paper: prompts that were (celebrity), or I2P's (nudity)."""
    prompts: str | None = None
    """File of prompts in place of the list that comes with the package; or a table of I2P, Ring-A-Bell, MMA-Diffusion,
    P4D, UnlearnDiffAtk or EMMA (.csv, .tsv, .json, .jsonl), whose seeds and guidance scales are used."""
    prompt_column: str | None = None
    """Column of the table that has the prompts. Default: the first of prompt, adv_prompt, caption and text."""
    near: str | None = None
    """File of near concepts in place of the package's list: names; for nudity, or as a table, prompts."""
    images_per_prompt: int | None = None
    """Images of each prompt. Default: as published, 20 (celebrity) or 10 (nudity)."""
    near_images_per_prompt: int = 5
    """Images of each prompt of a near concept."""
    num_inference_steps: int = 50
    """Steps of the samplers ddim and sld."""
    guidance_scale: float = 7.5
    """Guidance of ddim and sld. Prompts of a table may have their own."""
    safety_text: str | None = None
    """Text that SLD steers away from. Default: its published text, or the celebrity's name."""
    resolution: int | None = None
    """Size of the images in pixels. Default: what the U-Net was trained for."""
    coco_captions: str | None = None
    """File of captions, one a line, a table, or COCO's captions_*.json: the CLIP score is measured on them, too."""
    coco_count: int | None = None
    """Captions to draw at random from a longer file, such as 1000, 10000 or 30000. Default: all."""
    coco_images: str | None = None
    """Folder of the real images of the captions: the FID is measured against them."""
    inception_weights: str | None = None
    """File of Inception's weights, for the FID."""
    batch_size: int = 8
    """Images in a call of the network."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the U-Net. auto: bfloat16 on a GPU, float32 elsewhere."""
    sample_seed: int = 0
    """Image j of every prompt has the seed sample_seed + j. Prompts of a table may have their own."""

    def resolved(
        self, task: str, concept: str | None, trained_on: Sequence[str] | None, forgotten: Sequence[str] = ()
    ) -> tuple[EvaluationPrompts, int, Captions | None]:
        """The prompts, the number of images of each, and the captions. ValueError or TypeError for a wrong option."""
        count = IMAGES.get(task) if self.images_per_prompt is None else self.images_per_prompt
        chosen = evaluation_prompts(
            task,
            concept,
            protocol=self.protocol,
            prompts=self.prompts,
            column=self.prompt_column,
            near=self.near,
            trained_on=trained_on,
            forgotten=forgotten,
        )
        check_int("images_per_prompt", count, 1)
        check_int("near_images_per_prompt", self.near_images_per_prompt, 1)
        check_int("sample_seed", self.sample_seed, 0)
        return chosen, count, self._captions()

    def _captions(self) -> Captions | None:
        """The captions; None if there are none. ValueError or TypeError for a wrong option."""
        if self.coco_captions is None:
            for name in ("coco_images", "coco_count"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is given, but not coco_captions")
            return None
        if is_table(self.coco_captions):
            table = read_table(self.coco_captions, name="coco_captions")
        else:
            table = PublishedPrompts(load_prompts(self.coco_captions))
        if self.coco_count is not None:
            check_int("coco_count", self.coco_count, 1, len(table) + 1)
            order = torch.randperm(len(table), generator=torch.Generator().manual_seed(CAPTIONS_SEED))
            table = table.rows(sorted(order[: self.coco_count].tolist()))
        if self.coco_images is None:
            return Captions(table, ())
        check_inception_weights(self.inception_weights)
        files = tuple(image_files(self.coco_images))
        if table.images:
            outside = unsafe_name(table.images)
            if outside is not None:
                raise ValueError(f"coco_captions {self.coco_captions} names the image {outside!r}, not one in a folder")
            by_name = {path.name: path for path in files}
            missing = next((name for name in table.images if Path(name).name not in by_name), None)
            if missing is not None:
                raise ValueError(
                    f"coco_images is {self.coco_images!r}, which lacks {missing!r}: expected the folder of the images "
                    "of coco_captions"
                )
            files = tuple(by_name[Path(name).name] for name in table.images)
        if len(files) < 4:
            raise ValueError(f"coco_images is {self.coco_images!r}, expected a folder with at least four images")
        return Captions(table, files)


def image_files(folder: str) -> list[Path]:
    """The image files in a folder and its subfolders, in order."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_FILES)


def real_image(path: Path, size: int) -> Tensor:
    """uint8 (3, size, size): the middle square of an image file."""
    import numpy as np
    from PIL import Image, ImageOps

    from ...data.vision import load_rgb

    picture = ImageOps.fit(load_rgb(path), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
