"""Diffusion, conditional on classes or text: schedule, networks, one-step generator, samplers, losses of unlearning."""

from .ancestors import load_ancestor
from .files import check_network_folder, load_network, save_network, save_one_step_pipeline
from .generator import OneStepGenerator, predict_eps
from .losses import distillation_weight, noise_prediction_loss, regression_loss, score_distillation_loss
from .sampling import ddim_through, sample_ddim, sample_ddpm, sample_one_step, sample_shape
from .schedule import NoiseSchedule
from .stable_diffusion import StableDiffusion, load_text_unet, save_text_network, save_text_pipeline
from .text import PromptTable, TextConditioned, add_adapter, encode_prompts
from .unet import (
    UNetConfig,
    build_unet,
    check_class_conditional,
    fresh_unet,
    null_label,
    num_classes,
    register_classes,
)

__all__ = [
    "NoiseSchedule",
    "OneStepGenerator",
    "PromptTable",
    "StableDiffusion",
    "TextConditioned",
    "UNetConfig",
    "add_adapter",
    "build_unet",
    "check_class_conditional",
    "check_network_folder",
    "ddim_through",
    "distillation_weight",
    "encode_prompts",
    "fresh_unet",
    "load_ancestor",
    "load_network",
    "load_text_unet",
    "noise_prediction_loss",
    "null_label",
    "num_classes",
    "predict_eps",
    "register_classes",
    "regression_loss",
    "sample_ddim",
    "sample_ddpm",
    "sample_one_step",
    "sample_shape",
    "save_network",
    "save_one_step_pipeline",
    "save_text_network",
    "save_text_pipeline",
    "score_distillation_loss",
]
