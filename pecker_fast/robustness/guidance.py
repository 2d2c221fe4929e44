"""Guidance: with a null label, a network can also draw a class through eps_u + w (eps_c - eps_u)."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..diffusion import null_label
from ..unlearning.streams import derived_seed
from .examiner import Examiner, confusion_matrix


def guidance(network: nn.Module, examiner: Examiner, scales: tuple[float, ...]) -> list[dict[str, Any]]:
    """Measure a network at several guidance scales and without a condition.

    Parameters
    ----------
    network : nn.Module
        In eval mode.
    examiner : Examiner
        Samples and judges.
    scales : tuple of float
        Guidance scales.

    Returns
    -------
    list of dict
        A row for each scale and one for samples without a condition; empty if the network has no null label. "scale"
        (None without a condition); "still", the percentage of images requested for forgotten classes, or of all images
        without a condition, that the judge classifies as forgotten classes; and "retain_accuracy" in percent (None
        without a condition).
    """
    null = null_label(network)
    if null is None:
        return []
    rows = []
    for scale in scales:
        guided = replace(examiner.sampler, guidance_scale=scale)
        accuracies = examiner.accuracies(examiner.confusion(network, guided))
        # At scale 0 the label has no influence.
        retained = None if scale == 0 else accuracies["retain_accuracy"]
        rows.append({"scale": scale, "still": 100 - accuracies["ua"], "retain_accuracy": retained})
    count = examiner.forget_samples * len(examiner.request.forget_classes)
    labels = torch.full((count,), null)
    images = examiner.draw(network, labels, derived_seed(examiner.seed, "examiner"))
    counts = confusion_matrix(examiner.judge, images, torch.zeros(count, dtype=torch.int64)).sum(0)
    still = 100 * int(counts[list(examiner.request.forget_classes)].sum()) / count
    return [*rows, {"scale": None, "still": still, "retain_accuracy": None}]
