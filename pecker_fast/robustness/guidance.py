"""Guidance: a network with a label for "no condition" has another way to a class, through eps_u + w (eps_c - eps_u)."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..diffusion import null_label
from ..unlearning.streams import derived_seed
from .examiner import Examiner, confusion_matrix


def guidance(network: nn.Module, examiner: Examiner, scales: tuple[float, ...]) -> list[dict[str, Any]]:
    """A row for each scale, and one for samples without a condition; none where the network has no null label.

    "scale" (None: no condition), in percent "still" (of the images asked for a forgotten class, or of all where nothing
    is asked for, those that the judge puts in a forgotten class), and "retain_accuracy" (None without a condition).
    """
    null = null_label(network)
    if null is None:
        return []
    rows = []
    for scale in scales:
        guided = replace(examiner.sampler, guidance_scale=scale)
        found = examiner.accuracies(examiner.confusion(network, guided))
        # At scale 0 nothing of the label is left.
        kept = None if scale == 0 else found["retain_accuracy"]
        rows.append({"scale": scale, "still": 100 - found["ua"], "retain_accuracy": kept})
    count = examiner.forget_samples * len(examiner.request.forget_classes)
    labels = torch.full((count,), null)
    images = examiner.draw(network, labels, derived_seed(examiner.seed, "examiner"))
    drawn = confusion_matrix(examiner.judge, images, torch.zeros(count, dtype=torch.int64)).sum(0)
    still = 100 * int(drawn[list(examiner.request.forget_classes)].sum()) / count
    return [*rows, {"scale": None, "still": still, "retain_accuracy": None}]
