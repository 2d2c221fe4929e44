"""Classes by name: what the command line and Python call them, and where their names come from."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ...diffusion.unet import CLASS_NAMES
from ...models import resolve_config
from ..presets import class_preset

# Names in an error message.
SHOWN = 12
# How a class is called whose name is the number of another one.
BY_LABEL, BY_NAME = "label:", "name:"
RANDOM = "random"


def listed(names: Sequence[str]) -> str:
    """Names for a message, cut short if there are many."""
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def label_of(value: int | str, names: Sequence[str], option: str) -> int:
    """The label of a class.

    Parameters
    ----------
    value : int or str
        The label, or a text: a name, a number, "label:<number>" or "name:<name>".
    names : sequence of str
        Names of the classes, in the order of their labels; empty if they have none but their numbers.
    option : str
        Name of the option, for messages.

    Returns
    -------
    int
        Not checked against the number of classes if it was a number.

    Raises
    ------
    ValueError
        If there is no such class, or the text is the number of one class and the name of another.
    """
    if not isinstance(value, str):
        return value
    text = unicodedata.normalize("NFC", value.strip())
    labels = {unicodedata.normalize("NFC", name): label for label, name in enumerate(names)}
    number = text.removeprefix(BY_LABEL)
    if text not in labels and text != number and number.isdecimal():
        return int(number)
    named = labels.get(text, labels.get(text.removeprefix(BY_NAME)))
    if named is None and text.isdecimal():
        return int(text)
    if named is None:
        known = f"one of the classes {listed(names)}, or a number from 0" if names else "the number of a class"
        raise ValueError(f"{option} is {value!r}, expected {known}")
    if text.isdecimal() and int(text) != named and int(text) < len(names):
        raise ValueError(
            f"{option} is {value!r}, the name of the class with the number {named} and the number of the class "
            f"{names[int(text)]!r}: expected {BY_NAME}{text} or {BY_LABEL}{text}"
        )
    return named


def named(label: int, names: Sequence[str]) -> str:
    """A class in words: its name, or its number if it has none."""
    return names[label] if names else str(label)


def labels_of(values: Sequence[int | str], names: Sequence[str], option: str = "forget_classes") -> tuple[int, ...]:
    """The labels of several classes. Raises as ``label_of``; ``TypeError`` if ``values`` is one text."""
    if isinstance(values, str):
        raise TypeError(f"{option} is {values!r}, expected several classes: [{values!r}]")
    return tuple(label_of(value, names, option) for value in values)


def cover_of(value: str | int | None, names: Sequence[str] = ()) -> int | None:
    """The label of a cover class; None for "random".

    Raises
    ------
    ValueError
        If it is no class and not "random".
    """
    if value == RANDOM or value is None:
        return None
    try:
        return label_of(value, names, "cover_class")
    except ValueError as error:
        raise ValueError(f'{error}, or "random"') from error


def names_in_network(path: str | None) -> tuple[str, ...]:
    """The names of classes in the configuration of a network in a folder; empty if it has none."""
    if path is None or not Path(path).is_dir():
        return ()
    try:
        names = resolve_config(path).get(CLASS_NAMES)
    except ValueError:
        return ()
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if known else ()


def published_names(preset_name: str, path: str | None) -> tuple[str, ...]:
    """The names of the classes of a preset's published networks, by torchvision's list for ImageNet.

    Empty if there are none, torchvision is missing, or the network in the folder ``path`` has other classes.
    """
    if not class_preset(preset_name).imagenet or path is None or not Path(path).is_dir():
        return ()
    try:
        from torchvision.models import ResNet50_Weights

        rows = resolve_config(path).get("num_class_embeds")
    except (ImportError, ValueError):
        return ()
    names = tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return names if len(names) == rows else ()


def proper_names(names: Sequence[str]) -> tuple[str, ...]:
    """``names``, or none if they are the numbers of the classes."""
    return () if list(names) == [str(label) for label in range(len(names))] else tuple(names)
