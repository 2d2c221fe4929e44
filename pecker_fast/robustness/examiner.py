"""What every probe is given: how networks are sampled, who judges, what was to be forgotten."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion import NoiseSchedule, Sampler
from ..metrics import FeatureStatistics, Judge, frechet_distance
from ..unlearning import ForgetRequest
from ..unlearning.streams import derived_seed


def confusion_matrix(judge: Judge, images: Tensor, labels: Tensor) -> Tensor:
    """int64 (C, C): how many of the images asked for class i the judge calls class j.

    ``images``: float32 (N, C, H, W) in [-1, 1]; ``labels``: int64 (N,). ValueError where images are not finite.
    """
    if not images.isfinite().all():
        raise ValueError("images has entries that are not finite: the network has diverged; lower the learning rate")
    classes = judge.num_classes
    predictions = judge(images)[0].argmax(1)
    return (labels.cpu() * classes + predictions).bincount(minlength=classes**2).view(classes, classes)


def unlearning_accuracy(confusion: Tensor, forget_classes: tuple[int, ...]) -> float:
    """Of the images asked for forgotten classes, the percentage that is called none of them."""
    asked = confusion[list(forget_classes)]
    return 100 - 100 * int(asked[:, list(forget_classes)].sum()) / int(asked.sum())


def retained_accuracy(confusion: Tensor, forget_classes: tuple[int, ...]) -> float:
    """Of the images asked for retained classes, the percentage that is called what was asked for."""
    kept = [label for label in range(len(confusion)) if label not in forget_classes]
    return 100 * int(confusion.diagonal()[kept].sum()) / int(confusion[kept].sum())


@dataclass(frozen=True, eq=False)
class Examiner:
    """Judges networks on fixed labels and noise: what differs is the networks' doing.

    Parameters
    ----------
    judge : Judge
        On the networks' device.
    request : ForgetRequest
        What was to be forgotten.
    schedule : NoiseSchedule
        The networks' schedule, on their device.
    sampler : Sampler
        How the network under examination is meant to be sampled: in one step or by DDIM.
    num_inference_steps : int
        Steps of DDIM if a one-step generator is sampled by it too.
    seed : int
        Seed of everything random.
    forget_samples, retain_samples : int
        Images of each forgotten and of each retained class.
    forgotten_real : FeatureStatistics, optional
        The judge's features of real images of the forgotten classes.
    """

    judge: Judge
    request: ForgetRequest
    schedule: NoiseSchedule
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
                f"the judge knows {self.judge.num_classes} classes, the network {self.request.num_classes}"
            )

    @property
    def labels(self) -> Tensor:
        """int64 (N,): the forgotten classes first."""
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
        """Images float32 (N, C, H, W) in [-1, 1] on the CPU. The noise of sample i depends on ``seed`` and i alone."""
        return (sampler or self.sampler).draw(network, self.schedule, labels, seed).cpu()

    def confusion(self, network: nn.Module, sampler: Sampler | None = None) -> Tensor:
        """``confusion_matrix`` of a network in eval mode, drawn by its own sampler or by another one."""
        return confusion_matrix(self.judge, self._images(network, sampler), self.labels)

    def _images(self, network: nn.Module, sampler: Sampler | None) -> Tensor:
        return self.draw(network, self.labels, derived_seed(self.seed, "examiner"), sampler)

    def measure(self, network: nn.Module, sampler: Sampler | None = None) -> dict[str, float | None]:
        """``accuracies``, and "forget_frechet": Fréchet distance of the images asked for forgotten classes from real
        ones of them. A blur may pass for the class with the judge; here it does not."""
        images, labels = self._images(network, sampler), self.labels
        found = self.accuracies(confusion_matrix(self.judge, images, labels))
        asked = torch.isin(labels, torch.tensor(self.request.forget_classes))
        distance = None
        if self.forgotten_real is not None:
            distance = frechet_distance(self.judge(images[asked])[1], self.forgotten_real)
        return {**found, "forget_frechet": distance}

    def accuracies(self, confusion: Tensor) -> dict[str, float]:
        """ "ua" and "retain_accuracy", in percent."""
        forgotten = self.request.forget_classes
        return {
            "ua": unlearning_accuracy(confusion, forgotten),
            "retain_accuracy": retained_accuracy(confusion, forgotten),
        }
