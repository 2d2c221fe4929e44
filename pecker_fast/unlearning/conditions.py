"""What to forget, and the labels that a run draws from it.

A label is the integer that a network takes as its class label: a class, or a prompt's place in a table of prompts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion import num_classes
from .streams import Streams

COVER_RANDOM = "random"


@dataclass(frozen=True, eq=False)
class Conditions:
    """Labels that a run draws from, on its device.

    Parameters
    ----------
    retained : Tensor
        Shape (R,), int64. Labels to preserve.
    forgotten : Tensor
        Shape (F,), int64. Labels to forget.
    covers : Tensor
        int64. Labels that the teacher is given in place of the forgotten ones. If ``paired``, shape (F,), one for each
        of ``forgotten``; otherwise one is drawn for each sample.
    everything : Tensor
        int64. All labels of the network, for stages in which nothing is forgotten.
    paired : bool
        Whether each forgotten label has its own cover.
    negative : int, optional
        Label of a negative text, which can replace the null label for forgotten samples.
    """

    retained: Tensor
    forgotten: Tensor
    covers: Tensor
    everything: Tensor
    paired: bool = False
    negative: int | None = None

    def draw_retained(self, streams: Streams, count: int, *, everything: bool = False) -> Tensor:
        """Draw ``count`` retained labels uniformly, int64; of all labels with ``everything``."""
        return streams.choose("retain labels", count, self.everything if everything else self.retained)

    def draw_forgotten(self, streams: Streams, count: int) -> tuple[Tensor, Tensor]:
        """Draw ``count`` forgotten labels uniformly, int64, and the cover of each."""
        if not self.paired:
            forgotten = streams.choose("forget labels", count, self.forgotten)
            return forgotten, streams.choose("cover labels", count, self.covers)
        pairs = torch.stack([self.forgotten, self.covers], dim=1)
        return streams.choose("forget labels", count, pairs).unbind(1)


@dataclass(frozen=True)
class ForgetRequest:
    """Which classes to forget, and which class replaces them.

    Parameters
    ----------
    num_classes : int
        Classes of the network, the null label not counted.
    forget_classes : tuple of int
        Classes to forget: at least one, but not all.
    cover_class : int, optional
        A retained class that is drawn in place of the forgotten ones. None draws one uniformly from the retained
        classes for each sample.

    Raises
    ------
    TypeError, ValueError
        If a class is not one of the network's, or a list of classes is empty, repeats one or covers them all.
    """

    num_classes: int
    forget_classes: tuple[int, ...]
    cover_class: int | None

    def __post_init__(self) -> None:
        check_int("num_classes", self.num_classes, 2)
        if not self.forget_classes:
            raise ValueError("forget_classes is empty, expected at least one class")
        for label in self.forget_classes:
            check_int("forget_classes", label, 0, self.num_classes)
        if len(set(self.forget_classes)) < len(self.forget_classes):
            raise ValueError(f"forget_classes is {list(self.forget_classes)}, expected each class once")
        if len(self.forget_classes) >= self.num_classes:
            raise ValueError(f"forget_classes is all {self.num_classes} classes, expected at least one retained class")
        if self.cover_class is not None:
            check_int("cover_class", self.cover_class, 0, self.num_classes)
            if self.cover_class in self.forget_classes:
                raise ValueError(f"cover_class is {self.cover_class}, a class to forget; expected a retained one")

    @classmethod
    def of(cls, network: nn.Module, forget_classes: Iterable[int], cover_class: int | str | None) -> "ForgetRequest":
        """Build the request for a network.

        Parameters
        ----------
        network : nn.Module
            A class-conditional network.
        forget_classes : iterable of int
            Classes to forget.
        cover_class : int, str or None
            The cover class; "random" or None draws one for each sample.

        Raises
        ------
        ValueError
            If the network has no such class.
        """
        if cover_class == COVER_RANDOM:
            cover_class = None
        return cls(num_classes(network), tuple(forget_classes), cover_class)

    @property
    def retained_classes(self) -> tuple[int, ...]:
        """The classes that are not forgotten, in ascending order."""
        return tuple(label for label in range(self.num_classes) if label not in self.forget_classes)

    def conditions(self, device: torch.device | str) -> Conditions:
        """The labels that a run draws from, on ``device``."""
        covers = self.retained_classes if self.cover_class is None else (self.cover_class,)
        labels = (self.retained_classes, self.forget_classes, covers, tuple(range(self.num_classes)))
        return Conditions(*(torch.tensor(values, dtype=torch.int64, device=device) for values in labels))


@dataclass(frozen=True)
class RetainRequest(ForgetRequest):
    """No class is forgotten: what a network is distilled with.

    Parameters
    ----------
    num_classes : int
        Classes of the network, the null label not counted.

    Raises
    ------
    TypeError, ValueError
        If there are fewer than two classes, or one is to be forgotten.
    """

    forget_classes: tuple[int, ...] = ()
    cover_class: int | None = None

    def __post_init__(self) -> None:
        check_int("num_classes", self.num_classes, 2)
        if self.forget_classes or self.cover_class is not None:
            raise ValueError(f"forget_classes is {list(self.forget_classes)}, expected none: all classes are retained")


@dataclass(frozen=True)
class PromptRequest:
    """Which prompts to forget, which prompts replace them, and which prompts to preserve.

    Parameters
    ----------
    retain : tuple of str
        Prompts to preserve, at least one.
    forget : tuple of str
        Prompts to forget, at least one. Repeated prompts are drawn more often.
    cover : tuple of str
        The prompt that the teacher is given in place of each prompt of ``forget``.
    negative : str, optional
        Text that can replace the empty prompt for forgotten samples.
    further : tuple of str
        Prompts that can be drawn but are not trained on.

    Attributes
    ----------
    prompts : tuple of str
        All distinct texts in the order of their labels. The first, "", is the null label.

    Raises
    ------
    TypeError
        If a prompt is not a string.
    ValueError
        If a list is empty, ``cover`` and ``forget`` differ in length, or a prompt is its own cover.
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
        """Labels of some of ``prompts``. ValueError for any other text."""
        for text in texts:
            if text not in self._label:
                raise ValueError(f"{text!r} is not among the prompts of this request")
        return [self._label[text] for text in texts]

    def conditions(self, device: torch.device | str) -> Conditions:
        """The labels that a run draws from, on ``device``."""

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
