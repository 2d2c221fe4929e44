"""Pretraining of the class-conditional teacher: denoising diffusion (DDPM, arXiv 2006.11239) on labelled images."""

from dataclasses import dataclass

from torch import nn

from ..diffusion import NoiseSchedule
from ..unlearning import Compute
from ..unlearning.denoising import DenoisingOptions, DenoisingPhase
from ..unlearning.setting import Images


@dataclass(frozen=True)
class PretrainOptions(DenoisingOptions):
    """Options of pretraining; the defaults are those published for CIFAR-10."""


class Pretraining(DenoisingPhase):
    """Steps on E ||eps - eps_theta(x_t, t, c)||^2, t uniform in [0, T), on all images of ``dataset``."""

    def __init__(
        self, compute: Compute, network: nn.Module, schedule: NoiseSchedule, dataset: Images, options: PretrainOptions
    ) -> None:
        super().__init__(compute, network, schedule, dataset, options, name="pretrain")
