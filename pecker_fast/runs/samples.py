"""Samples that are drawn once and cached, so that they can be measured many times."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from ..files import save_tensors, write_json
from ..unlearning.streams import derived_seed

CHUNK = 500


class SampleCache:
    """Samples of one network in a folder that is named by a hash of what determines them, in chunks.

    Parameters
    ----------
    folder : Path
        Of all caches.
    described : dict
        JSON that determines the samples: weights, sampler, seed, labels.
    draw : callable
        From labels and a seed to images (N, C, H, W).
    chunk : int
        Samples that are drawn and saved at a time: an interruption loses at most these.
    """

    def __init__(
        self, folder: Path, described: dict[str, Any], draw: Callable[[Tensor, int], Tensor], chunk: int = CHUNK
    ) -> None:
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.described, self.draw, self.chunk = folder / key, described, draw, chunk

    def samples(self, labels: Tensor, seed: int, progress: bool = True) -> Tensor:
        """The images of all ``chunks``, on the CPU."""
        return torch.cat([images for _, images in self.chunks(labels, seed, progress)])

    def chunks(self, labels: Tensor, seed: int, progress: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield labels and images chunk by chunk; those that are missing are drawn.

        Parameters
        ----------
        labels : Tensor
            Shape (N,) or (N, ...).
        seed : int
            The seed of a chunk is derived from it and the chunk's number.
        progress : bool
            Show a progress bar.

        Yields
        ------
        tuple of Tensor
            n labels, and their images (n, C, H, W) on the CPU, as ``draw`` gives them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "samples.json", self.described)
        parts = labels.split(self.chunk)
        for i, part in enumerate(tqdm(parts, unit="chunk", desc="samples", disable=not progress)):
            path = self.folder / f"chunk-{i:05}.safetensors"
            images = self._read(path, part)
            if images is None:
                images = self.draw(part, derived_seed(seed, "evaluate", i)).cpu().contiguous()
                save_tensors(path, {"images": images, "labels": part.contiguous()})
            yield part, images

    def reader(self, labels: Tensor, seed: int) -> Callable[[int], Tensor]:
        """A function from the number of a sample to its image, which is read alone. Draws what is missing."""
        for _ in self.chunks(labels, seed, False):
            pass

        def read(i: int) -> Tensor:
            with safetensors.safe_open(self.folder / f"chunk-{i // self.chunk:05}.safetensors", "pt") as file:
                return file.get_slice("images")[i % self.chunk]

        return read

    def _read(self, path: Path, labels: Tensor) -> Tensor | None:
        """The images of a chunk; None if its file is missing, damaged or of other labels."""
        try:
            tensors = safetensors.torch.load_file(path)
            return tensors["images"] if torch.equal(tensors["labels"], labels) else None
        except (OSError, KeyError, safetensors.SafetensorError):
            return None
