"""What a preset is: the values that a data set, or a published task on Stable Diffusion, determines."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...diffusion import UNetConfig
from ...training.loop import LoopOptions
from ...training.pretrain import PretrainOptions


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Values for runs of unlearning.

    Parameters
    ----------
    unlearning : dict
        Options of score forgetting by name; a method takes those it has.
    methods : dict
        Name of a method to the values for it alone: its options, and fields of the options of the loop and the memory.
    loop : LoopOptions
        How often a run logs, evaluates and saves.
    one_step : bool
        Whether its pretrained networks draw in one step. Then runs start from them, and nothing is distilled first.
    """

    task: ClassVar[Literal["classes", "prompts"]]

    unlearning: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    loop: LoopOptions = field(default_factory=LoopOptions)
    one_step: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassPreset(Preset):
    """A data set with classes. Methods that train from scratch take their options from ``pretrain``.

    Parameters
    ----------
    dataset : str or None
        Name for ``load_dataset``; None if the user has to name one.
    unet : UNetConfig
        Architecture that ``pretrain`` makes.
    pretrain : PretrainOptions
        How it is trained.
    pretrain_loop : LoopOptions
        How often a pretraining run logs, evaluates and saves.
    pretrain_in_bf16 : bool
        Whether mixed_precision "auto" of pretraining is bf16 on processors that multiply in it.
    guidance_scale, num_inference_steps : float and int
        Of samples of the pretrained network: 1 is no guidance; steps of DDIM.
    judge, network : str or None
        Names of the classifier and the pretrained network that come with the package.
    demo : dict
        Options of the demo's runs that train, by name.
    samples_per_class : int
        Images of each class in an evaluation during a run.
    final_samples_per_class : int or None
        In an evaluation by itself, as published. None: the same.
    reference_split : str
        Split of the real images that generated ones are measured against, as published.
    forget_class, cover_class : int or None
        The published request. None: there is none, so that classes to forget have to be named, and the usual cover is
        random.
    imagenet : bool
        Whether the classes of its networks are ImageNet's, whose names they then have.
    """

    task: ClassVar = "classes"

    dataset: str | None
    unet: UNetConfig
    pretrain: PretrainOptions
    pretrain_loop: LoopOptions = field(default_factory=LoopOptions)
    pretrain_in_bf16: bool = False
    guidance_scale: float = 1.0
    num_inference_steps: int = 50
    judge: str | None = None
    network: str | None = None
    demo: dict[str, Any] = field(default_factory=dict)
    samples_per_class: int = 100
    final_samples_per_class: int | None = None
    reference_split: str = "all"
    forget_class: int | None = 0
    cover_class: int | None = 1
    imagenet: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptPreset(Preset):
    """A task on Stable Diffusion.

    Parameters
    ----------
    subject : {"celebrity", "nudity"}
        A concept with a name and a cover; or subjects with keywords, with the bare subject as cover and the keywords as
        negative text.
    concept, cover : str or None
        The published request, if the task has names.
    xl : bool
        Whether the values are for Stable Diffusion XL.
    flow : bool
        Whether they are for transformers with flow matching.
    """

    task: ClassVar = "prompts"

    subject: Literal["celebrity", "nudity"]
    concept: str | None = None
    cover: str | None = None
    xl: bool = False
    flow: bool = False
