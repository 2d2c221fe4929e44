"""Samples that are drawn once and kept, so that they can be measured many times."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from ..files import save_tensors, write_json
from ..unlearning.streams import derived_seed

CHUNK = 500


class SampleCache:
    """Samples of one network, drawn once: in a folder whose name says of what, chunk by chunk.

    Parameters
    ----------
    folder: of the caches.
    described: JSON that settles the samples: weights, sampler, seed, labels.
    draw: from labels and a seed to images (N, C, H, W).
    chunk: samples that are drawn and kept at a time: what an interruption loses at most.
    """

    def __init__(
        self, folder: Path, described: dict[str, Any], draw: Callable[[Tensor, int], Tensor], chunk: int = CHUNK
    ) -> None:
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.described, self.draw, self.chunk = folder / key, described, draw, chunk

    def samples(self, labels: Tensor, seed: int, progress: bool = True) -> Tensor:
        """All of ``chunks``, on the CPU."""
        return torch.cat([images for _, images in self.chunks(labels, seed, progress)])

    def chunks(self, labels: Tensor, seed: int, progress: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels and images (n, C, H, W) on the CPU, as ``draw`` gives them, chunk by chunk in the order of ``labels``,
        (N,) or (N, ...). The seed of a chunk is settled by ``seed`` and its number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "samples.json", self.described)
        parts = labels.split(self.chunk)
        for i, part in enumerate(tqdm(parts, unit="chunk", desc="samples", disable=not progress)):
            path = self.folder / f"chunk-{i:05}.safetensors"
            found = self._read(path, part)
            if found is None:
                found = self.draw(part, derived_seed(seed, "evaluate", i)).cpu().contiguous()
                save_tensors(path, {"images": found, "labels": part.contiguous()})
            yield part, found

    def reader(self, labels: Tensor, seed: int) -> Callable[[int], Tensor]:
        """A function from a number of a sample to its image, which holds one chunk in memory. Draws what is missing."""
        for _ in self.chunks(labels, seed, False):
            pass

        @functools.lru_cache(1)
        def chunk(i: int) -> Tensor:
            return safetensors.torch.load_file(self.folder / f"chunk-{i:05}.safetensors")["images"]

        return lambda i: chunk(i // self.chunk)[i % self.chunk]

    def _read(self, path: Path, labels: Tensor) -> Tensor | None:
        """A chunk that is there and whole, or None."""
        try:
            found = safetensors.torch.load_file(path)
            return found["images"] if torch.equal(found["labels"], labels) else None
        except (OSError, KeyError, safetensors.SafetensorError):
            return None
