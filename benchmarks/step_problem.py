"""The iterations that ``train_step`` times, on networks of the published architectures with random weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.diffusion import NoiseSchedule, UNetConfig, build_unet, register_classes
from pecker_fast.profiling import Regions
from pecker_fast.runs.presets import class_preset, method_options
from pecker_fast.unlearning import Compute, ForgetRequest, Method, Setting, method_class
from pecker_fast.unlearning import Problem as UnlearningProblem

SEED = 0
CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """The U-Net of a public checkpoint, with its published batch size."""

    preset: str
    unet: UNetConfig
    batch: int
    # Time and class embeddings side by side, as in the public code's network and in its conversion.
    time_embedding_dim: int | None = None

    def build(self, dropout: float) -> nn.Module:
        """The network with random weights, and a last layer that is not zero."""
        torch.manual_seed(SEED)
        config = replace(self.unet, dropout=dropout)
        unet = build_unet(config)
        if self.time_embedding_dim is not None:
            values = {name: value for name, value in unet.config.items() if not name.startswith("_")}
            unet = type(unet)(**{**values, "time_embedding_dim": self.time_embedding_dim})
            register_classes(unet, config.num_classes)
        return unet.eval()


TINY = UNetConfig(
    sample_size=8,
    num_classes=CLASSES,
    null_label=True,
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_resolutions=(4,),
    norm_num_groups=4,
)
ARCHITECTURES = {
    "tiny": Architecture("cifar10", TINY, batch=4),
    "digits": Architecture("digits", class_preset("digits").unet, batch=48),
    "cifar10": Architecture("cifar10", class_preset("cifar10").unet, batch=128, time_embedding_dim=1024),
    "stl10": Architecture("stl10", class_preset("stl10").unet, batch=64, time_embedding_dim=1024),
}

# Method of the package, and iterations between masks (0: one mask).
METHODS = {
    "sfd": ("sfd", None),
    "pecker": ("pecker", 10),
    "pecker-every-1": ("pecker", 1),
    "pecker-once": ("pecker", 0),
}

# Autocast; whether matrix products may use TF32, and whether convolutions may.
PRECISIONS = {
    "fp32": ("no", False, False),
    "tf32": ("no", True, True),
    # torch's default, as in the public code.
    "default": ("no", False, True),
    "bf16": ("bf16", True, True),
}


@contextmanager
def precision(name: str) -> Iterator[None]:
    """TF32 as ``PRECISIONS`` says. Autocast is left to the caller of the networks."""
    _, matmul, conv = PRECISIONS[name]
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Problem:
    """An architecture and a batch on a device: the same weights and random numbers for all contestants."""

    arch: str
    batch: int
    device: torch.device
    teacher: nn.Module
    schedule: NoiseSchedule

    @classmethod
    def make(cls, arch: str, batch: int | None, device: torch.device, dropout: float | None = None) -> "Problem":
        """Build the problem. ``batch`` None is the published one, ``dropout`` None the architecture's."""
        kind = ARCHITECTURES[arch]
        teacher = kind.build(kind.unet.dropout if dropout is None else dropout).to(device).requires_grad_(False)
        return cls(arch, batch or kind.batch, device, teacher, NoiseSchedule.linear().to(device))

    @property
    def request(self) -> ForgetRequest:
        """Forget class 0, cover it by class 1."""
        return ForgetRequest.of(self.teacher, [0], 1)

    @property
    def numel(self) -> int:
        """Parameters of the network."""
        return sum(p.numel() for p in self.teacher.parameters())

    @staticmethod
    def saliency_batch(batch: int) -> int:
        """Samples of a mask."""
        return min(batch, 128)

    def options(self, name: str, **changes: Any) -> Any:
        """Options of the method called ``name`` in METHODS."""
        method, refresh = METHODS[name]
        options = method_options(ARCHITECTURES[self.arch].preset, method_class(method))
        values: dict[str, Any] = {"train_batch_size": self.batch}
        if refresh is not None:
            values |= {"mask_refresh_steps": refresh, "saliency_batch_size": self.saliency_batch(self.batch)}
        return replace(options, **{**values, **changes})

    def ours(self, name: str, precision: str, *, compile: bool = False, regions: Regions | None = None, **changes: Any):
        """An ``Iteration`` of the package's method; ``changes`` are made to its options."""
        compute = Compute(
            seed=SEED,
            device=self.device,
            mixed_precision=PRECISIONS[precision][0],
            channels_last=self.device.type == "cuda",
            compile=compile,
            regions=regions or Regions(),
        )
        setting = Setting(UnlearningProblem(copy.deepcopy(self.teacher), self.schedule, self.request), compute)
        return Iteration(method_class(METHODS[name][0])(setting, self.options(name, **changes)))


class Iteration:
    """Iterations of the last phase of a method: each call runs the next one."""

    def __init__(self, method: Method) -> None:
        self.phase = method.phases[-1]
        self.phase.start(None)
        self.number = 0

    def __call__(self) -> dict[str, Tensor]:
        """Run the next iteration; returns its losses."""
        losses = self.phase.step(self.number)
        self.number += 1
        return losses
