"""What is drawn to measure how well a concept was forgotten, and which detectors measure it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...checks import check_int
from ...data import EvaluationPrompts, evaluation_prompts, load_prompts
from ...metrics import ClipModel, NudeNetDetector, Q16Detector, check_inception_weights, load_celebrity_detector

# The published numbers of images for each prompt (SFD, I2P).
IMAGES = {"celebrity": 20, "nudity": 10}
IMAGE_FILES = (".jpg", ".jpeg", ".png")


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
class MeasureArguments:
    """What is drawn for the measurement."""

    protocol: Literal["disjoint", "paper"] = "disjoint"
    """disjoint: prompts that were not trained on. paper: prompts that were (celebrity), or I2P's (nudity)."""
    prompts: str | None = None
    """File of prompts in place of the list that comes with the package, or I2P's table (.csv)."""
    near: str | None = None
    """File of near concepts in place of the list that comes with the package: names, or prompts (nudity)."""
    images_per_prompt: int | None = None
    """Images of each prompt. Default: as published, 20 (celebrity) or 10 (nudity)."""
    near_images_per_prompt: int = 5
    """Images of each prompt of a near concept."""
    num_inference_steps: int = 50
    """Steps of the samplers ddim and sld."""
    guidance_scale: float = 7.5
    """Guidance of ddim and sld. I2P's prompts have their own."""
    safety_text: str | None = None
    """Text that SLD steers away from. Default: its published text, or the celebrity's name."""
    resolution: int | None = None
    """Size of the images in pixels. Default: what the U-Net was trained for."""
    coco_captions: str | None = None
    """File of captions, one a line: the CLIP score is measured on them, too."""
    coco_images: str | None = None
    """Folder of the real images of the captions: the FID is measured against them."""
    inception_weights: str | None = None
    """File of Inception's weights, for the FID."""
    batch_size: int = 8
    """Images in a call of the network."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the U-Net. auto: bfloat16 on a GPU, float32 elsewhere."""
    sample_seed: int = 0
    """Image j of every prompt has the seed sample_seed + j. I2P's prompts have their own."""

    def resolved(
        self, task: str, concept: str | None, trained_on: Sequence[str] | None, forgotten: Sequence[str] = ()
    ) -> tuple[EvaluationPrompts, int, tuple[str, ...]]:
        """The prompts, the number of images of each, and the captions. ValueError or TypeError for a wrong option."""
        count = IMAGES.get(task) if self.images_per_prompt is None else self.images_per_prompt
        chosen = evaluation_prompts(
            task,
            concept,
            protocol=self.protocol,
            prompts=self.prompts,
            near=self.near,
            trained_on=trained_on,
            forgotten=forgotten,
        )
        check_int("images_per_prompt", count, 1)
        check_int("near_images_per_prompt", self.near_images_per_prompt, 1)
        check_int("sample_seed", self.sample_seed, 0)
        captions = () if self.coco_captions is None else load_prompts(self.coco_captions)
        if self.coco_images is not None:
            if not captions:
                raise ValueError("coco_images is given, but not coco_captions")
            check_inception_weights(self.inception_weights)
            if len(image_files(self.coco_images)) < 4:
                raise ValueError(f"coco_images is {self.coco_images!r}, expected a folder with at least four images")
        return chosen, count, captions


def image_files(folder: str) -> list[Path]:
    """The image files in a folder and its subfolders, in order."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_FILES)
