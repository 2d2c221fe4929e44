"""Retrain: the reference for all methods, a network that has never seen the forgotten classes."""

from dataclasses import dataclass
from typing import Any

import torch

from ..diffusion import NUM_TRAIN_TIMESTEPS, fresh_unet
from .denoising import DenoisingOptions, DenoisingPhase
from .many_step import ManyStepMethod, SamplingOptions
from .setting import Setting
from .streams import derived_seed


@dataclass(frozen=True)
class RetrainOptions(SamplingOptions, DenoisingOptions):
    """Options of training without the forgotten classes; the defaults are those of pretraining on CIFAR-10."""

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        self.check_sampling(num_train_timesteps)


class Retrain(ManyStepMethod):
    """Trains a network of the teacher's architecture from scratch on the images of the retained classes.

    The forgotten classes' rows of the class embedding keep their random start, so samples of them show nothing in
    particular; the cover class plays no part.
    """

    name = "retrain"
    Options = RetrainOptions

    def __init__(self, setting: Setting, options: RetrainOptions) -> None:
        super().__init__(setting, options)
        problem = setting.problem
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(setting.compute.seed, "weights"))
            self.network = fresh_unet(problem.teacher)
        self.phases.append(
            DenoisingPhase(
                setting.compute,
                self.network,
                problem.schedule,
                problem.training_images,
                options,
                name="retrain",
                classes=problem.request.retained_classes,
            )
        )

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        return True
