"""What a judge makes of the images of each class, and as what a forgotten class is drawn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .accuracy import confusion_counts


def class_figures(
    probabilities: Tensor,
    labels: Tensor,
    forget_classes: Sequence[int],
    cover_class: int | None,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Measure images class by class.

    Parameters
    ----------
    probabilities : Tensor
        Of the judge, floating (N, C), on the CPU.
    labels : Tensor
        Requested classes, int64 (N,), on the CPU.
    forget_classes : sequence of int
        The forgotten classes.
    cover_class : int or None
        The class that is drawn in their place, if it is one.
    class_names : sequence of str
        Names of the C classes.

    Returns
    -------
    dict
        JSON. "classes": for each requested class "class" (its name), "role" ("forgotten", "cover" or "retained"),
        "images", "accuracy" (percent that the judge assigns to it), "probability" (mean, of the class), "called" (the
        other class that it is assigned to most often, None if there is none) and "called_share" (in percent).
        "drawn_as": for each forgotten class "class" (its name) and "shares", from the name of each class to the
        percentage of the images that the judge assigns to it.
    """
    confusion = confusion_counts(labels, probabilities.argmax(1), len(class_names))
    shares = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    rows = []
    for label in labels.unique().tolist():
        others = shares[label].clone()
        others[label] = 0
        called = int(others.argmax())
        mistaken = others[called].item() > 0
        role = "forgotten" if label in forget_classes else "cover" if label == cover_class else "retained"
        rows.append(
            {
                "class": class_names[label],
                "role": role,
                "images": int(confusion[label].sum()),
                "accuracy": shares[label, label].item(),
                "probability": probabilities[labels == label, label].double().mean().item(),
                "called": class_names[called] if mistaken else None,
                "called_share": others[called].item(),
            }
        )
    drawn = [
        {"class": class_names[label], "shares": dict(zip(class_names, shares[label].tolist(), strict=True))}
        for label in forget_classes
    ]
    return {"classes": rows, "drawn_as": drawn}


def forgotten_share(probabilities: Tensor, forget_classes: Sequence[int]) -> float:
    """Percentage of images, (N, C) probabilities of the judge, that it assigns to a forgotten class."""
    called = torch.isin(probabilities.argmax(1), torch.tensor(list(forget_classes), dtype=torch.int64))
    return 100 * called.double().mean().item()


def percentage_of_unlearning(before: float | None, after: float | None) -> float | None:
    """PUL: by how many percent the share of images of the forgotten class has fallen, 100 (before - after) / before.

    None if one of them is None, or there were no such images before. Negative if there are more of them.
    """
    return None if before is None or after is None or before == 0 else 100 * (before - after) / before
