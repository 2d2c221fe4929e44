"""CLIP (arXiv 2103.00020) through transformers: features of images and texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..records import one_line


class ClipModel:
    """A CLIP model and its processor in a folder of transformers (such as openai/clip-vit-large-patch14).

    Parameters
    ----------
    path : str or Path
        The folder. Nothing is downloaded.
    device : torch.device or str
        Where to compute.
    batch_size : int
        Images or texts in a call of the model.

    Raises
    ------
    ValueError
        If the folder is missing or does not have a CLIP model.
    ImportError
        If transformers is not installed.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", batch_size: int = 32) -> None:
        try:
            from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise ImportError(f"CLIP needs transformers ({error}): pip install transformers") from error
        self.path, self.device, self.batch_size = Path(path), torch.device(device), batch_size
        if not (self.path / "config.json").is_file():
            raise ValueError(f"clip is {str(path)!r}, expected the folder of a CLIP model as transformers saves it")
        try:
            self.model = CLIPModel.from_pretrained(self.path, local_files_only=True).to(self.device).eval()
            self.processor = CLIPImageProcessor.from_pretrained(self.path, local_files_only=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:
            # For damaged files transformers raises almost anything.
            raise ValueError(
                f"clip is {str(path)!r}, which does not have a complete CLIP model: {one_line(error)}"
            ) from error

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return self.model.config.projection_dim

    def describe(self) -> dict[str, Any]:
        """Describe, as JSON, everything that determines the features."""
        import transformers

        return {
            "path": str(self.path),
            "image_size": self.model.config.vision_config.image_size,
            "patch_size": self.model.config.vision_config.patch_size,
            "projection_dim": self.width,
            "transformers": transformers.__version__,
        }

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Compute features of uint8 images (N, 3, H, W): float32 (N, width) on the CPU, not normalised."""
        check_images(images)
        parts = []
        for part in images.cpu().split(self.batch_size):
            pixels = self.processor(list(part.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
            parts.append(_features(self.model.get_image_features(pixel_values=pixels.to(self.device))))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Compute features of N texts: float32 (N, width) on the CPU, not normalised. Long texts are truncated."""
        if not texts:
            raise ValueError("texts is empty, expected at least one")
        parts = []
        max_length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            parts.append(_features(self.model.get_text_features(**tokens.to(self.device))))
        return torch.cat(parts)


def check_images(images: Tensor) -> None:
    """Raise TypeError or ValueError unless ``images`` is uint8 (N, 3, H, W) with N >= 1."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images is {getattr(images, 'dtype', type(images).__name__)}, expected uint8")
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (N, 3, H, W) with N >= 1")


def _features(output: Any) -> Tensor:
    # A tensor up to transformers 4, an object since 5.
    return getattr(output, "pooler_output", output).float().cpu()
