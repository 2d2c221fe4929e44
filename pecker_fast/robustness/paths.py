"""Other samplers: a network that has forgotten where it is used may draw the class where it was never asked to forget.

A one-step generator is trained at one timestep; its weights at the others may still hold the class.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ..diffusion import Sampler
from .examiner import Examiner

# Timesteps of one step, in parts of the generator's own.
FRACTIONS = (0.5, 1.5, 2.0)
# Steps of DDIM beside the usual ones, for diffusion networks.
DDIM_STEPS = (5, 10, 50)


def samplers(examiner: Examiner) -> list[Sampler]:
    """The sampler of the network under examination, and others for the same network."""
    own = examiner.sampler
    if own.kind == "ddim":
        return [own, *(replace(own, num_inference_steps=n) for n in DDIM_STEPS if n != own.num_inference_steps)]
    last = examiner.schedule.num_train_timesteps - 1
    timesteps = sorted({min(last, round(own.t_init * part)) for part in FRACTIONS} - {own.t_init})
    return [own, examiner.by_ddim, *(own.at(t) for t in timesteps)]


def paths(network: nn.Module, examiner: Examiner, tick: Callable[[], Any] = lambda: None) -> list[dict[str, Any]]:
    """A row for each sampler: "sampler", "still" (of the images asked for a forgotten class, the percentage that the
    judge puts in one) and "retain_accuracy", without which a low "still" says little."""
    rows = []
    for used in samplers(examiner):
        found = examiner.accuracies(examiner.confusion(network, used))
        rows.append({"sampler": used.name, "still": 100 - found["ua"], "retain_accuracy": found["retain_accuracy"]})
        tick()
    return rows
