"""Retrain: what everyone is measured against, a network that has never seen the class."""

from dataclasses import dataclass
from typing import Any

import torch

from ..diffusion import fresh_unet
from .denoising import DenoisingOptions, DenoisingPhase
from .many_step import ManyStepMethod, SamplingOptions
from .setting import Setting
from .streams import derived_seed


@dataclass(frozen=True)
class RetrainOptions(SamplingOptions, DenoisingOptions):
    """Options of training without the forgotten classes; the defaults are those of pretraining on CIFAR-10."""

    def check(self, num_train_timesteps: int) -> None:
        super().check(num_train_timesteps)
        self.check_sampling(num_train_timesteps)


class Retrain(ManyStepMethod):
    """Trains a network of the teacher's architecture from scratch on the images of the retained classes.

    The forgotten classes' rows of the class embedding keep their random start, so that what is drawn for them is
    nothing in particular; the cover class plays no part.
    """

    name = "retrain"
    Options = RetrainOptions

    def __init__(self, setting: Setting, options: RetrainOptions) -> None:
        super().__init__(setting, options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(setting.seed, "weights"))
            self.network = fresh_unet(setting.teacher)
        self.phases.append(
            DenoisingPhase(
                setting,
                self.network,
                setting.schedule,
                setting.training_images,
                options,
                name="retrain",
                classes=setting.request.retained_classes,
            )
        )

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        return True
