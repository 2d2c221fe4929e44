"""Relabel: the condition of the cover class in place of the forgotten one's. Nothing is trained.

The yardstick for everything that is: it takes no time, images of retained classes stay bit for bit the same, and what
is drawn for the forgotten class is of the cover class. Nothing of the class is gone from the other weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion import NUM_TRAIN_TIMESTEPS, Sampler
from .conditions import ForgetRequest
from .many_step import SamplingOptions, check_guidance
from .protocol import Method, Phase
from .setting import Setting
from .streams import Streams


@dataclass(frozen=True)
class RelabelOptions(SamplingOptions):
    """How images are drawn."""

    t_init: int | None = None
    """Timestep of the one-step generator that is edited, which distilled sets. None: the pretrained network, which
    draws in many steps."""

    #: There are no averaged weights.
    ema_decay: ClassVar[None] = None

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        """Check all options. ValueError or TypeError, naming the option, if one is out of range."""
        self.check_sampling(num_train_timesteps)
        if self.t_init is not None:
            check_int("t_init", self.t_init, 0, num_train_timesteps)


class RelabelPhase(Phase):
    """One iteration that copies rows of the class embedding.

    Parameters
    ----------
    setting : Setting
        Of the method.
    network : nn.Module
        Changed in place.
    """

    name = "relabel"
    iterations = 1
    images_per_iteration = 0

    def __init__(self, setting: Setting, network: nn.Module) -> None:
        self.setting, self.network = setting, network
        self.table = network.class_embedding.weight

    def start(self, previous: Phase | None) -> None:
        pass

    @torch.no_grad()
    def step(self, iteration: int) -> dict[str, Tensor]:
        request, compute = self.setting.problem.request, self.setting.compute
        # A random cover is one class for each forgotten one: an embedding has one row for it.
        covers = request.conditions(compute.device).covers
        streams = Streams(compute.device, compute.seed, self.name)
        rows = streams.choose("cover labels", len(request.forget_classes), covers)
        self.table[list(request.forget_classes)] = self.table[rows]
        return {}

    def describe(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["table"].shape != self.table.shape:
            raise ValueError("the state is of another network: class_embedding differs")
        with torch.no_grad():
            self.table.copy_(state["table"])

    def trained_parameters(self) -> Iterable[Tensor]:
        return [self.table]

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        yield self.network.eval()


class Relabel(Method):
    """The forgotten classes' rows of the class embedding become copies of the cover class's."""

    name = "relabel"
    Options = RelabelOptions

    def __init__(self, setting: Setting, options: RelabelOptions) -> None:
        super().__init__(setting, options)
        problem = setting.problem
        options.check(problem.schedule.num_train_timesteps)
        if not isinstance(problem.request, ForgetRequest):
            raise ValueError(f"{self.name} forgets classes of a class-conditional network, not prompts")
        generator = problem.initial_generator
        if (generator is None) != (options.t_init is None):
            raise ValueError(
                f"t_init is {options.t_init}, but "
                + ("there is no one-step generator: expected none" if generator is None else "the generator needs one")
                + " (distilled sets both)"
            )
        check_guidance(problem.teacher, "eval_guidance_scale", options.eval_guidance_scale)
        self.network = setting.trainable(problem.teacher if generator is None else generator)
        self.network.requires_grad_(False)
        self.network.class_embedding.requires_grad_(True)
        self.phases.append(RelabelPhase(setting, self.network))

    @property
    def sampler(self) -> Sampler:
        o = self.options
        return Sampler("one_step", t_init=o.t_init) if o.t_init is not None else o.sampler()
