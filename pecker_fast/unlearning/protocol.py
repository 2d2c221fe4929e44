"""What the training loop knows of a method: ordered phases, each a number of iterations on one objective."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..diffusion import Sampler
from ..mask import SaliencyMask
from ..optim import MaskedAdam
from ..sharding import local
from .setting import Setting


class Phase(ABC):
    """A stretch of a run.

    Everything random in an iteration derives from the seed, the phase and the iteration's number, so a resumed run
    needs no generator state.

    Attributes
    ----------
    name : str
        Unique within the method.
    iterations : int
        Number of iterations that complete the phase.
    images_per_iteration : int
        Generated or real images that an iteration counts as: the batch, as the papers count.
    is_preparation : bool
        Whether the phase leaves the network unchanged, so that there is nothing to evaluate.
    """

    name: str
    iterations: int
    images_per_iteration: int
    is_preparation: ClassVar[bool] = False

    @abstractmethod
    def start(self, previous: "Phase | None") -> None:
        """Begin the phase with the result of the previous one. Not called if a run resumes within the phase."""

    @abstractmethod
    def step(self, iteration: int) -> dict[str, Tensor]:
        """Run one iteration.

        Parameters
        ----------
        iteration : int
            Its number within the phase, from 0.

        Returns
        -------
        dict of str to Tensor
            Losses by name: scalars on the device, without waiting for it.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Current values for the log beside the losses, as JSON. May wait for the device."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State to resume from: tensors, numbers and strings in dicts and lists.

        If networks are sharded, every process of the run calls this, and the main process has the complete state.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state. ValueError if the state is another network's."""

    @abstractmethod
    def trained_parameters(self) -> Iterable[Tensor]:
        """All parameters that the phase trains."""

    @abstractmethod
    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Context that yields the resulting network: with averaged weights if there are any, in eval mode, not sharded.

        If networks are sharded, every process of the run enters it.
        """

    def last_mask(self) -> SaliencyMask | None:
        """The last step's mask over the parameters of the network of ``averaged``; None for phases without one.

        If networks are sharded, every process of the run calls this.
        """
        return None

    def is_finite(self) -> bool:
        """Whether all trained parameters are finite; of sharded ones, this process's parts. Waits for the device."""
        with torch.no_grad():
            parts = [local(p.detach()) for p in self.trained_parameters()]
            norms = torch._foreach_norm([part for part in parts if part.numel()], float("inf"))
            return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


@dataclass(frozen=True)
class TrainedNetwork:
    """A network that a phase trains, for an estimate of memory.

    Parameters
    ----------
    network : nn.Module
        The network.
    optimizer : MaskedAdam
        Its optimizer.
    step : {"plain", "masked", "joint", "alternate"}
        How the optimizer is called: without a mask; with a mask for the whole step; with a second, masked gradient;
        or a masked step and then a plain one.
    density : float
        Share of salient entries in the masks.
    masks : int
        Number of masks that are kept of the network.
    packed : int
        Tensors beside the optimizer's state that have an entry for each entry of the mask, in the parameters' dtype:
        packed gradients, entries of networks that share weights.
    """

    network: nn.Module
    optimizer: MaskedAdam
    step: Literal["plain", "masked", "joint", "alternate"] = "plain"
    density: float = 1.0
    masks: int = 0
    packed: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """What an estimate of memory needs to know of a method's last phase.

    Parameters
    ----------
    networks : sequence of TrainedNetwork
        The networks that are trained.
    rehearse : callable
        ``rehearse(note)`` computes the gradients of an iteration, takes no step and leaves no gradient behind. It calls
        ``note(name)`` when the part ``name`` of the iteration is complete, and ``note(None)`` if what came since the
        last call belongs to no part.
    first_parts : mapping of str to int
        Parts of the first iteration alone, which come before a network's first step, with its position among
        ``networks``: neither it nor later networks have masks and state then.
    """

    networks: Sequence[TrainedNetwork]
    rehearse: Callable[[Callable[[str | None], None]], None]
    first_parts: Mapping[str, int] = field(default_factory=dict)


class Method(ABC):
    """An unlearning method.

    Parameters
    ----------
    setting : Setting
        Problem, compute and placement.
    options : object
        An instance of ``Options``.

    Attributes
    ----------
    name : str
        Name on the command line and in all files. Only classes that set it are methods.
    Options : type
        Frozen dataclass of the method's hyper-parameters, with help in its docstrings.
    PromptOptions : type or None
        Hyper-parameters on prompts, a subclass of ``Options``. None: ``Options``.
    defaults : dict
        Values of Options that the method sets whatever the preset says.
    forgets : bool
        Whether the method forgets anything. Only such methods are offered by name.
    needs_distilled : bool
        Whether the method starts from a distilled one-step generator and its score network. Runs that are given none
        distil the pretrained network first.
    forgets_prompts : bool
        Whether the method takes text-conditional networks, and prompts to forget.
    shards : bool
        Whether its networks can be shared among processes.
    shards_without : tuple of str
        Options that cannot be set then.
    trains_adapters : bool
        Whether it trains a score network, which can have low-rank adapters.
    trains_low_precision : bool
        Whether it trains weights in bfloat16 or float16.
    shares_weights : bool
        Whether its networks can share one copy of the weights with the teacher.
    reads_tokens : bool
        Whether it needs ``Problem.prompt_tokens`` of prompts.
    phases : list of Phase
        In order.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    PromptOptions: ClassVar[type | None] = None
    defaults: ClassVar[dict[str, Any]] = {}
    forgets: ClassVar[bool] = True
    needs_distilled: ClassVar[bool] = False
    forgets_prompts: ClassVar[bool] = False
    shards: ClassVar[bool] = False
    shards_without: ClassVar[tuple[str, ...]] = ()
    trains_adapters: ClassVar[bool] = False
    trains_low_precision: ClassVar[bool] = False
    shares_weights: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False

    def __init__(self, setting: Setting, options: Any) -> None:
        compute = setting.compute
        setting.placement.check_method(type(self), options, processes=compute.world.size, compile=compute.compile)
        self.setting = setting
        self.options = options
        self.phases: list[Phase] = []

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        """Whether the method needs ``Problem.training_images`` with these options; otherwise the network is all."""
        return False

    @classmethod
    def reads_forget_images(cls, options: Any) -> bool:
        """Whether the method uses ``Problem.forget_images`` with these options."""
        return getattr(options, "saliency_samples", None) == "data"

    @classmethod
    def rehearsal_options(cls, options: Any, processes: int) -> Any:
        """Options of an iteration that takes as much memory as those of a run, with less to compute.

        Parameters
        ----------
        options : object
            The run's options.
        processes : int
            Number of processes that share its batches.

        Returns
        -------
        object
            Options for one process: a process's share of the batches, in as few micro-batches as possible.

        Raises
        ------
        ValueError
            If the method has no ``memory_plan``, or the processes cannot share the batches equally.
        """
        raise ValueError(f"the memory of method {cls.name!r} cannot be estimated: it has no memory plan")

    def memory_plan(self) -> MemoryPlan:
        """What an estimate of memory needs. Methods with ``rehearsal_options`` have one."""
        raise NotImplementedError

    @property
    @abstractmethod
    def sampler(self) -> Sampler:
        """How the method's networks are meant to be sampled, under ``compute.autocast()``."""
