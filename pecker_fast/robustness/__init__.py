"""Does it stay forgotten? A probe a file: relearning, latents, neighbouring classes, guidance, other samplers."""

from .examiner import Examiner, confusion_matrix, retained_accuracy, unlearning_accuracy
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
    "retained_accuracy",
    "samplers",
    "search_steps",
    "unlearning_accuracy",
]
