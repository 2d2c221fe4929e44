"""The distance of weights from their initial values."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Drift:
    """The drift of one or more parameters.

    Parameters
    ----------
    entries : int
        Number of entries.
    changed : int
        Entries that differ from their initial value.
    squared : float
        Squared 2-norm of the difference.
    start_squared : float
        Squared 2-norm of the initial values.
    """

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
        """||theta - theta_0|| / ||theta_0||; None if theta_0 is zero."""
        return (self.squared / self.start_squared) ** 0.5 if self.start_squared else None


@torch.no_grad()
def weight_drift(network: nn.Module, start: nn.Module) -> dict[str, Drift]:
    """Compute the drift of each parameter by name, in float64. Synchronises with the device.

    Parameters
    ----------
    network, start : nn.Module
        Networks with the same names and shapes of parameters, on any devices. Parameters of ``start`` are copied to the
        device of ``network`` one at a time.

    Returns
    -------
    dict
        From a parameter's name to its drift.

    Raises
    ------
    ValueError
        If names or shapes differ.
    """
    before = dict(start.named_parameters())
    drifts = {}
    for name, param in network.named_parameters():
        if name not in before or before[name].shape != param.shape:
            raise ValueError(f"start has no parameter {name} of shape {tuple(param.shape)}: it is another network")
        a, b = before.pop(name).to(param.device).double(), param.double()
        squares = torch.stack([(b - a).square().sum(), a.square().sum()]).tolist()
        drifts[name] = Drift(param.numel(), int((a != b).sum()), *squares)
    if before:
        raise ValueError(f"network has no parameter {next(iter(before))}, which start has: it is another network")
    return drifts


def trained_percent(network: nn.Module) -> float:
    """Compute the percentage of the network's entries that require grad."""
    counts = [(param.numel(), param.requires_grad) for param in network.parameters()]
    return 100 * sum(count for count, trained in counts if trained) / max(1, sum(count for count, _ in counts))


def grouped(drifts: dict[str, Drift], group: Callable[[str], str]) -> dict[str, Drift]:
    """Add up the drifts of parameters whose names ``group`` maps to the same key, in the order of first occurrence."""
    groups: dict[str, Drift] = {}
    for name, drift in drifts.items():
        key = group(name)
        groups[key] = groups[key] + drift if key in groups else drift
    return groups


def total(drifts: Iterable[Drift]) -> Drift:
    """Add up drifts."""
    return sum(drifts, Drift(0, 0, 0.0, 0.0))
