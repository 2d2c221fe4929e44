"""CLIP (arXiv 2103.00020) through transformers: features of images and of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class ClipModel:
    """A CLIP model in a folder as transformers saves it (such as openai/clip-vit-large-patch14), with its processor.

    Parameters
    ----------
    path: the folder. Nothing is downloaded.
    device: where to compute.
    batch_size: images or texts at a time.

    Raises ValueError where the folder is not there or holds no CLIP model; ImportError where transformers is missing.
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
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"clip is {str(path)!r}, which does not hold a whole CLIP model: {error}") from error

    @property
    def width(self) -> int:
        """Entries of a feature."""
        return self.model.config.projection_dim

    def describe(self) -> dict[str, Any]:
        """What settles the features, as JSON."""
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
        """Features float32 (N, width) on the CPU, not normalised, of uint8 images (N, 3, H, W)."""
        check_images(images)
        parts = []
        for part in images.cpu().split(self.batch_size):
            pixels = self.processor(list(part.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
            parts.append(_features(self.model.get_image_features(pixel_values=pixels.to(self.device))))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features float32 (N, width) on the CPU, not normalised; what is longer than CLIP reads is cut off."""
        if not texts:
            raise ValueError("texts is empty, expected at least one")
        parts = []
        longest = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            parts.append(_features(self.model.get_text_features(**tokens.to(self.device))))
        return torch.cat(parts)


def check_images(images: Tensor) -> None:
    """uint8 (N, 3, H, W) with N >= 1."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images is {getattr(images, 'dtype', type(images).__name__)}, expected uint8")
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (N, 3, H, W) with N >= 1")


def _features(found: Any) -> Tensor:
    # A tensor until transformers 4, an output object since 5.
    return getattr(found, "pooler_output", found).float().cpu()
