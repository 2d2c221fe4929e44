"""What a run draws labels from: classes or prompts. A label is an integer that the network takes as class label."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .streams import Streams


@dataclass(frozen=True, eq=False)
class Conditions:
    """Labels of a run, on its device.

    Parameters
    ----------
    retained: int64 (R,), of what is to stay.
    forgotten: int64 (F,), of what is to be forgotten.
    covers: int64, of what the teacher is asked about in its place: with ``paired`` (F,), one for each of ``forgotten``;
        otherwise one is drawn for each sample.
    everything: int64, of all that the network knows; for stages in which nothing is forgotten.
    negative: label that may stand for "no condition" where something is to be forgotten (a negative text), or None.
    """

    retained: Tensor
    forgotten: Tensor
    covers: Tensor
    everything: Tensor
    paired: bool = False
    negative: int | None = None

    def draw_retained(self, streams: Streams, count: int, *, everything: bool = False) -> Tensor:
        """``count`` labels of what is to stay, int64, uniformly."""
        return streams.choose("retain labels", count, self.everything if everything else self.retained)

    def draw_forgotten(self, streams: Streams, count: int) -> tuple[Tensor, Tensor]:
        """``count`` labels of what is to be forgotten, int64, uniformly, and the teacher's in their place."""
        if not self.paired:
            forgotten = streams.choose("forget labels", count, self.forgotten)
            return forgotten, streams.choose("cover labels", count, self.covers)
        pairs = torch.stack([self.forgotten, self.covers], dim=1)
        return streams.choose("forget labels", count, pairs).unbind(1)


@dataclass(frozen=True)
class PromptRequest:
    """Which prompts to forget, what is to be drawn in their place, and which are to stay.

    Parameters
    ----------
    retain: prompts of what is to stay, at least one.
    forget: prompts of what is to be forgotten, at least one; repeated ones are drawn more often.
    cover: the prompt that the teacher is asked about in place of each.
    negative: text that may stand for the empty prompt where something is to be forgotten, or None.
    further: prompts that are not trained on, but may be drawn.

    Attributes
    ----------
    prompts: all different texts in the order of their labels; the first, "", is the null label.

    Raises TypeError for texts that are none, ValueError for empty lists and lists of other lengths.
    """

    retain: tuple[str, ...]
    forget: tuple[str, ...]
    cover: tuple[str, ...]
    negative: str | None = None
    further: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("retain", "forget", "cover", "further"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(text, str) for text in value):
                raise TypeError(f"{name} is {value!r:.80}, expected a sequence of prompts")
            if not value and name != "further":
                raise ValueError(f"{name} is empty, expected at least one prompt")
            object.__setattr__(self, name, tuple(value))
        if len(self.cover) != len(self.forget):
            raise ValueError(
                f"cover has {len(self.cover)} prompts, expected {len(self.forget)}, one for each prompt to forget"
            )
        same = next((text for text, cover in zip(self.forget, self.cover, strict=True) if text == cover), None)
        if same is not None:
            raise ValueError(f"the cover prompt of {same!r} is the same text: nothing would be forgotten")
        if self.negative is not None and not isinstance(self.negative, str):
            raise TypeError(f"negative is {self.negative!r}, expected a text or None")
        texts = ["", *self.retain, *self.forget, *self.cover, *self.further]
        texts += [] if self.negative is None else [self.negative]
        object.__setattr__(self, "prompts", tuple(dict.fromkeys(texts)))
        object.__setattr__(self, "_label", {text: label for label, text in enumerate(self.prompts)})

    def labels(self, texts: Sequence[str]) -> list[int]:
        """Labels of texts among ``prompts``. ValueError for another text."""
        for text in texts:
            if text not in self._label:
                raise ValueError(f"{text!r} is not among the prompts of this request")
        return [self._label[text] for text in texts]

    def conditions(self, device: torch.device | str) -> Conditions:
        """The labels, on ``device``; without forgetting, prompts to forget are drawn like those to stay."""

        def on_device(texts: Sequence[str]) -> Tensor:
            return torch.tensor(self.labels(texts), device=device)

        return Conditions(
            on_device(self.retain),
            on_device(self.forget),
            on_device(self.cover),
            on_device((*self.retain, *self.forget)),
            paired=True,
            negative=None if self.negative is None else self.labels([self.negative])[0],
        )
