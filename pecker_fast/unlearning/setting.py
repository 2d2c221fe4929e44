"""What every method is given: the pretrained network, the request, and how to compute."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion import NoiseSchedule, add_adapter, num_classes, sample_shape
from ..parallel import World
from ..profiling import Regions
from .conditions import Conditions, PromptRequest
from .sharded import shard
from .streams import derived_seed

COVER_RANDOM = "random"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = {"no": None, "bf16": torch.bfloat16}
# Networks of a run share their code, in several modes and sizes of batch: more graphs than torch makes of a function by
# default, beyond which it would go on uncompiled.
MAX_COMPILED = 64


class Images(Protocol):
    """Images with a class each, as LabelledImages has them: ``labels`` int64 (N,) on the CPU, ``len``, ``batch``."""

    labels: Tensor

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, int64 (n,) on the CPU, as float32 (n, C, H, W) in [-1, 1] on the CPU."""
        ...


@dataclass(frozen=True)
class ForgetRequest:
    """Which classes to forget, and what is to be drawn in their place.

    Parameters
    ----------
    num_classes: of the network, the null label not counted.
    forget_classes: one class or several, but not all.
    cover_class: a retained class, or None for one drawn uniformly from the retained ones for each sample.
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
            raise ValueError(f"forget_classes is all {self.num_classes} classes, expected at least one to be left")
        if self.cover_class is not None:
            check_int("cover_class", self.cover_class, 0, self.num_classes)
            if self.cover_class in self.forget_classes:
                raise ValueError(f"cover_class is {self.cover_class}, a class to forget; expected a retained one")

    @classmethod
    def of(cls, network: nn.Module, forget_classes: Iterable[int], cover_class: int | str | None) -> "ForgetRequest":
        """The request for a network; ``cover_class`` may be "random". Raises ValueError for classes it has not."""
        if cover_class == COVER_RANDOM:
            cover_class = None
        return cls(num_classes(network), tuple(forget_classes), cover_class)

    @property
    def retained_classes(self) -> tuple[int, ...]:
        return tuple(label for label in range(self.num_classes) if label not in self.forget_classes)

    def conditions(self, device: torch.device | str) -> Conditions:
        """The labels that a run draws from, on ``device``."""
        covers = self.retained_classes if self.cover_class is None else (self.cover_class,)
        labels = (self.retained_classes, self.forget_classes, covers, tuple(range(self.num_classes)))
        return Conditions(*(torch.tensor(values, device=device) for values in labels))


@dataclass(frozen=True, eq=False, kw_only=True)
class Compute:
    """How networks are computed with.

    Parameters
    ----------
    seed: of everything random.
    device: where to compute.
    mixed_precision: "no", or "bf16" for autocast over float32 weights.
    channels_last: whether networks are kept in that memory format.
    compile: whether networks go through ``torch.compile``.
    nonfinite: what MaskedAdam does with inf and NaN: "propagate", "skip" or "zero".
    regions: profiler.
    world: the processes of the run. Batch sizes are of all of them together.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mixed_precision: str = "no"
    channels_last: bool = False
    compile: bool = False
    nonfinite: str = "propagate"
    regions: Regions = field(default_factory=Regions)
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0)
        if self.mixed_precision not in PRECISIONS:
            # float16 would need loss scaling, which the clip by value and the two gradients of a step had to know of.
            raise ValueError(f'mixed_precision is {self.mixed_precision!r}, expected "no" or "bf16"')
        object.__setattr__(self, "device", torch.device(self.device))

    def place(self, network: nn.Module) -> nn.Module:
        """Moves a network to where and how it is computed with, in place."""
        network.to(self.device)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.compile:
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, MAX_COMPILED)
            network.compile()
        return network

    def autocast(self) -> AbstractContextManager:
        """The precision that networks are called in."""
        dtype = PRECISIONS[self.mixed_precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting(Compute):
    """What a method is given, beside its options.

    Parameters
    ----------
    teacher: the pretrained ``UNet2DModel``, or a ``TextConditioned`` U-Net; moved to ``device`` and frozen. Methods
        copy it.
    schedule: that it was trained with.
    request: what to forget; of a text-conditioned network prompts, whose labels are those of its table.
    weights_dtype: of psi and theta. In bfloat16 or float16 small updates are kept by stochastic rounding, or by float32
        copies of the weights (``master_weights``).
    teacher_dtype: of the teacher, once the methods have copied it; None: as it is.
    score_lora_rank: psi is trained as a low-rank change of this rank of its linear layers; 0: all of it.
    gradient_checkpointing: compute activations of psi, theta and the teacher again in the backward pass.
    fsdp: the processes share out the weights of psi and theta, their gradients and what optimizers keep of them
        (FSDP2). Each has all of the teacher.
    forget_images: real images of what is to be forgotten, float32 (N, C, H, W) in [-1, 1], with ``forget_labels``
        int64 (N,); None for methods that draw their own.
    training_images: those that the teacher was trained on; None for methods that need none.
    fisher: diagonal of the Fisher information of the teacher, float32 on the CPU, by parameter's name; None for methods
        that need none, or compute it themselves.
    initial_generator, initial_score: what theta and psi start from, of the teacher's architecture; None: the teacher.
        A generator that was distilled, or that has forgotten something before, is gone on with in this way.
    """

    teacher: nn.Module
    schedule: NoiseSchedule
    request: ForgetRequest | PromptRequest
    initial_generator: nn.Module | None = None
    initial_score: nn.Module | None = None
    weights_dtype: torch.dtype = torch.float32
    master_weights: bool = False
    teacher_dtype: torch.dtype | None = None
    score_lora_rank: int = 0
    gradient_checkpointing: bool = False
    fsdp: bool = False
    forget_images: torch.Tensor | None = None
    forget_labels: torch.Tensor | None = None
    training_images: Images | None = None
    fisher: Mapping[str, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "schedule", self.schedule.to(self.device))
        for name in ("weights_dtype", "teacher_dtype"):
            dtype = getattr(self, name)
            if dtype not in WEIGHT_DTYPES and not (dtype is None and name == "teacher_dtype"):
                raise ValueError(f"{name} is {dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}")
        check_int("score_lora_rank", self.score_lora_rank, 0)
        if self.master_weights and self.weights_dtype == torch.float32:
            raise ValueError("master_weights is set, but weights_dtype is torch.float32: there is nothing to keep")
        self.place(self.teacher).eval().requires_grad_(False)
        self._checkpoint_gradients(self.teacher)
        wanted = {name: value.shape for name, value in self.teacher.state_dict().items()}
        for name in ("initial_generator", "initial_score"):
            network = getattr(self, name)
            if network is not None and {key: v.shape for key, v in network.state_dict().items()} != wanted:
                raise ValueError(f"{name} is a network of another architecture than the pretrained one")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of what the networks draw: images, or latents."""
        return sample_shape(self.teacher)

    def _checkpoint_gradients(self, network: nn.Module) -> None:
        if self.gradient_checkpointing:
            if not hasattr(network, "enable_gradient_checkpointing"):
                raise ValueError(f"gradient_checkpointing is set, but a {type(network).__name__} has none")
            network.enable_gradient_checkpointing()

    def trainable(self, network: nn.Module) -> nn.Module:
        """A copy with weights of its own, of ``weights_dtype``, that require grad, placed; sharded with ``fsdp``."""
        network = copy.deepcopy(network).requires_grad_(True)
        if any(param.dtype != self.weights_dtype for param in network.parameters()):
            network.to(self.weights_dtype)
        self._checkpoint_gradients(network)
        self.place(network)
        if not self.fsdp:
            return network
        low = PRECISIONS[self.mixed_precision] if self.weights_dtype == torch.float32 else None
        return shard(network, self.world, self.device, low)

    def trainable_score(self, network: nn.Module) -> nn.Module:
        """As ``trainable``, but with ``score_lora_rank`` a frozen copy in the teacher's dtype with low-rank changes of
        its linear layers, float32, which alone require grad. ValueError where peft is missing or the network takes no
        text."""
        if not self.score_lora_rank:
            return self.trainable(network)
        network = copy.deepcopy(network).to(self.teacher_dtype or self.weights_dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, "score adapter"))
            add_adapter(network, self.score_lora_rank)
        self._checkpoint_gradients(network)
        return self.place(network)

    def lower_teacher(self) -> None:
        """Casts the teacher to ``teacher_dtype``: to be called by methods that have copied it."""
        if self.teacher_dtype is not None:
            self.teacher.to(self.teacher_dtype)

    def optimizer_options(self) -> dict[str, Any]:
        """How MaskedAdam keeps small updates of low-precision weights, and what it does with inf and NaN."""
        low = self.weights_dtype != torch.float32
        return {
            "master_weights": self.master_weights,
            "stochastic_rounding": low and not self.master_weights,
            "seed": self.seed,
            "nonfinite": self.nonfinite,
        }
