"""How far weights have moved from where they started."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Drift:
    """Of some parameters: ``entries`` in all, ``changed`` that differ at all, and squared 2-norms of the difference and
    of the starting values."""

    entries: int
    changed: int
    squared: float
    start_squared: float

    def __add__(self, other: "Drift") -> "Drift":
        return Drift(
            self.entries + other.entries,
            self.changed + other.changed,
            self.squared + other.squared,
            self.start_squared + other.start_squared,
        )

    @property
    def relative(self) -> float | None:
        """||theta - theta_0|| / ||theta_0||; None where all of theta_0 is zero."""
        return (self.squared / self.start_squared) ** 0.5 if self.start_squared else None


@torch.no_grad()
def weight_drift(network: nn.Module, start: nn.Module) -> dict[str, Drift]:
    """Parameter's name to its drift, in float64. Waits for the device.

    ``network`` and ``start`` have parameters of the same names and shapes, ValueError otherwise; on any devices, one
    parameter of ``start`` at a time travels to the network's.
    """
    before = dict(start.named_parameters())
    found = {}
    for name, param in network.named_parameters():
        if name not in before or before[name].shape != param.shape:
            raise ValueError(f"start has no parameter {name} of shape {tuple(param.shape)}: it is another network")
        a, b = before.pop(name).to(param.device).double(), param.double()
        squares = torch.stack([(b - a).square().sum(), a.square().sum()]).tolist()
        found[name] = Drift(param.numel(), int((a != b).sum()), *squares)
    if before:
        raise ValueError(f"network has no parameter {next(iter(before))}, which start has: it is another network")
    return found


def trained_percent(network: nn.Module) -> float:
    """Percent of the entries of ``network``'s parameters that are trained: those that require grad."""
    counts = [(param.numel(), param.requires_grad) for param in network.parameters()]
    return 100 * sum(count for count, trained in counts if trained) / max(1, sum(count for count, _ in counts))


def grouped(drifts: dict[str, Drift], group: Callable[[str], str]) -> dict[str, Drift]:
    """The drifts of parameters together whose names ``group`` maps to the same, in the order of the first of each."""
    found: dict[str, Drift] = {}
    for name, drift in drifts.items():
        key = group(name)
        found[key] = found[key] + drift if key in found else drift
    return found


def total(drifts: Iterable[Drift]) -> Drift:
    """Of all together."""
    return sum(drifts, Drift(0, 0, 0.0, 0.0))
