"""Diffusion conditional on classes or text: schedule, networks, one-step generator, samplers, losses of unlearning."""

from .conditioning import Conditioning, PromptTable
from .generator import OneStepGenerator, predict_eps
from .losses import distillation_weight, noise_prediction_loss, regression_loss, score_distillation_loss
from .sampler import Sampler
from .sampling import ddim_through, sample_ddim, sample_ddpm, sample_one_step, sample_shape
from .schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule
from .text import TextConditioned, add_adapter, encode_prompts
from .unet import (
    UNetConfig,
    build_unet,
    check_class_conditional,
    class_names,
    fresh_unet,
    null_label,
    num_classes,
    register_classes,
)

__all__ = [
    "NUM_TRAIN_TIMESTEPS",
    "Conditioning",
    "NoiseSchedule",
    "OneStepGenerator",
    "PromptTable",
    "Sampler",
    "TextConditioned",
    "UNetConfig",
    "add_adapter",
    "build_unet",
    "check_class_conditional",
    "class_names",
    "ddim_through",
    "distillation_weight",
    "encode_prompts",
    "fresh_unet",
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
    "score_distillation_loss",
]
