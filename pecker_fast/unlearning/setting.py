"""What every method is given: the problem to solve, how to compute, and how networks are kept in memory."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_literals
from ..diffusion import Parametrisation, add_adapter, sample_shape
from ..parallel import World
from ..profiling import Regions
from .conditions import ForgetRequest, PromptRequest
from .sharded import shard
from .streams import derived_seed

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = {"no": None, "bf16": torch.bfloat16}
# The networks of a run share their code but differ in mode and batch size: more graphs than torch makes of one function
# by default, after which it silently runs uncompiled.
MAX_COMPILED = 64


class Images(Protocol):
    """Images with a class each, such as ``LabelledImages``.

    Attributes
    ----------
    labels : Tensor
        Shape (N,), int64, on the CPU.
    """

    labels: Tensor

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, int64 (n,) on the CPU: float32 (n, C, H, W) in [-1, 1], on the CPU."""
        ...


class Supports(Protocol):
    """What a method class declares about placements; see ``Method``."""

    name: ClassVar[str]
    shards: ClassVar[bool]
    shards_without: ClassVar[tuple[str, ...]]
    trains_adapters: ClassVar[bool]
    trains_low_precision: ClassVar[bool]
    shares_weights: ClassVar[bool]


@dataclass(frozen=True, eq=False)
class Problem:
    """What to forget, of which network, with which data.

    Parameters
    ----------
    teacher : nn.Module
        The pretrained ``UNet2DModel``, or a ``TextConditioned`` U-Net. Methods copy it.
    schedule : Parametrisation
        The schedule that the teacher was trained with.
    request : ForgetRequest or PromptRequest
        Classes to forget, or prompts of a text-conditioned network. The labels of prompts are those of its table.
    initial_generator, initial_score : nn.Module, optional
        Networks of the teacher's architecture that theta and psi start from; the teacher by default. For a generator
        that was distilled before, or has already forgotten something.
    forget_images, forget_labels : Tensor, optional
        Real images of what to forget, float32 (N, C, H, W) in [-1, 1], and their labels, int64 (N,). None if the method
        draws its own.
    training_images : Images, optional
        The images that the teacher was trained on. None if the method needs none.
    fisher : mapping of str to Tensor, optional
        Diagonal of the teacher's Fisher information by parameter name, float32 on the CPU. None if the method needs
        none or computes it.
    prompt_tokens : sequence of sequence of int, optional
        Tokens of each of the request's prompts without padding, the first and the last of which mark the start and the
        end of the text. None if the method needs none.

    Raises
    ------
    ValueError
        If an initial network is not of the teacher's architecture.
    """

    teacher: nn.Module
    schedule: Parametrisation
    request: ForgetRequest | PromptRequest
    initial_generator: nn.Module | None = None
    initial_score: nn.Module | None = None
    forget_images: Tensor | None = None
    forget_labels: Tensor | None = None
    training_images: Images | None = None
    fisher: Mapping[str, Tensor] | None = None
    prompt_tokens: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        expected = {name: value.shape for name, value in self.teacher.state_dict().items()}
        for name in ("initial_generator", "initial_score"):
            network = getattr(self, name)
            if network is not None and {key: v.shape for key, v in network.state_dict().items()} != expected:
                raise ValueError(f"{name} is a network of another architecture than the pretrained one")

    @property
    def forgets_prompts(self) -> bool:
        """Whether prompts are forgotten, not classes."""
        return isinstance(self.request, PromptRequest)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the networks' samples: images, or latents."""
        return sample_shape(self.teacher)


@dataclass(frozen=True, eq=False, kw_only=True)
class Compute:
    """How to compute.

    Parameters
    ----------
    seed : int
        Seed of all random numbers.
    device : torch.device
        Where to compute.
    mixed_precision : {"no", "bf16"}
        "bf16" is autocast over float32 weights.
    channels_last : bool
        Whether networks are kept in that memory format.
    compile : bool
        Whether networks are compiled with ``torch.compile``.
    nonfinite : {"propagate", "skip", "zero", "raise"}
        What ``MaskedAdam`` does about inf and NaN.
    regions : Regions
        Profiler.
    world : World
        The processes of the run. Batch sizes count the samples of all of them.

    Raises
    ------
    TypeError, ValueError
        If a value is out of range.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # float16 needs loss scaling, which clipping by value and the two-gradient step do not support.
    mixed_precision: Literal["no", "bf16"] = "no"
    channels_last: bool = False
    compile: bool = False
    nonfinite: Literal["propagate", "skip", "zero", "raise"] = "propagate"
    regions: Regions = field(default_factory=Regions)
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0)
        check_literals(self)
        object.__setattr__(self, "device", torch.device(self.device))

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network in place to where and how it is computed; returns it."""
        network.to(self.device)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.compile:
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, MAX_COMPILED)
            network.compile()
        return network

    def autocast(self) -> AbstractContextManager:
        """The precision in which networks are called."""
        dtype = PRECISIONS[self.mixed_precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How networks and optimizers are kept in memory.

    Parameters
    ----------
    weights_dtype : torch.dtype
        Dtype of psi and theta. In bfloat16 or float16, small updates survive by stochastic rounding, or by float32
        copies of the weights (``master_weights``).
    master_weights : bool
        Whether low-precision weights have float32 copies.
    teacher_dtype : torch.dtype, optional
        Dtype of the teacher once the methods have copied it; None leaves it as it is.
    score_lora_rank : int
        Rank of the adapter that psi is trained through; 0 trains all of psi.
    gradient_checkpointing : bool
        Whether psi, theta and the teacher recompute activations in the backward pass.
    fsdp : bool
        Whether the processes share the weights of psi and theta, their gradients and their optimizers' state (FSDP2).
        Each process has the whole teacher.
    share_weights : bool
        Whether networks that start as the teacher, and whose steps one mask confines, share one copy of the weights
        with it. Exact, for some more forward passes: no graph can exist beside another network's.
    saliency_parts : int
        Parts of a network that are scored one after the other for a mask that is chosen once. Exact: the scores of a
        part take memory, and the backward passes are run once for each part.

    Raises
    ------
    TypeError, ValueError
        If a value is out of range, or ``master_weights`` has nothing to copy.
    """

    weights_dtype: torch.dtype = torch.float32
    master_weights: bool = False
    teacher_dtype: torch.dtype | None = None
    score_lora_rank: int = 0
    gradient_checkpointing: bool = False
    fsdp: bool = False
    share_weights: bool = False
    saliency_parts: int = 1

    def __post_init__(self) -> None:
        check_choice("weights_dtype", self.weights_dtype, WEIGHT_DTYPES)
        if self.teacher_dtype is not None:
            check_choice("teacher_dtype", self.teacher_dtype, WEIGHT_DTYPES)
        check_int("score_lora_rank", self.score_lora_rank, 0)
        check_int("saliency_parts", self.saliency_parts, 1)
        if self.master_weights and self.weights_dtype == torch.float32:
            raise ValueError("master_weights is set, but weights_dtype is torch.float32: there is nothing to keep")

    def check_method(self, method: type[Supports], options: Any, *, processes: int, compile: bool) -> None:
        """Check this placement against what a method supports.

        Parameters
        ----------
        method : type
            The method's class, which declares what it supports.
        options : object
            The method's options.
        processes : int
            Number of processes of the run.
        compile : bool
            Whether networks are compiled.

        Raises
        ------
        ValueError
            If the method or its options do not support this placement.
        """
        if self.weights_dtype != torch.float32 and not method.trains_low_precision:
            raise ValueError(f"weights_dtype is {self.weights_dtype}, but {method.name} trains float32 weights")
        if self.score_lora_rank and not method.trains_adapters:
            raise ValueError(
                f"score_lora_rank is {self.score_lora_rank}, but {method.name} trains no adapter: "
                f"it is for {_supporting('trains_adapters')}"
            )
        if self.saliency_parts > 1 and not method.shares_weights:
            raise ValueError(
                f"saliency_parts is {self.saliency_parts}, but {method.name} has no mask that is chosen once: "
                f"it is for {_supporting('shares_weights')}"
            )
        if self.share_weights:
            self._check_shared(method, options, compile)
        if not self.fsdp:
            return
        if not method.shards:
            raise ValueError(f"fsdp is set, but {method.name} shards no networks: it is for {_supporting('shards')}")
        if processes == 1:
            raise ValueError("fsdp is set, but the run has one process: start several with torchrun")
        others = {"torch_compile": compile, "score_lora_rank": self.score_lora_rank}
        others |= {name: getattr(options, name) for name in method.shards_without}
        for name, value in others.items():
            if value:
                raise ValueError(f"fsdp is set, and so is {name}: expected one of them")

    def _check_shared(self, method: type[Supports], options: Any, compile: bool) -> None:
        if not method.shares_weights:
            raise ValueError(
                f"share_weights is set, but {method.name} trains every weight: "
                f"it is for {_supporting('shares_weights')}"
            )
        others = {"torch_compile": compile, "fsdp": self.fsdp}
        # Relabelling writes to entries outside the mask, which are the teacher's too.
        others |= {name: getattr(options, name, False) for name in ("cuda_graphs", "relabel")}
        for name, value in others.items():
            if value:
                raise ValueError(f"share_weights is set, and so is {name}: expected one of them")


def _supporting(declaration: str) -> str:
    """Names of the methods that declare something, as a list in a sentence."""
    # Every method imports this module.
    from .registry import method_class, method_names

    names = [name for name in method_names() if getattr(method_class(name), declaration)]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method is given beside its options.

    Parameters
    ----------
    problem : Problem
        Its teacher is moved to the device in place, and frozen. The setting's problem has the schedule there too.
    compute : Compute
        How to compute.
    placement : Placement
        How networks are kept in memory.

    Raises
    ------
    ValueError
        If gradients are to be checkpointed and the network cannot.
    """

    problem: Problem
    compute: Compute = field(default_factory=Compute)
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        problem = replace(self.problem, schedule=self.problem.schedule.to(self.compute.device))
        object.__setattr__(self, "problem", problem)
        self.compute.place(problem.teacher).eval().requires_grad_(False)
        self._checkpoint_gradients(problem.teacher)

    def _checkpoint_gradients(self, network: nn.Module) -> None:
        if self.placement.gradient_checkpointing:
            if not hasattr(network, "enable_gradient_checkpointing"):
                raise ValueError(f"gradient_checkpointing is set, but a {type(network).__name__} has none")
            network.enable_gradient_checkpointing()

    def trainable(self, network: nn.Module) -> nn.Module:
        """Copy a network to train it.

        Parameters
        ----------
        network : nn.Module
            Is not changed.

        Returns
        -------
        nn.Module
            A copy with weights of its own, in the placement's dtype, that require gradients; sharded with ``fsdp``.
        """
        compute, dtype = self.compute, self.placement.weights_dtype
        # Cast one by one: no whole copy in the original dtype.
        memo: dict[int, Any] = {
            id(param): nn.Parameter(param.detach().to(dtype, copy=True)) for param in network.parameters()
        }
        # diffusers' own ``to`` warns about modules that should stay in float32, even if there are none.
        network = nn.Module.to(copy.deepcopy(network, memo), dtype)
        self._checkpoint_gradients(network)
        compute.place(network)
        if not self.placement.fsdp:
            return network
        block_dtype = PRECISIONS[compute.mixed_precision] if dtype == torch.float32 else None
        return shard(network, compute.world, compute.device, block_dtype)

    def trainable_score(self, network: nn.Module) -> nn.Module:
        """Copy a network to train it as the score network.

        Parameters
        ----------
        network : nn.Module
            Is not changed.

        Returns
        -------
        nn.Module
            As of ``trainable``. With ``score_lora_rank``, a frozen copy in the teacher's dtype with float32 low-rank
            adapters of its linear layers; only the adapters require gradients.

        Raises
        ------
        ValueError
            If the score network has adapters and peft is not installed or the network takes no text.
        """
        placement = self.placement
        if not placement.score_lora_rank:
            return self.trainable(network)
        network = copy.deepcopy(network).to(placement.teacher_dtype or placement.weights_dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.compute.seed, "score adapter"))
            add_adapter(network, placement.score_lora_rank)
        self._checkpoint_gradients(network)
        return self.compute.place(network)

    def starts_as_teacher(self, name: str, network: nn.Module | None) -> bool:
        """Whether a network has the teacher's weights in the placement's dtype.

        Parameters
        ----------
        name : {"score", "generator"}
            What it is for.
        network : nn.Module or None
            The network; None if it is the teacher.
        """
        if network is None:
            return True
        teacher, dtype = self.problem.teacher, self.placement.weights_dtype
        if any(getattr(network, key, None) != getattr(teacher, key, None) for key in ("prediction_type", "unit_noise")):
            return False
        pairs = zip(network.parameters(), teacher.parameters(), strict=True)
        return all(torch.equal(one.detach().to(other.device, dtype), other.to(dtype)) for one, other in pairs)

    def lower_teacher(self) -> None:
        """Cast the teacher to its dtype. Methods call it once they have copied the teacher."""
        if self.placement.teacher_dtype is not None:
            self.problem.teacher.to(self.placement.teacher_dtype)

    def optimizer_options(self, network: str) -> dict[str, Any]:
        """Arguments of ``MaskedAdam``: how it keeps small updates of low-precision weights, what it does about NaN.

        ``network`` names the network. Each network's weights are rounded by random bits of their own.
        """
        low_precision = self.placement.weights_dtype != torch.float32
        return {
            "master_weights": self.placement.master_weights,
            "stochastic_rounding": low_precision and not self.placement.master_weights,
            "seed": derived_seed(self.compute.seed, "rounding", network),
            "nonfinite": self.compute.nonfinite,
        }
