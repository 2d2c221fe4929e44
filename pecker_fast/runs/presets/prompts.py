"""Presets of Stable Diffusion: a published task each."""

from dataclasses import replace
from typing import Any

from ...training.loop import LoopOptions
from .kinds import PromptPreset

# The published values for Stable Diffusion 1.5. A batch of 8 images is 4 micro-batches of 2; t_max is inclusive.
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
# PECKER trains on 100,000 images, SFD on 300,000.
METHODS: dict[str, dict[str, Any]] = {
    # As published for Stable Diffusion: ESD-u for nudity, ESD-x for concepts with a name.
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
    # As published: 200 epochs of 1,000 surrogate images in batches of 16 (4 on each of 4 GPUs), and 500 for nudity.
    # Steps and guidance of the samples are those of Stable Diffusion, whose public code averages losses over
    # dimensions.
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
    # Drawn as the pretrained model is.
    "relabel": {"eval_sampler": "ddim", "num_inference_steps": 50, "eval_guidance_scale": 7.5},
    # As published for Stable Diffusion 1.5 (SiD-LSG).
    "distil": {"score_learning_rate": 1e-6},
    "sfd": {"max_train_steps": 37_500},
    # The ratio that worked on digits, with the published weight for the generator; not tried at this size.
    "pecker+": {"generator_forget_weight": 1.0, "score_forget_weight": 0.2},
    # Likewise, with the ratio to SFD's rate that worked on digits.
    "patch": {
        "generator_forget_weight": 1.0,
        "score_forget_weight": 0.2,
        "generator_learning_rate": 4e-7,
    },
}
# Nothing is published for SDXL. Values of Stable Diffusion 1.5, with micro-batches of one prompt of each kind.
SDXL: dict[str, Any] = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "saliency_batch_size": 1,
    "saliency_batches": 16,
}
# Samples and checkpoints every 5,000 images, as published.
LOOP = LoopOptions(logging_steps=10, checkpointing_steps=625, checkpoints_total_limit=2, validation_steps=625)

PROMPT_PRESETS: dict[str, PromptPreset] = {
    "sd15-celebrity": PromptPreset(
        subject="celebrity",
        concept="brad pitt",
        cover="a middle aged man",
        unlearning=STABLE_DIFFUSION,
        methods=METHODS,
        loop=LOOP,
    ),
    "sd15-nudity": PromptPreset(
        subject="nudity",
        unlearning={**STABLE_DIFFUSION, "negative_roles": (True, True, True)},
        methods={
            **METHODS,
            "esd": {**METHODS["esd"], "trained": "u"},
            "selective_amnesia": {**METHODS["selective_amnesia"], "max_train_steps": 31_250, "trained": "u"},
        },
        loop=LOOP,
    ),
}
# Nothing is published for unlearning with flow matching. One-step samples start from pure noise, as the pipelines of
# these models draw them; the rest is Stable Diffusion 1.5's with micro-batches of one. Not tried at full size.
FLOW: dict[str, Any] = {**SDXL, "t_init": 999}
# The published network has guidance in it, and draws in one step already.
SPRINT: dict[str, Any] = {
    **FLOW,
    "score_guidance_scale": 1.0,
    "score_eval_guidance_scale": 1.0,
    "teacher_guidance_scale": 1.0,
}


def _variants(name: str, values: PromptPreset) -> dict[str, PromptPreset]:
    """The presets of one task for other models."""

    def with_values(options: dict[str, Any], **fields: Any) -> PromptPreset:
        return replace(values, unlearning={**values.unlearning, **options}, **fields)

    # Text and image share the attention of Stable Diffusion 3: it has no cross-attention to train alone.
    joint = {**values.methods, "esd": {**values.methods["esd"], "trained": "all"}}
    return {
        name.replace("sd15", "sdxl"): with_values(SDXL, xl=True),
        name.replace("sd15", "sd3"): with_values(FLOW, flow=True, methods=joint),
        name.replace("sd15", "sana"): with_values(FLOW, flow=True),
        name.replace("sd15", "sana-sprint"): with_values(SPRINT, flow=True, one_step=True),
    }


for _name, _values in list(PROMPT_PRESETS.items()):
    PROMPT_PRESETS |= _variants(_name, _values)
