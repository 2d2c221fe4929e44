"""The moving averages (EMA) of the parameters outside the kernel."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .slots import Slot


def follow(idle: Sequence[Slot], found_inf: Tensor | None) -> None:
    """Moves the averages of parameters that have no gradient in this step: they may still be behind them."""
    for slot in idle:
        ema = slot.state.get("ema")
        if ema is None:
            continue
        source = slot.state.get("master_param", slot.param.detach())
        change = (1 - slot.group["ema_decay"]) * (source.to(ema.dtype) - ema)
        if found_inf is not None:
            change = torch.where(found_inf.to(ema.device) == 0, change, 0)
        ema.add_(change)


@contextmanager
def swapped(slots: Sequence[Slot]) -> Iterator[None]:
    """The parameters hold their averages; afterwards their own values again, bit for bit."""
    own = [slot.param.detach().clone() for slot in slots]
    try:
        for slot in slots:
            if "ema" in slot.state:
                slot.param.detach().copy_(slot.state["ema"])
        yield
    finally:
        for slot, value in zip(slots, own, strict=True):
            slot.param.detach().copy_(value)
