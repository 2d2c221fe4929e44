"""The examiner that all probes share: how networks are sampled, the judge, and the forgotten classes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion import Parametrisation, Sampler
from ..metrics import (
    FeatureStatistics,
    Judge,
    confusion_counts,
    frechet_distance,
    retained_accuracy,
    unlearning_accuracy,
)
from ..unlearning import ForgetRequest
from ..unlearning.streams import derived_seed


def confusion_matrix(judge: Judge, images: Tensor, labels: Tensor) -> Tensor:
    """Judge images and count how many requested for class i are classified as class j.

    Parameters
    ----------
    judge : Judge
        The classifier.
    images : Tensor
        float32 (N, channels, H, W) in [-1, 1].
    labels : Tensor
        Requested classes, int64 (N,).

    Returns
    -------
    Tensor
        int64 (C, C) for C classes.

    Raises
    ------
    ValueError
        If images are not finite.
    """
    if not images.isfinite().all():
        raise ValueError("images has entries that are not finite: the network has diverged; lower the learning rate")
    return confusion_counts(labels.cpu(), judge(images)[0].argmax(1), judge.num_classes)


@dataclass(frozen=True, eq=False)
class Examiner:
    """Judges networks on fixed labels and noise, so that differences come from the networks.

    Parameters
    ----------
    judge : Judge
        On the networks' device.
    request : ForgetRequest
        The classes that were to be forgotten.
    schedule : Parametrisation
        The networks' schedule, on their device.
    sampler : Sampler
        The sampler that the network is meant for: one step or DDIM.
    num_inference_steps : int
        Steps if a one-step generator is sampled by DDIM as well.
    seed : int
        Seed of all noise.
    forget_samples, retain_samples : int
        Images of each forgotten and of each retained class.
    forgotten_real : FeatureStatistics, optional
        The judge's features of real images of the forgotten classes.

    Raises
    ------
    ValueError
        If a value is out of range, or the judge has another number of classes than the request.
    """

    judge: Judge
    request: ForgetRequest
    schedule: Parametrisation
    sampler: Sampler
    num_inference_steps: int = 50
    seed: int = 0
    forget_samples: int = 100
    retain_samples: int = 20
    forgotten_real: FeatureStatistics | None = None

    def __post_init__(self) -> None:
        self.sampler.check(self.schedule.num_train_timesteps)
        self.by_ddim.check(self.schedule.num_train_timesteps)
        check_int("seed", self.seed, 0)
        check_int("forget_samples", self.forget_samples, 1)
        check_int("retain_samples", self.retain_samples, 1)
        if self.judge.num_classes != self.request.num_classes:
            raise ValueError(
                f"the judge has {self.judge.num_classes} classes, expected the network's {self.request.num_classes}"
            )

    @property
    def labels(self) -> Tensor:
        """Labels of all images, int64 (N,), the forgotten classes first."""
        parts = [
            torch.tensor(classes).repeat_interleave(count)
            for classes, count in (
                (self.request.forget_classes, self.forget_samples),
                (self.request.retained_classes, self.retain_samples),
            )
        ]
        return torch.cat(parts)

    @property
    def by_ddim(self) -> Sampler:
        """DDIM for the same network."""
        if self.sampler.kind == "ddim":
            return self.sampler
        steps, batch_size = self.num_inference_steps, self.sampler.batch_size
        return Sampler("ddim", num_inference_steps=steps, batch_size=batch_size)

    def draw(self, network: nn.Module, labels: Tensor, seed: int, sampler: Sampler | None = None) -> Tensor:
        """Draw float32 (N, C, H, W) in [-1, 1] on the CPU. The noise of image i depends on ``seed`` and i only."""
        return (sampler or self.sampler).draw(network, self.schedule, labels, seed).cpu()

    def confusion(self, network: nn.Module, sampler: Sampler | None = None) -> Tensor:
        """Compute the ``confusion_matrix`` of a network in eval mode, sampled by its own sampler or another one."""
        return confusion_matrix(self.judge, self._images(network, sampler), self.labels)

    def _images(self, network: nn.Module, sampler: Sampler | None) -> Tensor:
        return self.draw(network, self.labels, derived_seed(self.seed, "examiner"), sampler)

    def measure(self, network: nn.Module, sampler: Sampler | None = None) -> dict[str, float | None]:
        """Compute ``accuracies`` and "forget_frechet", the Fréchet distance of images requested for forgotten classes.

        The distance is from real images of these classes, None without them. The judge may take blurred images for the
        class; the distance shows that they are not.
        """
        images, labels = self._images(network, sampler), self.labels
        accuracies = self.accuracies(confusion_matrix(self.judge, images, labels))
        forgotten = torch.isin(labels, torch.tensor(self.request.forget_classes))
        distance = None
        if self.forgotten_real is not None:
            distance = frechet_distance(self.judge(images[forgotten])[1], self.forgotten_real)
        return {**accuracies, "forget_frechet": distance}

    def accuracies(self, confusion: Tensor) -> dict[str, float]:
        """Compute "ua" and "retain_accuracy", in percent."""
        forgotten = self.request.forget_classes
        return {
            "ua": unlearning_accuracy(confusion, forgotten),
            "retain_accuracy": retained_accuracy(confusion, forgotten),
        }
