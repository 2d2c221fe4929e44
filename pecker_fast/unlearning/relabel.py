"""Relabel: the condition of the cover in place of the forgotten one's. Nothing is trained.

The yardstick for everything that is: it takes no time, and what is drawn for the forgotten condition is the cover.
Nothing that the network knows is gone from the other weights.

* Classes: the forgotten classes' rows of the class embedding become copies of the cover class's. Images of retained
  classes stay bit for bit the same.
* Prompts: the keys and values of the cross attention are edited in closed form (UCE, arXiv 2308.14761), so that the
  concept's text has those of the cover's. The prompts to keep are preserved as well as the equation allows.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion import NUM_TRAIN_TIMESTEPS, Sampler, TextConditioned
from ..diffusion.networks import unwrap
from .closed_form import ClosedFormOptions, edit_matrix, last_token, own_token
from .conditions import ForgetRequest, PromptRequest
from .many_step import SamplingOptions, check_guidance
from .protocol import Method, Phase
from .setting import Problem, Setting
from .streams import Streams
from .trained import is_trained

# Prompts whose text vectors are in memory in float64 at a time.
CHUNK = 256


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


@dataclass(frozen=True)
class PromptRelabelOptions(RelabelOptions, ClosedFormOptions):
    """How images are drawn, and how the cross attention is edited."""

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        self.check_edit()


def cover_rows(request: ForgetRequest, seed: int, device: torch.device) -> Tensor:
    """The class whose row each forgotten class gets, int64. A random cover is one class for each forgotten one."""
    covers = request.conditions(device).covers
    return Streams(device, seed, "relabel").choose("cover labels", len(request.forget_classes), covers)


@torch.no_grad()
def copy_cover(network: nn.Module, request: ForgetRequest, seed: int) -> Tensor:
    """Relabel the forgotten classes of a class-conditional network in place.

    Parameters
    ----------
    network : nn.Module
        Its class embedding is changed.
    request : ForgetRequest
        Which classes.
    seed : int
        Of a random cover.

    Returns
    -------
    Tensor
        The forgotten classes' rows as they were, in the request's order.
    """
    table, forgotten = unwrap(network).class_embedding.weight, list(request.forget_classes)
    rows = table[forgotten].clone()
    table[forgotten] = table[cover_rows(request, seed, table.device)]
    return rows


@contextmanager
def relabelling(network: nn.Module, request: ForgetRequest, seed: int) -> Iterator[None]:
    """Context in which a class-conditional network's forgotten classes are relabelled; the rows come back after it."""
    rows = copy_cover(network, request, seed)
    try:
        yield
    finally:
        with torch.no_grad():
            unwrap(network).class_embedding.weight[list(request.forget_classes)] = rows


def relabelled(network: nn.Module, request: ForgetRequest, seed: int) -> nn.Module:
    """A copy of a class-conditional network whose forgotten classes are relabelled; ``seed``: of a random cover."""
    network = copy.deepcopy(unwrap(network))
    copy_cover(network, request, seed)
    return network


class EditPhase(Phase):
    """One iteration that edits some parameters of a network in place.

    Parameters
    ----------
    network : nn.Module
        Changed in place.
    edited : mapping of str to Tensor
        The parameters, by their key in the state.
    """

    name = "relabel"
    iterations = 1
    images_per_iteration = 0

    def __init__(self, network: nn.Module, edited: Mapping[str, Tensor]) -> None:
        self.network, self.edited = network, dict(edited)
        self.network.requires_grad_(False)
        for param in self.edited.values():
            param.requires_grad_(True)
        self.record: dict[str, Any] = {}

    @abstractmethod
    def edit(self) -> dict[str, Any]:
        """Edit the parameters, and return figures for the log."""

    def start(self, previous: Phase | None) -> None:
        pass

    @torch.no_grad()
    def step(self, iteration: int) -> dict[str, Tensor]:
        self.record = self.edit()
        return {}

    def describe(self) -> dict[str, Any]:
        return dict(self.record)

    def state_dict(self) -> dict[str, Any]:
        record = {"record": self.record} if self.record else {}
        return {**{key: param.detach() for key, param in self.edited.items()}, **record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, param in self.edited.items():
            if key not in state or state[key].shape != param.shape:
                raise ValueError(f"the state is of another network: {key} differs")
        with torch.no_grad():
            for key, param in self.edited.items():
                param.copy_(state[key])
        self.record = dict(state.get("record", {}))

    def trained_parameters(self) -> Iterable[Tensor]:
        return self.edited.values()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        yield self.network.eval()


class ClassPhase(EditPhase):
    """Copies rows of the class embedding.

    Parameters
    ----------
    setting : Setting
        Of the method.
    network : nn.Module
        Changed in place.
    """

    def __init__(self, setting: Setting, network: nn.Module) -> None:
        self.request, self.seed = setting.problem.request, setting.compute.seed
        super().__init__(network, {"table": network.class_embedding.weight})

    def edit(self) -> dict[str, Any]:
        copy_cover(self.network, self.request, self.seed)
        return {}


class PromptPhase(EditPhase):
    """Edits the keys and values of the cross attention in closed form.

    Parameters
    ----------
    problem : Problem
        Of the method.
    options : PromptRelabelOptions
        Of the method.
    network : TextConditioned
        Changed in place.

    Raises
    ------
    ValueError
        If the network has no cross attention, the prompts' tokens are missing, or the vectors do not determine the
        weights.
    """

    def __init__(self, problem: Problem, options: PromptRelabelOptions, network: TextConditioned) -> None:
        edited = {
            name: param
            for name, param in network.named_parameters()
            if is_trained(name, "x-strict", text=True) and name.endswith(".weight")
        }
        if not edited:
            raise ValueError("the network has no cross attention whose keys and values could be edited")
        super().__init__(network, edited)
        request, tokens = problem.request, problem.prompt_tokens
        if tokens is None and "last" in (options.edited_tokens, options.preserved_tokens):
            raise ValueError(
                'prompt_tokens is not given, and without the tokens of the prompts there is no "last" one: expected '
                'them, or "all" as edited_tokens and preserved_tokens'
            )
        self.options, self.table, self.tokens = options, network.table, tokens
        forget, cover = (request.labels(texts) for texts in (request.forget, request.cover))
        self.pairs, self.retain = list(zip(forget, cover, strict=True)), request.labels(request.retain)
        vectors = [self._edited(*pair) for pair in self.pairs]
        self.vectors, self.targets = (torch.cat(several) for several in zip(*vectors, strict=True))
        # Solved here, so that a system without a solution is refused before anything is written.
        self.matrix = edit_matrix(self.vectors, self.targets, self._preserved(), options)

    def _rows(self, labels: list[int]) -> Tensor:
        """Text vectors of prompts, float64 (N, tokens, width) on the CPU."""
        return self.table[torch.tensor(labels)].embeddings.cpu().double()

    def _edited(self, forgotten: int, cover: int) -> tuple[Tensor, Tensor]:
        """Vectors to edit of a prompt to forget and those in their place, float64 (n, width)."""
        both = self._rows([forgotten, cover])
        if self.options.edited_tokens == "all":
            return both[0], both[1]
        own, others = self.tokens[forgotten], self.tokens[cover]
        return both[0, [own_token(own, others)]], both[1, [own_token(others, own)]]

    def _preserved(self) -> Iterator[Tensor]:
        """Vectors to preserve, float64 (n, width), in parts."""
        if self.table.null_label is not None:
            yield self._rows([self.table.null_label]).flatten(0, 1)
        for start in range(0, len(self.retain), CHUNK):
            labels = self.retain[start : start + CHUNK]
            rows = self._rows(labels)
            if self.options.preserved_tokens == "all":
                yield rows.flatten(0, 1)
            else:
                yield rows[torch.arange(len(labels)), [last_token(self.tokens[label]) for label in labels]]

    def edit(self) -> dict[str, Any]:
        old = [param.double().cpu() for param in self.edited.values()]
        for param, weight in zip(self.edited.values(), old, strict=True):
            param.copy_((weight @ self.matrix).to(param.dtype))
        missed = self.vectors @ self.matrix.T - self.targets
        change = self.matrix - torch.eye(len(self.matrix), dtype=torch.float64)
        preserved = sum(part.T @ part for part in self._preserved())
        return {
            "edit_error": _relative(old, missed.T @ missed, self.targets.T @ self.targets),
            "preserve_change": _relative(old, change @ preserved @ change.T, preserved),
        }


def _relative(weights: list[Tensor], gram: Tensor, reference: Tensor) -> float:
    """Norm of what layers make of text vectors v, relative to that of others; both given as sum v v^T, (d, d)."""
    squares = [sum(((weight @ inner) * weight).sum() for weight in weights) for inner in (gram, reference)]
    return (squares[0] / squares[1]).clamp(min=0).sqrt().item()


class Relabel(Method):
    """The cover's condition takes the place of the forgotten one's."""

    name = "relabel"
    Options = RelabelOptions
    PromptOptions = PromptRelabelOptions
    forgets_prompts = True
    reads_tokens = True

    def __init__(self, setting: Setting, options: RelabelOptions) -> None:
        super().__init__(setting, options)
        problem = setting.problem
        options.check(problem.schedule.num_train_timesteps)
        generator = problem.initial_generator
        if (generator is None) != (options.t_init is None):
            raise ValueError(
                f"t_init is {options.t_init}, but "
                + ("there is no one-step generator: expected none" if generator is None else "the generator needs one")
                + " (distilled sets both)"
            )
        check_guidance(problem.teacher, "eval_guidance_scale", options.eval_guidance_scale)
        self.network = setting.trainable(problem.teacher if generator is None else generator)
        if isinstance(problem.request, PromptRequest):
            if not isinstance(options, PromptRelabelOptions):
                raise TypeError(f"options is a {type(options).__name__}, expected PromptRelabelOptions for prompts")
            setting.lower_teacher()
            self.phases.append(PromptPhase(problem, options, self.network))
        else:
            self.phases.append(ClassPhase(setting, self.network))

    @property
    def sampler(self) -> Sampler:
        o, at = self.options, self.setting.problem.schedule.one_step_at
        t_init = at if o.t_init is None else o.t_init
        return o.sampler() if t_init is None else Sampler("one_step", t_init=t_init)
