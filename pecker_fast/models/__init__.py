"""Where networks come from and how they are saved: folders, checkpoints of public code, Stable Diffusion."""

from .ancestors import load_ancestor
from .folders import check_network_folder, load_network, save_network, save_one_step_pipeline
from .saving import save_result
from .stable_diffusion import StableDiffusion, load_text_unet, save_text_network, save_text_pipeline

__all__ = [
    "StableDiffusion",
    "check_network_folder",
    "load_ancestor",
    "load_network",
    "load_text_unet",
    "save_network",
    "save_one_step_pipeline",
    "save_result",
    "save_text_network",
    "save_text_pipeline",
]
