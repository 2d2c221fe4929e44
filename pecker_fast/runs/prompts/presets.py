"""Presets of text-to-image models: what a published task settles."""

from dataclasses import dataclass, field
from typing import Any, Literal

from .loop import LoopOptions

# METHOD's column for Stable Diffusion 1.5. A batch of 8 images is 4 micro-batches of 2; t_max is itself included.
STABLE_DIFFUSION: dict[str, Any] = {
    "max_train_steps": 12_500,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "t_init": 625,
    "t_min": 20,
    "t_max": 979,
    "alpha": 1.0,
    "score_retain_weight": 1.0,
    "score_forget_weight": 1.0,
    "generator_retain_weight": 1.0,
    "generator_forget_weight": 1.0,
    "score_learning_rate": 3e-6,
    "generator_learning_rate": 1e-6,
    "first_stage_score_learning_rate": 1e-6,
    "max_grad_value": None,
    "ema_decay": None,
    "score_guidance_scale": 4.5,
    "score_eval_guidance_scale": 4.5,
    "teacher_guidance_scale": 4.5,
    "condition_dropout": 0.1,
    "saliency_batch_size": 2,
    "saliency_batches": 8,
}
# PECKER is evaluated at 100,000 images, SFD at 300,000.
METHODS: dict[str, dict[str, Any]] = {
    # As published for Stable Diffusion; ESD-u is for nudity, ESD-x for what has a name.
    "esd": {
        "negative_guidance": 1.0,
        "trained": "x",
        "eval_sampler": "ddim",
        "num_inference_steps": 50,
        "eval_guidance_scale": 7.5,
        "logging_steps": 50,
        "checkpointing_steps": 250,
        "validation_steps": 500,
    },
    # As published: 200 epochs of 1,000 surrogate images in batches of 16 (4 on each of 4 GPUs), 500 for nudity. Steps
    # and guidance of samples are Stable Diffusion's, whose public code averages losses over dimensions.
    "selective_amnesia": {
        "max_train_steps": 12_500,
        "train_batch_size": 16,
        "learning_rate": 1e-5,
        "max_grad_norm": None,
        "ema_decay": None,
        "replay_weight": 1.0,
        "ewc_weight": 50.0,
        "loss_reduction": "mean",
        "trained": "all",
        "surrogate_images": 1000,
        "replay_images": 5000,
        "replay_sampler": "ddim",
        "replay_steps": 50,
        "replay_guidance_scale": 7.5,
        "replay_batch_size": 8,
        "fisher_timesteps": 1000,
        "fisher_chunks": 250,
        "fisher_condition_dropout": 0.0,
        "eval_sampler": "ddim",
        "num_inference_steps": 50,
        "eval_guidance_scale": 7.5,
        "teacher_dtype": "float32",
        "logging_steps": 50,
        "checkpointing_steps": 500,
        "validation_steps": 2500,
    },
    "sfd": {"max_train_steps": 37_500},
    # The ratio found on digits, at the published weight of the generator; untried at this size.
    "pecker+": {"generator_forget_weight": 1.0, "score_forget_weight": 0.2},
}
# Samples and checkpoints every 5,000 images, as published.
LOOP = LoopOptions(logging_steps=10, checkpointing_steps=625, checkpoints_total_limit=2, validation_steps=625)


@dataclass(frozen=True)
class TextPreset:
    """What is known of a task on Stable Diffusion.

    Parameters
    ----------
    task: "celebrity" (a concept with a name and its cover) or "nudity" (subjects with keywords, the bare subject as
        cover, the keywords as negative text).
    concept, cover: the published request, where the task has names.
    unlearning: options of score forgetting; a method takes those that it has.
    methods: method to what holds for it alone: options, and fields of the options of loop and memory.
    loop: how a run is kept.
    """

    task: Literal["celebrity", "nudity"]
    concept: str | None = None
    cover: str | None = None
    unlearning: dict[str, Any] = field(default_factory=lambda: dict(STABLE_DIFFUSION))
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(METHODS))
    loop: LoopOptions = LOOP


TEXT_PRESETS: dict[str, TextPreset] = {
    "sd15-celebrity": TextPreset("celebrity", "brad pitt", "a middle aged man"),
    "sd15-nudity": TextPreset(
        "nudity",
        unlearning={**STABLE_DIFFUSION, "negative_roles": (True, True, True)},
        methods={
            **METHODS,
            "esd": {**METHODS["esd"], "trained": "u"},
            "selective_amnesia": {**METHODS["selective_amnesia"], "max_train_steps": 31_250, "trained": "u"},
        },
    ),
}


def text_preset(name: str) -> TextPreset:
    """The preset called ``name``. ValueError where there is none."""
    if name not in TEXT_PRESETS:
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(TEXT_PRESETS)}")
    return TEXT_PRESETS[name]
