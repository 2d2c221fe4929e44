"""What the training loop knows of a method: ordered phases, each a number of iterations on one objective."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..diffusion import Sampler, TextConditioned
from ..mask import SaliencyMask
from ..models import save_network, save_text_network
from ..sharding import local
from .setting import Setting


class Phase(ABC):
    """A stretch of a run.

    Everything random in an iteration derives from the setting's seed, the phase and the iteration's number, so that a
    run that is resumed needs the state of no generator.

    Attributes
    ----------
    name: unique within the method.
    iterations: steps that make the phase complete.
    images_per_iteration: generated or real images that an iteration is counted as (the batch, as the papers count).
    is_preparation: it leaves the network as it is, so that there is nothing to evaluate.
    """

    name: str
    iterations: int
    images_per_iteration: int
    is_preparation: ClassVar[bool] = False

    @abstractmethod
    def start(self, previous: "Phase | None") -> None:
        """Begins the phase, taking over from the one before it. Not called when a run is resumed within the phase."""

    @abstractmethod
    def step(self, iteration: int) -> dict[str, Tensor]:
        """Iteration number ``iteration``, from 0. Returns its losses, scalars on the device, without waiting for it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What else is worth a line in the log at present, as JSON. May wait for the device."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to go on: tensors, numbers and strings in dicts and lists. Where
        networks are sharded, every process of the run calls it, and the main one's is complete."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state. Raises ValueError where it is another network's."""

    @abstractmethod
    def trained_parameters(self) -> Iterable[Tensor]:
        """Every parameter that the phase trains."""

    @abstractmethod
    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Within it the network to keep, with its averaged weights where there are any, in eval mode and not sharded.
        Where networks are sharded, every process of the run enters it."""

    def last_mask(self) -> SaliencyMask | None:
        """The mask of the last step, over the parameters of the network that ``averaged`` gives; None for phases
        without one. Where networks are sharded, every process of the run calls it."""
        return None

    def is_finite(self) -> bool:
        """Whether all trained parameters are finite, of sharded ones this process's parts. Waits for the device."""
        with torch.no_grad():
            parts = [local(p.detach()) for p in self.trained_parameters()]
            norms = torch._foreach_norm([part for part in parts if part.numel()], float("inf"))
            return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


class Method(ABC):
    """An unlearning method.

    Parameters
    ----------
    setting: teacher, schedule, what to forget, seed, device.
    options: an instance of ``Options``.

    Attributes
    ----------
    name: on the command line and in every file; only classes that set it are methods.
    Options: a frozen dataclass of the method's hyper-parameters, with help in its docstring.
    defaults: fields of Options that the method sets whatever the preset says.
    forgets_prompts: whether the method takes text-conditional networks, and prompts to forget.
    phases: in order.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    defaults: ClassVar[dict[str, Any]] = {}
    forgets_prompts: ClassVar[bool] = False

    def __init__(self, setting: Setting, options: Any) -> None:
        if setting.fsdp:
            self.check_sharding(options, setting.world.size, setting.compile, setting.score_lora_rank)
        self.setting = setting
        self.options = options
        self.phases: list[Phase] = []

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        """Whether these options need ``Setting.training_images``; where they do not, a checkpoint is all."""
        return False

    @classmethod
    def check_sharding(cls, options: Any, processes: int, torch_compile: bool, score_lora_rank: int) -> None:
        """Raises ValueError where the processes of a run cannot share out this method's networks (``Setting.fsdp``)."""
        raise ValueError(f"fsdp is set, but {cls.name} shards no networks: it is for pecker, pecker+ and sfd")

    @property
    @abstractmethod
    def sampler(self) -> Sampler:
        """How the networks that the method trains are meant to be sampled, under ``setting.autocast()``."""

    def save(self, folder: Path, network: nn.Module) -> None:
        """Writes ``network``, as ``Phase.averaged`` gives it, into ``folder/unet`` in diffusers' layout."""
        if isinstance(network, TextConditioned):
            save_text_network(folder / "unet", network)
            return
        save_network(folder / "unet", network, self.setting.schedule)
