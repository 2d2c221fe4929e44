"""Collateral damage: the accuracy of retained classes, in particular of those most similar to the forgotten ones."""

from typing import Any

import torch
from torch import Tensor

from ..data import LabelledImages
from ..metrics import Judge
from ..unlearning import ForgetRequest

# Number of retained classes that count as neighbours.
NEAREST = 3


def class_distances(judge: Judge, dataset: LabelledImages, chunk: int = 1024) -> Tensor:
    """Compute the Euclidean distances between the classes' mean features of real images, float64 (C, C).

    ValueError if a class has no images.
    """
    features = torch.cat([judge(dataset.batch(indices))[1] for indices in torch.arange(len(dataset)).split(chunk)])
    missing = [c for c in range(dataset.num_classes) if not (dataset.labels == c).any()]
    if missing:
        raise ValueError(f"dataset has no images of the classes {missing}, expected some of every class")
    means = torch.stack([features[dataset.labels == c].double().mean(0) for c in range(dataset.num_classes)])
    return (means[:, None] - means[None]).norm(dim=2)


def neighbours(before: Tensor, after: Tensor, distances: Tensor, request: ForgetRequest) -> list[dict[str, Any]]:
    """Compare the retained classes before and after unlearning, those nearest to a forgotten class first.

    Parameters
    ----------
    before, after : Tensor
        ``confusion_matrix`` of the pretrained and of the unlearned network.
    distances : Tensor
        ``class_distances``.
    request : ForgetRequest
        The forgotten classes and the cover class.

    Returns
    -------
    list of dict
        Rows with "class", "distance" (to the nearest forgotten class), "neighbour" (whether it is one of the nearest
        three), and in percent "accuracy_before", "accuracy", "called_forgotten_before", "called_forgotten", and with a
        cover class "called_cover_before" and "called_cover" (None for the cover class itself).
    """
    forgotten, cover = list(request.forget_classes), request.cover_class
    retained = sorted(request.retained_classes, key=lambda c: distances[c, forgotten].min().item())
    rows = []
    for place, c in enumerate(retained):
        row = {
            "class": c,
            "distance": distances[c, forgotten].min().item(),
            "neighbour": place < NEAREST,
        }
        for suffix, confusion in (("_before", before), ("", after)):
            share = 100 * confusion[c].double() / confusion[c].sum()
            row["accuracy" + suffix] = share[c].item()
            row["called_forgotten" + suffix] = share[forgotten].sum().item()
            if cover is not None:
                row["called_cover" + suffix] = None if c == cover else share[cover].item()
        rows.append(row)
    return rows
