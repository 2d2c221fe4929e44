"""What runs differ in: a run forgets classes of a class-conditional network, or prompts of a text-to-image model.

``Task`` is all that ``unlearn`` knows of that; ``classes.task.ClassTask`` and ``prompts.task.PromptTask`` implement it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..parallel import World
from ..training.loop import Progress
from ..unlearning import Method, Setting, method_class
from .arguments import ComputeArguments, UnlearnArguments, with_options
from .presets import preset

# Keys of config.json that make two runs the same one, whichever task they are of; how often a log was written is none.
SAME = ("method", "preset", "seed", "options", "pretrained_model_name_or_path", "mixed_precision")
SAME += ("initial_generator", "initial_score", "distilled")


class Task(ABC):
    """The request of a run, its networks, and how the result is measured, pictured and saved.

    The static part knows options only. An instance belongs to one run: making it reads the weights, and ``unlearn``
    calls the methods in the order in which they stand here.

    Parameters
    ----------
    args : UnlearnArguments
        Options of the run.
    compute : ComputeArguments
        Those of ``args``, resolved.
    world : World
        The processes of the run.

    Attributes
    ----------
    source : str
        Where the pretrained network came from, for metrics.json.
    setting : Setting
        What the method is given.
    hashes : dict
        sha256 of the weights and files that the run depends on, by the key in config.json.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong. Nothing has been written then but encoded prompts.
    """

    same: ClassVar[tuple[str, ...]] = SAME
    #: Options beside the method's that ``compare --set`` takes: names of groups of ``UnlearnArguments``, or of options.
    settable: ClassVar[tuple[str, ...]] = ("options",)
    #: The subcommand that makes such a run.
    command: ClassVar[str] = "unlearn"

    args: UnlearnArguments
    source: str
    setting: Setting
    hashes: dict[str, str]

    # Options alone: no weights are read.

    @staticmethod
    @abstractmethod
    def defaults(preset_name: str, method: str) -> UnlearnArguments:
        """The options of a method on a preset. ValueError if there is no preset or method of these names."""

    @staticmethod
    @abstractmethod
    def describe(args: UnlearnArguments) -> dict[str, Any]:
        """The configuration as JSON, for config.json. ValueError if it makes no sense."""

    @staticmethod
    def settled(args: UnlearnArguments) -> UnlearnArguments:
        """The options with what the files that they name determine. ValueError if options contradict it.

        Classes: what the run of the pretrained network recorded, and numbers for names of classes. Prompts: how a given
        one-step generator draws. Reads config.json of a run, and nothing else but headers of files.
        """
        return args

    @staticmethod
    @abstractmethod
    def check(args: UnlearnArguments) -> None:
        """Check the options without reading weights. ValueError or TypeError if one is wrong."""

    @classmethod
    @abstractmethod
    def rehearse(cls, args: UnlearnArguments, compute: ComputeArguments) -> list[str]:
        """Check all that a run checks before it trains, and write nothing.

        Returns
        -------
        list of str
            What a run needs and ``args`` do not give, so that it could not be checked.

        Raises
        ------
        ValueError, TypeError, FileNotFoundError
            If a run would raise it.
        """

    @staticmethod
    @abstractmethod
    def estimate(args: UnlearnArguments) -> str | None:
        """An estimate of the memory that the run would take, to read; None if there is none."""

    # One run.

    @abstractmethod
    def __init__(self, args: UnlearnArguments, compute: ComputeArguments, world: World) -> None: ...

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON that says which run this is: the checkpoints of another one are refused."""

    @abstractmethod
    def prepare(self, method: Method) -> None:
        """Make what measures and pictures the networks of ``method``. Called on the main process."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What config.json says beside the options."""

    @abstractmethod
    def draw_before(self, before: Tensor | None) -> Tensor | None:
        """Draw samples of the pretrained network and return them, if another run can use them: as ``before``."""

    @property
    @abstractmethod
    def evaluates(self) -> bool:
        """Whether the run is to be evaluated while it trains."""

    @abstractmethod
    def evaluate(self, network: nn.Module, step: int) -> dict[str, Any] | None:
        """Measure or picture a network of the run; the record is a line of evaluation.jsonl."""

    @abstractmethod
    def export(self, network: nn.Module, folder: Path) -> None:
        """Write a network of the run into the folder of a checkpoint."""

    def result(self, network: nn.Module) -> nn.Module:
        """The network that is measured and saved at the end."""
        return network

    @abstractmethod
    def finish(self, network: nn.Module, progress: Progress) -> dict[str, Any]:
        """Save the final network into the run's folder, draw the pictures, and return what was measured."""

    @abstractmethod
    def start(self) -> nn.Module:
        """The network whose weights the run started from, as they were read."""


def task_class(preset_name: str, *, forgets: bool = True) -> type[Task]:
    """The task of a preset: to forget, or to distil. ValueError if there is no such preset."""
    # Imported only if needed: each brings libraries that take a while.
    if preset(preset_name).task == "classes":
        from .classes.distil import ClassDistillation
        from .classes.task import ClassTask

        return ClassTask if forgets else ClassDistillation
    from .prompts.distil import PromptDistillation
    from .prompts.task import PromptTask

    return PromptTask if forgets else PromptDistillation


def task_of(args: UnlearnArguments) -> type[Task]:
    """The task of a run."""
    return task_class(args.preset, forgets=method_class(args.method).forgets)


def unlearn_arguments(preset_name: str, method: str, values: Mapping[str, Any] | None = None) -> UnlearnArguments:
    """The options of a run on a preset by a method, with ``values`` (option to value) in place of the defaults.

    Raises
    ------
    ValueError
        If there is no preset or method of these names, or the method forgets nothing.
    TypeError
        If there is no such option.
    """
    if not method_class(method).forgets:
        raise ValueError(f"method is {method!r}, which forgets nothing: pecker-fast {method} is its command")
    return with_options(task_class(preset_name).defaults(preset_name, method), values or {})
