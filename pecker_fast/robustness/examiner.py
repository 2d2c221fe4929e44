"""What every probe is given: how networks are sampled, who judges, what was to be forgotten."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion import NoiseSchedule, OneStepGenerator, ddim_through, sample_ddim, sample_one_step
from ..metrics import FeatureStatistics, Judge, frechet_distance
from ..unlearning import ForgetRequest
from ..unlearning.streams import derived_seed


@dataclass(frozen=True, eq=False)
class Sampler:
    """How a network is sampled: in one step, or by DDIM.

    Parameters
    ----------
    schedule: of the networks, on their device.
    t_init: timestep at which a one-step generator is fed noise; None: by DDIM.
    num_inference_steps: of DDIM.
    batch_size: samples in a call of the network.
    """

    schedule: NoiseSchedule
    t_init: int | None
    num_inference_steps: int = 50
    batch_size: int = 256

    def __post_init__(self) -> None:
        steps = self.schedule.num_train_timesteps
        if self.t_init is not None:
            check_int("t_init", self.t_init, 0, steps)
        check_int("num_inference_steps", self.num_inference_steps, 1, steps + 1)
        check_int("batch_size", self.batch_size, 1)

    @property
    def name(self) -> str:
        return f"DDIM, {self.num_inference_steps} steps" if self.t_init is None else f"one step at {self.t_init}"

    @property
    def by_ddim(self) -> "Sampler":
        """DDIM on the same schedule."""
        return Sampler(self.schedule, None, self.num_inference_steps, self.batch_size)

    def at(self, t_init: int) -> "Sampler":
        """One step at another timestep."""
        return Sampler(self.schedule, t_init, self.num_inference_steps, self.batch_size)

    def draw(self, network: nn.Module, labels: Tensor, seed: int, guidance_scale: float = 1.0) -> Tensor:
        """Images float32 (N, C, H, W) in [-1, 1] on the CPU. The noise of sample i depends on seed and i alone."""
        options = {"batch_size": self.batch_size, "seed": seed, "guidance_scale": guidance_scale}
        if self.t_init is not None:
            images = sample_one_step(network, OneStepGenerator(self.schedule, self.t_init), labels, **options)
        else:
            images = sample_ddim(network, self.schedule, labels, self.num_inference_steps, **options)
        return images.cpu()

    def through(self, network: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
        """Images float32, the shape of ``z``, not clamped, with the gradients of ``z`` and of the weights."""
        if self.t_init is not None:
            return OneStepGenerator(self.schedule, self.t_init).through(network, z, labels)
        return ddim_through(network, self.schedule, z, labels, self.num_inference_steps)


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
    judge: on the networks' device.
    request: what was to be forgotten.
    sampler: of the network under examination.
    seed: of everything random.
    forget_samples, retain_samples: images of each forgotten and of each retained class.
    forgotten_real: the judge's features of real images of the forgotten classes, where there are any.
    """

    judge: Judge
    request: ForgetRequest
    sampler: Sampler
    seed: int = 0
    forget_samples: int = 100
    retain_samples: int = 20
    forgotten_real: FeatureStatistics | None = None

    def __post_init__(self) -> None:
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

    def confusion(self, network: nn.Module, sampler: Sampler | None = None, guidance_scale: float = 1.0) -> Tensor:
        """``confusion_matrix`` of a network in eval mode, drawn by its own sampler or another one."""
        return confusion_matrix(self.judge, self._images(network, sampler, guidance_scale), self.labels)

    def _images(self, network: nn.Module, sampler: Sampler | None, guidance_scale: float = 1.0) -> Tensor:
        seed = derived_seed(self.seed, "examiner")
        return (sampler or self.sampler).draw(network, self.labels, seed, guidance_scale)

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
