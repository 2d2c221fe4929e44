"""The moving averages (EMA) of the parameters outside the kernel."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .slots import Slot


def follow(idle: Sequence[Slot], found_inf: Tensor | None) -> None:
    """Moves the averages of parameters without a gradient in this step: they may still lag behind."""
    for slot in idle:
        ema = slot.state.get("ema")
        if ema is None:
            continue
        source = slot.state.get("master_param")
        if source is None:
            source = slot.salient(slot.param) if slot.has_packed("ema") else slot.param.detach()
        change = (1 - slot.group["ema_decay"]) * (source.to(ema.dtype) - ema)
        if found_inf is not None:
            change = torch.where(found_inf.to(ema.device) == 0, change, 0)
        ema.add_(change)


@contextmanager
def swapped(slots: Sequence[Slot]) -> Iterator[None]:
    """Lets the parameters hold their averages, and restores their own values afterwards, bit for bit."""
    own: list[tuple[Slot, Tensor]] = []
    try:
        for slot in slots:
            if "ema" not in slot.state:
                continue
            param, ema = slot.param.detach(), slot.state["ema"]
            if slot.has_packed("ema"):
                own.append((slot, slot.salient(param)))
                slot.put_salient(param, ema.to(param.dtype))
            else:
                own.append((slot, param.clone()))
                param.copy_(ema)
        yield
    finally:
        for slot, values in own:
            param = slot.param.detach()
            slot.put_salient(param, values) if slot.has_packed("ema") else param.copy_(values)
