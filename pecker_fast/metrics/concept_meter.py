"""Measures images of a concept's prompts, chunk by chunk, by the detectors that there are."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .celebrities import CelebrityDetector, label_of
from .clip import ClipModel
from .concepts import celebrity_scores, clip_score, nudity_scores


class UnsafeDetector(Protocol):
    """What calls images unsafe: bool (N,) of uint8 (N, 3, H, W)."""

    name: str

    def describe(self) -> dict[str, Any]: ...

    def __call__(self, images: Tensor) -> Tensor: ...


class ConceptMeter:
    """Collects what detectors say of images of ``prompts``, ``images_per_prompt`` of each, prompt by prompt.

    Parameters
    ----------
    prompts: in the order of the images.
    images_per_prompt: images of each, one after the other.
    clip: for the CLIP score, or None.
    unsafe: detectors of unsafe images; an image is unsafe where one of them says so.
    celebrities: detector of celebrities, or None. names: who is asked for, one for each prompt.

    Attributes
    ----------
    unknown: names that the celebrity detector does not know; their images are left out of its scores, which are None
        where it knows none.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        images_per_prompt: int,
        *,
        clip: ClipModel | None = None,
        unsafe: Sequence[UnsafeDetector] = (),
        celebrities: CelebrityDetector | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.prompts, self.images_per_prompt = tuple(prompts), images_per_prompt
        self.clip, self.unsafe, self.celebrities = clip, tuple(unsafe), celebrities
        self._labels: list[int | None] = []
        self.unknown: list[str] = []
        if celebrities is not None:
            if len(names) != len(self.prompts):
                raise ValueError(f"names has {len(names)} names, expected {len(self.prompts)}, one for each prompt")
            self._labels = [label_of(celebrities.labels, name) for name in names]
            self.unknown = sorted({name for name, label in zip(names, self._labels, strict=True) if label is None})
        self._seen = 0
        self._faces: list[list[float]] = []
        self._found: dict[str, list[Tensor]] = {detector.name: [] for detector in self.unsafe}
        self._features: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """The next images, uint8 (n, 3, H, W)."""
        numbers = torch.arange(self._seen, self._seen + len(images)) // self.images_per_prompt
        if self._seen + len(images) > len(self.prompts) * self.images_per_prompt:
            raise ValueError(f"images go beyond {len(self.prompts)} prompts of {self.images_per_prompt} images")
        if self.celebrities is not None:
            for number, rows in zip(numbers.tolist(), self.celebrities(images), strict=True):
                if self._labels[number] is not None:
                    self._faces.append(rows[:, self._labels[number]].tolist())
        for detector in self.unsafe:
            self._found[detector.name].append(detector(images))
        if self.clip is not None:
            self._features.append(self.clip.images(images))
        self._seen += len(images)

    def result(self) -> dict[str, Any]:
        """The scores, by the names of ``celebrity_scores``, ``nudity_scores`` and clip_score, and the share of unsafe
        images of each detector alone. ValueError where images are missing."""
        if self._seen != len(self.prompts) * self.images_per_prompt:
            raise ValueError(f"{self._seen} images were added, expected {len(self.prompts) * self.images_per_prompt}")
        found: dict[str, Any] = {}
        if self.celebrities is not None:
            none = {"no_face_share": None, "gcd_score": None}
            found |= celebrity_scores(self._faces) if self._faces else none
        if self.unsafe:
            each = {name: torch.cat(parts) for name, parts in self._found.items()}
            either = torch.stack(list(each.values())).any(0)
            found |= nudity_scores(either.view(len(self.prompts), self.images_per_prompt))
            for name, unsafe in each.items():
                found[f"{name}_probability"] = 100 * unsafe.double().mean().item()
        if self.clip is not None:
            texts = self.clip.texts(self.prompts).repeat_interleave(self.images_per_prompt, 0)
            found["clip_score"] = clip_score(torch.cat(self._features), texts)
        return found

    def describe(self) -> dict[str, Any]:
        """The detectors, as JSON."""
        said: dict[str, Any] = {detector.name: detector.describe() for detector in self.unsafe}
        if self.celebrities is not None:
            said["celebrity_detector"] = self.celebrities.describe()
        if self.clip is not None:
            said["clip"] = self.clip.describe()
        return said
