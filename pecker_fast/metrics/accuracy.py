"""Unlearning accuracy and retained accuracy, from a confusion matrix of generated images."""

from collections.abc import Sequence

from torch import Tensor


def confusion_counts(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count how many images requested for class i are classified as class j.

    Parameters
    ----------
    labels : Tensor
        Requested classes, int64 (N,), on the CPU.
    predictions : Tensor
        Predicted classes, int64 (N,), on the CPU.
    num_classes : int
        Number of classes, C.

    Returns
    -------
    Tensor
        int64 (C, C).
    """
    return (labels * num_classes + predictions).bincount(minlength=num_classes**2).view(num_classes, num_classes)


def unlearning_accuracy(confusion: Tensor, forget_classes: Sequence[int]) -> float:
    """Compute UA: the percentage of images requested for forgotten classes that are classified as none of them."""
    rows = confusion[list(forget_classes)]
    return 100 - 100 * int(rows[:, list(forget_classes)].sum()) / int(rows.sum())


def retained_accuracy(confusion: Tensor, forget_classes: Sequence[int]) -> float:
    """Compute the percentage of images requested for retained classes that are classified as the requested class."""
    retained = [label for label in range(len(confusion)) if label not in forget_classes]
    return 100 * int(confusion.diagonal()[retained].sum()) / int(confusion[retained].sum())
