"""The one catalogue of presets: all values that a data set or a published task determines."""

from dataclasses import asdict, fields, replace
from typing import Any

from ...names import nearest
from ...training.loop import LoopOptions
from ...unlearning import Method
from ...unlearning.denoising import DenoisingOptions
from ...unlearning.options import ScoreForgettingOptions
from .classes import CLASS_PRESETS as DATA_PRESETS
from .images import IMAGES
from .kinds import ClassPreset, Preset, PromptPreset
from .prompts import PROMPT_PRESETS

__all__ = [
    "PRESETS",
    "ClassPreset",
    "Preset",
    "PromptPreset",
    "class_preset",
    "method_loop",
    "method_options",
    "method_values",
    "preset",
    "prompt_preset",
]

CLASS_PRESETS: dict[str, ClassPreset] = {**DATA_PRESETS, "images": IMAGES}
PRESETS: dict[str, Preset] = {**CLASS_PRESETS, **PROMPT_PRESETS}


def preset(name: str) -> Preset:
    """Return the preset called ``name``.

    Raises
    ------
    ValueError
        If there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return PRESETS[name]


def class_preset(name: str) -> ClassPreset:
    """Return the preset of a data set with classes called ``name``. Raises as ``prompt_preset``."""
    if name not in CLASS_PRESETS:
        hint = f" ({name} is for text-to-image models)" if name in PROMPT_PRESETS else ""
        raise ValueError(
            f"preset is {name!r}, expected one of {', '.join(CLASS_PRESETS)}{hint or nearest(name, CLASS_PRESETS)}"
        )
    return CLASS_PRESETS[name]


def prompt_preset(name: str) -> PromptPreset:
    """Return the preset of a text-to-image model called ``name``.

    Raises
    ------
    ValueError
        If there is none, or it is for class-conditional networks.
    """
    if name not in PROMPT_PRESETS:
        hint = f" ({name} is for class-conditional networks)" if name in CLASS_PRESETS else ""
        raise ValueError(
            f"preset is {name!r}, expected one of {', '.join(PROMPT_PRESETS)}{hint or nearest(name, PROMPT_PRESETS)}"
        )
    return PROMPT_PRESETS[name]


def method_options(name: str, method: type[Method]) -> Any:
    """The options of a method on the preset called ``name``: ``method.Options``, on prompts ``method.PromptOptions``.

    Later values replace earlier ones: the defaults of ``Options``, the preset's for methods of this kind, the method's
    own ``defaults``, the preset's for this method.
    """
    values = preset(name)
    pretrain = asdict(values.pretrain) if isinstance(values, ClassPreset) else {}
    kinds = ((ScoreForgettingOptions, values.unlearning), (DenoisingOptions, pretrain))
    shared = next((options for kind, options in kinds if issubclass(method.Options, kind)), {})
    chosen = {**shared, **method.defaults, **values.methods.get(method.name, {})}
    kind = (method.PromptOptions if values.task == "prompts" else None) or method.Options
    return kind(**_fields_of(kind, chosen))


def method_loop(name: str, method: type[Method]) -> LoopOptions:
    """How often a run of a method on the preset called ``name`` logs, evaluates and saves."""
    return replace(preset(name).loop, **method_values(name, method, LoopOptions))


def method_values(name: str, method: type[Method], kind: type) -> dict[str, Any]:
    """The values of a preset for this method alone that are fields of the dataclass ``kind``."""
    return _fields_of(kind, preset(name).methods.get(method.name, {}))


def _fields_of(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {key: value for key, value in values.items() if key in names}
