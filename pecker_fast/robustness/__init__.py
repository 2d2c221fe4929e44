"""Robustness of unlearning, one file per probe: relearning, latents, neighbouring classes, guidance, other samplers."""

from .cost import Cost, Verdict, compare_costs, costs_of, mean_steps, steps_to_half, strongest
from .examiner import Examiner, confusion_matrix
from .guidance import guidance
from .latent import LatentOptions, NearestImage, latent, search_steps
from .neighbours import class_distances, neighbours
from .paths import paths, samplers
from .relearn import ATTACKS, EMBEDDING, RelearnOptions, attacks_on, own_and_ddim, relearn
from .text import INVERSION, TEXT_ATTACKS, TextAdversary, TextExaminer, TextRelearnOptions, attack_text, text_attacks_on
from .token import WORD

__all__ = [
    "ATTACKS",
    "EMBEDDING",
    "INVERSION",
    "TEXT_ATTACKS",
    "WORD",
    "Cost",
    "Examiner",
    "LatentOptions",
    "NearestImage",
    "RelearnOptions",
    "TextAdversary",
    "TextExaminer",
    "TextRelearnOptions",
    "Verdict",
    "attack_text",
    "attacks_on",
    "class_distances",
    "compare_costs",
    "confusion_matrix",
    "costs_of",
    "guidance",
    "latent",
    "mean_steps",
    "neighbours",
    "own_and_ddim",
    "paths",
    "relearn",
    "samplers",
    "search_steps",
    "steps_to_half",
    "strongest",
    "text_attacks_on",
]
