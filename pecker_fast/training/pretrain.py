"""Pretraining of the class-conditional teacher: denoising diffusion (DDPM, arXiv 2006.11239) on labelled images."""

from dataclasses import dataclass

from torch import nn

from ..diffusion import Parametrisation
from ..unlearning import Compute, Images
from ..unlearning.denoising import DenoisingOptions, DenoisingPhase


@dataclass(frozen=True)
class PretrainOptions(DenoisingOptions):
    """Options of pretraining; the defaults are those published for CIFAR-10."""


class Pretraining(DenoisingPhase):
    """Steps on E ||eps - eps_theta(x_t, t, c)||^2, t uniform in [0, T), on all images of a data set.

    Parameters
    ----------
    compute : Compute
        How to compute.
    network : nn.Module
        Trained in place.
    schedule : Parametrisation
        Noise levels.
    dataset : Images
        Training images.
    options : PretrainOptions
        Hyper-parameters.
    """

    def __init__(
        self, compute: Compute, network: nn.Module, schedule: Parametrisation, dataset: Images, options: PretrainOptions
    ) -> None:
        super().__init__(compute, network, schedule, dataset, options, name="pretrain")
