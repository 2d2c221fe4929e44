"""Loading and saving networks: folders, the hub, objects in memory, checkpoints of public code."""

from .ancestors import load_ancestor
from .folders import (
    check_network_folder,
    load_network,
    network_folder,
    save_many_step_pipeline,
    save_network,
    save_one_step_pipeline,
)
from .generators import AUTO, KNOWN, KnownGenerator, OneStep, known_generator, one_step_of, recorded_one_step
from .hub import is_hub_file, is_hub_name
from .loaded import LoadedStableDiffusion, LoadedStableDiffusionXL, read_stable_diffusion
from .resolve import (
    ClassModel,
    TextModel,
    conditioning_of,
    recorded_options,
    resolve,
    resolve_config,
    resolve_text,
    resolve_text_unet,
    shipped_network,
    unet_of,
)
from .saving import save_result
from .schedules import read_schedule, schedule_from_config
from .stable_diffusion import (
    Prediction,
    StableDiffusion,
    load_text_unet,
    save_text_network,
    save_text_pipeline,
)
from .stable_diffusion_xl import StableDiffusionXL
from .weight_files import WeightFiles, find_weight_files, other_weights

__all__ = [
    "AUTO",
    "KNOWN",
    "ClassModel",
    "KnownGenerator",
    "LoadedStableDiffusion",
    "LoadedStableDiffusionXL",
    "OneStep",
    "Prediction",
    "StableDiffusion",
    "StableDiffusionXL",
    "TextModel",
    "WeightFiles",
    "check_network_folder",
    "conditioning_of",
    "find_weight_files",
    "is_hub_file",
    "is_hub_name",
    "known_generator",
    "load_ancestor",
    "load_network",
    "load_text_unet",
    "network_folder",
    "one_step_of",
    "other_weights",
    "read_schedule",
    "read_stable_diffusion",
    "recorded_one_step",
    "recorded_options",
    "resolve",
    "resolve_config",
    "resolve_text",
    "resolve_text_unet",
    "save_many_step_pipeline",
    "save_network",
    "save_one_step_pipeline",
    "save_result",
    "save_text_network",
    "save_text_pipeline",
    "schedule_from_config",
    "shipped_network",
    "unet_of",
]
