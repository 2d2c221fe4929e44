"""Presets of data sets with classes: the published values, and those for the digits that come with the package."""

from dataclasses import replace
from typing import Any

from ...diffusion import UNetConfig
from ...training.loop import LoopOptions
from ...training.pretrain import PretrainOptions
from .kinds import ClassPreset

DIGITS_SAMPLING = {
    "eval_sampler": "ddim",
    "num_inference_steps": 50,
    "eval_guidance_scale": 1.0,
    "clip_sample": True,
}
DIGITS_REPLAY = {
    "replay_images_per_class": 20,
    "replay_sampler": "ddim",
    "replay_steps": 25,
    "replay_guidance_scale": 1.0,
}

# Drawing an image for an evaluation takes 1000 calls of the network: evaluate rarely. Training takes hours: save often.
PHOTOGRAPHS = {
    "retrain": {"checkpointing_steps": 10_000, "validation_steps": 50_000},
    "salun": {"checkpointing_steps": 250},
    "selective_amnesia": {"checkpointing_steps": 500},
    "esd": {"checkpointing_steps": 250},
    # The ratio to SFD's rate that worked on digits; not tried on photographs.
    "patch": {"generator_learning_rate": 4e-6},
}

# The published hyper-parameters: the defaults of the options are those of CIFAR-10, and STL-10 differs from them here.
CLASS_PRESETS: dict[str, ClassPreset] = {
    "digits": ClassPreset(
        dataset="digits",
        unet=UNetConfig(
            sample_size=8,
            num_classes=10,
            in_channels=1,
            block_out_channels=(24, 48),
            layers_per_block=1,
            attention_resolutions=(),
            mid_attention=False,
            norm_num_groups=8,
            dropout=0.0,
        ),
        pretrain=PretrainOptions(
            max_train_steps=3000,
            train_batch_size=64,
            learning_rate=2e-3,
            lr_scheduler="cosine",
            max_grad_norm=None,
            ema_decay=0.998,
            condition_dropout=0.0,
            random_flip=False,
        ),
        unlearning={
            "max_train_steps": 120,
            "train_batch_size": 48,
            "forget_batch_size": 16,
            "t_init": 250,
            "score_learning_rate": 6e-4,
            "generator_learning_rate": 6e-4,
            "first_stage_steps": 120,
            "first_stage_score_learning_rate": 6e-4,
            "lr_scheduler": "linear",
            "score_forget_weight": 0.1,
            "generator_forget_weight": 0.1,
            "ema_decay": 0.97,
            "saliency_batch_size": 64,
        },
        loop=LoopOptions(logging_steps=5, checkpointing_steps=50, checkpoints_total_limit=2, validation_steps=10),
        pretrain_loop=LoopOptions(
            logging_steps=50, checkpointing_steps=500, checkpoints_total_limit=2, validation_steps=1000
        ),
        # Chosen in the trials of docs/methods.md. The shipped network has no label for "no condition", so nothing is
        # guided.
        methods={
            "distil": {"max_train_steps": 300, "score_learning_rate": 6e-4, "validation_steps": 100},
            # docs/patches.md. Half of the iterations of the others: it starts from a distilled generator, and what is
            # drawn for the class loses diversity later.
            "patch": {"generator_learning_rate": 2.4e-4, "max_train_steps": 60},
            "retrain": {**DIGITS_SAMPLING, "validation_steps": 3000, "checkpointing_steps": 500, "logging_steps": 50},
            "salun": {
                **DIGITS_SAMPLING,
                **DIGITS_REPLAY,
                "max_train_steps": 120,
                "train_batch_size": 48,
                "forget_batch_size": 16,
                "learning_rate": 1e-3,
                "lr_scheduler": "cosine",
                # The published weight, scaled to 64 dimensions from 3072.
                "retain_weight": 0.05,
                "random_flip": False,
                "saliency_guidance_scale": 1.0,
                "saliency_batch_size": 64,
                "validation_steps": 123,
            },
            "selective_amnesia": {
                **DIGITS_SAMPLING,
                **DIGITS_REPLAY,
                "max_train_steps": 150,
                "train_batch_size": 48,
                "learning_rate": 1e-3,
                "lr_scheduler": "cosine",
                "ema_decay": 0.97,
                "ewc_weight": 0.01,
                "fisher_samples": 20,
                "fisher_timesteps": 100,
                "fisher_chunks": 1,
                "validation_steps": 171,
            },
            "relabel": DIGITS_SAMPLING,
            "esd": {
                **DIGITS_SAMPLING,
                "max_train_steps": 100,
                "train_batch_size": 16,
                "learning_rate": 6e-4,
                "lr_scheduler": "cosine",
                "negative_guidance": 1.0,
                "trained": "x",
                "empty_prompt": "mean",
                "trajectory_steps": 10,
                "trajectory_guidance_scale": 1.0,
                "validation_steps": 100,
            },
        },
        judge="digits",
        network="digits",
    ),
    "cifar10": ClassPreset(
        dataset="cifar10",
        unet=UNetConfig(sample_size=32, num_classes=10, null_label=True, dropout=0.1),
        pretrain=PretrainOptions(),
        methods=PHOTOGRAPHS,
        loop=LoopOptions(logging_steps=100, checkpointing_steps=5000, checkpoints_total_limit=3, validation_steps=5000),
        pretrain_loop=LoopOptions(
            logging_steps=100, checkpointing_steps=10_000, checkpoints_total_limit=3, validation_steps=50_000
        ),
        samples_per_class=500,
        final_samples_per_class=5000,
        reference_split="train",
    ),
    "stl10": ClassPreset(
        dataset="stl10",
        unet=UNetConfig(
            sample_size=64,
            num_classes=10,
            null_label=True,
            block_out_channels=(128, 256, 256, 256, 512),
            dropout=0.1,
        ),
        pretrain=PretrainOptions(max_train_steps=250_000),
        unlearning={"train_batch_size": 64, "score_learning_rate": 3e-5},
        methods={**PHOTOGRAPHS, "selective_amnesia": {**PHOTOGRAPHS["selective_amnesia"], "train_batch_size": 64}},
        loop=LoopOptions(logging_steps=100, checkpointing_steps=5000, checkpoints_total_limit=3, validation_steps=5000),
        pretrain_loop=LoopOptions(
            logging_steps=100, checkpointing_steps=10_000, checkpoints_total_limit=3, validation_steps=50_000
        ),
        samples_per_class=500,
        final_samples_per_class=1300,
    ),
}


FINER = {"saliency_chunks": 256}

# The same digits with four times the pixels, for a network that is one level deeper. That many pixels show as much at
# four times the noise power, so images are drawn from a later timestep: abar is .19 at 400 and .52 at 250.
CLASS_PRESETS["digits16"] = replace(
    CLASS_PRESETS["digits"],
    unet=replace(CLASS_PRESETS["digits"].unet, sample_size=16, block_out_channels=(24, 48, 64)),
    unlearning={**CLASS_PRESETS["digits"].unlearning, "t_init": 400},
    # More weights need a better estimate of the ratio: docs/patches.md.
    methods={**CLASS_PRESETS["digits"].methods, "patch": {**CLASS_PRESETS["digits"].methods["patch"], **FINER}},
    judge="digits16",
    network="digits16",
)

# Images of a size at which a class is recognised at a glance. Most of the parameters are at 7 x 7 pixels, where they
# cost the least time. There are twelve times the pixels of the digits: abar is .08 at 500. Everything is for a CPU with
# two cores: small batches, few evaluations.
_DIGITS = CLASS_PRESETS["digits"]
# Stronger guidance and more steps draw more digits as others: this network is too small for them.
MNIST_GUIDANCE, MNIST_STEPS = 1.2, 25
_GUIDED = ("eval_guidance_scale", "replay_guidance_scale", "saliency_guidance_scale", "trajectory_guidance_scale")


def _guided(method: str) -> dict[str, Any]:
    """The digits' values of a method, for a network with a label for "no condition"."""
    values = {**_DIGITS.methods[method], "num_inference_steps": MNIST_STEPS}
    return {name: MNIST_GUIDANCE if name in _GUIDED else value for name, value in values.items()}


CLASS_PRESETS["mnist"] = replace(
    _DIGITS,
    dataset="mnist",
    unet=replace(_DIGITS.unet, sample_size=28, null_label=True, block_out_channels=(32, 64, 96)),
    pretrain=replace(
        _DIGITS.pretrain,
        max_train_steps=10_000,
        learning_rate=1e-3,
        ema_decay=0.999,
        condition_dropout=0.1,
        random_shift=1,
    ),
    pretrain_in_bf16=True,
    # An evaluation draws 1,000 images in 50 calls of the network each: there is one, at the end.
    pretrain_loop=LoopOptions(
        logging_steps=50, checkpointing_steps=200, checkpoints_total_limit=2, validation_steps=10_000
    ),
    unlearning={**_DIGITS.unlearning, "t_init": 500, "train_batch_size": 24, "forget_batch_size": 8},
    guidance_scale=MNIST_GUIDANCE,
    num_inference_steps=MNIST_STEPS,
    methods={
        "patch": {**_DIGITS.methods["patch"], **FINER},
        "distil": {
            "max_train_steps": 400,
            "train_batch_size": 48,
            "score_learning_rate": 6e-4,
            "validation_steps": 100,
            "checkpointing_steps": 25,
        },
        "retrain": {**_guided("retrain"), "validation_steps": 10_000, "checkpointing_steps": 200},
        # The published weight, scaled to 784 dimensions from 3072.
        "salun": {**_guided("salun"), "retain_weight": 0.004},
        "selective_amnesia": _guided("selective_amnesia"),
        "relabel": _guided("relabel"),
        "esd": {**_guided("esd"), "empty_prompt": "null"},
    },
    loop=replace(_DIGITS.loop, checkpointing_steps=20),
    judge="mnist",
    network="mnist",
    demo={"distilled": "auto", "max_train_steps": 60},
)

# openai/diffusers-cd_imagenet64_l2 and other consistency models of ImageNet at 64 x 64: 40 noise levels, and one-step
# samples start from the last. The range of t leaves out the largest fifth, as SiD's does (arXiv 2404.04057), and the
# learning rates are SiD's for ImageNet; batch and weights are those for CIFAR-10. Not tried at this size.
CLASS_PRESETS["imagenet64"] = ClassPreset(
    dataset=None,
    imagenet=True,
    # What pecker-fast pretrain makes; consistency models come with their own architecture.
    unet=replace(CLASS_PRESETS["stl10"].unet, num_classes=1000),
    pretrain=CLASS_PRESETS["stl10"].pretrain,
    unlearning={
        "t_init": 39,
        "t_min": 1,
        "t_max": 31,
        "train_batch_size": 64,
        "score_learning_rate": 4e-6,
        "generator_learning_rate": 4e-6,
    },
    methods={
        "relabel": {"eval_sampler": "ddim", "num_inference_steps": 40},
        "patch": {"generator_learning_rate": 4e-6},
    },
    loop=CLASS_PRESETS["stl10"].loop,
    pretrain_loop=CLASS_PRESETS["stl10"].pretrain_loop,
    samples_per_class=10,
    final_samples_per_class=50,
    one_step=True,
)
