"""Diffusion conditional on classes or text: schedule, networks, one-step generator, samplers, losses of unlearning."""

from .conditioning import Conditioning, PromptTable
from .generator import OneStepGenerator, predict
from .losses import distillation_weight, prediction_loss, regression_loss, score_distillation_loss
from .parametrisation import Parametrisation, flow_matching, preconditioned
from .sampler import Sampler, pretrained_sampler
from .sampling import ddim_through, sample_ddim, sample_ddpm, sample_one_step, sample_shape
from .schedule import NUM_TRAIN_TIMESTEPS, PREDICTION_TYPES, NoiseSchedule
from .text import TextConditioned, add_adapter, encode_prompts
from .unet import (
    UNetConfig,
    build_unet,
    check_class_conditional,
    class_names,
    fresh_unet,
    guidance_scale,
    null_label,
    num_classes,
    register_classes,
    register_sampling,
)

__all__ = [
    "NUM_TRAIN_TIMESTEPS",
    "PREDICTION_TYPES",
    "Conditioning",
    "NoiseSchedule",
    "OneStepGenerator",
    "Parametrisation",
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
    "flow_matching",
    "fresh_unet",
    "guidance_scale",
    "null_label",
    "num_classes",
    "preconditioned",
    "predict",
    "prediction_loss",
    "pretrained_sampler",
    "register_classes",
    "register_sampling",
    "regression_loss",
    "sample_ddim",
    "sample_ddpm",
    "sample_one_step",
    "sample_shape",
    "score_distillation_loss",
]
