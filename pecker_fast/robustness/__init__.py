"""Robustness of unlearning, one file per probe: relearning, latents, neighbouring classes, guidance, other samplers."""

from .examiner import Examiner, confusion_matrix
from .guidance import guidance
from .latent import LatentOptions, NearestImage, latent, search_steps
from .neighbours import class_distances, neighbours
from .paths import paths, samplers
from .relearn import ATTACKS, RelearnOptions, attacks_on, own_and_ddim, relearn

__all__ = [
    "ATTACKS",
    "Examiner",
    "LatentOptions",
    "NearestImage",
    "RelearnOptions",
    "attacks_on",
    "class_distances",
    "confusion_matrix",
    "guidance",
    "latent",
    "neighbours",
    "own_and_ddim",
    "paths",
    "relearn",
    "samplers",
    "search_steps",
]
