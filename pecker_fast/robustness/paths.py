"""Other samplers: a network that has forgotten a class with its own sampler may still draw it with another one.

A one-step generator is trained at one timestep; at other timesteps it may still draw the class.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ..diffusion import Sampler
from .examiner import Examiner

# Other timesteps for one step, as fractions of the generator's own.
FRACTIONS = (0.5, 1.5, 2.0)
# Other numbers of DDIM steps for diffusion networks.
DDIM_STEPS = (5, 10, 50)


def samplers(examiner: Examiner) -> list[Sampler]:
    """List the network's own sampler and others for the same network."""
    own = examiner.sampler
    if own.kind == "ddim":
        size = examiner.schedule.num_train_timesteps
        others = sorted({min(n, size) for n in DDIM_STEPS} - {own.num_inference_steps})
        return [own, *(replace(own, num_inference_steps=n) for n in others)]
    last = examiner.schedule.num_train_timesteps - 1
    if examiner.schedule.one_step_at is not None:
        return [own, examiner.by_ddim]
    timesteps = sorted({min(last, round(own.t_init * fraction)) for fraction in FRACTIONS} - {own.t_init})
    return [own, examiner.by_ddim, *(own.at(t) for t in timesteps)]


def paths(network: nn.Module, examiner: Examiner, tick: Callable[[], Any] = lambda: None) -> list[dict[str, Any]]:
    """Measure a network with each sampler.

    Parameters
    ----------
    network : nn.Module
        In eval mode.
    examiner : Examiner
        Samples and judges.
    tick : callable
        Called after each sampler.

    Returns
    -------
    list of dict
        A row for each sampler: "sampler"; "still", the percentage of images requested for forgotten classes that the
        judge classifies as one; and "retain_accuracy", without which a low "still" says little.
    """
    rows = []
    for sampler in samplers(examiner):
        result = examiner.accuracies(examiner.confusion(network, sampler))
        rows.append(
            {"sampler": sampler.name, "still": 100 - result["ua"], "retain_accuracy": result["retain_accuracy"]}
        )
        tick()
    return rows
