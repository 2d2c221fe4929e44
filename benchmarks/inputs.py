"""Inputs of the benchmarks: gradients, parameters and masks of a network's shapes, made from a seed."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import pecker_fast as pf

from . import shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Kinds of gradients. "normal" is the one that times are stated for; a selection may not be much slower on the others.
GRADIENT_KINDS = (
    "normal",
    "layered",
    "constant",
    "all_zero",
    "two_valued",
    "half_zero",
    "subnormal",
    "heavy_tailed",
)


@dataclass(frozen=True)
class Problem:
    """What a benchmark runs on."""

    size: str = "cifar10"
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str | None = None

    @property
    def shapes(self) -> shapes.Shapes:
        return shapes.shapes(self.size)

    @property
    def numel(self) -> int:
        return shapes.numel(self.size)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def gradients(self, seed: int = 0, kind: str = "normal") -> dict[str, Tensor]:
        """A gradient for each parameter, each in its own allocation as autograd would leave them."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        return {name: self._gradient(shape, kind, generator) for name, shape in self.shapes.items()}

    def _gradient(self, shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
        options = {"dtype": self.dtype, "device": self.device}
        if kind == "constant":
            return torch.full(shape, 1e-3, **options)
        if kind == "all_zero":
            return torch.zeros(shape, **options)
        x = torch.randn(shape, generator=generator, device=self.device)
        if kind == "normal":
            x *= 1e-3
        elif kind == "layered":
            # As in real networks: the scale differs from layer to layer by orders of magnitude.
            exponent = torch.rand((), generator=generator, device=self.device) * 3 - 5
            x *= 10**exponent
        elif kind == "two_valued":
            x = torch.where(x > 0, 1e-3, -2e-3)
        elif kind == "half_zero":
            x = torch.where(x > 0, x * 1e-3, 0.0)
        elif kind == "subnormal":
            # In units of the smallest subnormal, so that every value keeps a few bits.
            info = torch.finfo(self.dtype)
            x *= info.tiny / 8
        elif kind == "heavy_tailed":
            x = x.sign() * torch.exp(6 * x.abs() - 12).clamp(max=6e4)
        else:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(GRADIENT_KINDS)}")
        return x.to(self.dtype)

    def parameters(self, gradients: dict[str, Tensor], seed: int = 1) -> dict[str, nn.Parameter]:
        """Parameters with these gradients as their ``.grad``."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        parameters = {}
        for name, grad in gradients.items():
            value = torch.randn(grad.shape, generator=generator, device=self.device).mul_(0.02).to(self.dtype)
            parameters[name] = nn.Parameter(value)
            parameters[name].grad = grad
        return parameters

    def mask(self, density: float, seed: int = 2) -> pf.SaliencyMask:
        """A mask spread evenly over all tensors, which is the hardest one to skip entries with."""
        return pf.saliency_mask(self.gradients(seed), density=density, backend=self.backend)

    def float_mask(self, mask: pf.SaliencyMask) -> list[Tensor]:
        """The mask as plain torch uses it: ones and zeros of the gradients' dtype."""
        return [mask[name].to(self.dtype) for name in self.shapes]
