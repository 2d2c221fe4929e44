"""Presets: everything that a data set settles, as typed configurations."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..diffusion import UNetConfig
from ..unlearning.denoising import DenoisingOptions
from ..unlearning.options import ScoreForgettingOptions
from .loop import LoopOptions
from .pretrain import PretrainOptions
from .text_presets import TEXT_PRESETS, TextPreset


@dataclass(frozen=True)
class Preset:
    """What is known of a data set.

    Parameters
    ----------
    dataset: name for ``load_dataset``.
    unet: architecture that ``pretrain`` makes.
    pretrain: how it is trained.
    unlearning: options of score forgetting by name; a method takes those that it has. Training from scratch takes
        those of ``pretrain``.
    methods: method to what holds for it alone: options, and fields of the loop's options.
    loop: how an unlearning run is kept. pretrain_loop: a pretraining run.
    judge: name of the shipped judge, or None.
    network: name of the shipped pretrained network, or None.
    samples_per_class: images drawn of each class for an evaluation while a run is under way.
    final_samples_per_class: for one on its own, as published; None: the same.
    reference_split: real images that generated ones are measured against, as published.
    forget_class, cover_class: the published request.
    """

    dataset: str
    unet: UNetConfig
    pretrain: PretrainOptions
    unlearning: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    loop: LoopOptions = field(default_factory=LoopOptions)
    pretrain_loop: LoopOptions = field(default_factory=LoopOptions)
    judge: str | None = None
    network: str | None = None
    samples_per_class: int = 100
    final_samples_per_class: int | None = None
    reference_split: str = "all"
    forget_class: int = 0
    cover_class: int = 1


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

# An evaluation takes 1000 evaluations of the network an image; steps that must not be lost take hours.
PHOTOGRAPHS = {
    "retrain": {"checkpointing_steps": 10_000, "validation_steps": 50_000},
    "salun": {"checkpointing_steps": 250},
    "selective_amnesia": {"checkpointing_steps": 500},
    "esd": {"checkpointing_steps": 250},
}

# METHOD's table of published hyper-parameters: the defaults of the options are CIFAR-10's, STL-10 differs as said here.
PRESETS: dict[str, Preset] = {
    "digits": Preset(
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
        # Found by the trials that docs/methods.md tells of. The shipped network has no label for "no condition", so
        # there is no guidance anywhere.
        methods={
            "retrain": {**DIGITS_SAMPLING, "validation_steps": 3000, "checkpointing_steps": 500, "logging_steps": 50},
            "salun": {
                **DIGITS_SAMPLING,
                **DIGITS_REPLAY,
                "max_train_steps": 120,
                "train_batch_size": 48,
                "forget_batch_size": 16,
                "learning_rate": 1e-3,
                "lr_scheduler": "cosine",
                # As the published one: 64 dimensions instead of 3072.
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
    "cifar10": Preset(
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
    "stl10": Preset(
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


# The same digits with more pixels, for a network that is one level deeper. Four times as many pixels show as much at
# four times the noise power, so images are drawn from a later timestep: abar is .19 at 400, .52 at 250.
PRESETS["digits16"] = replace(
    PRESETS["digits"],
    unet=replace(PRESETS["digits"].unet, sample_size=16, block_out_channels=(24, 48, 64)),
    unlearning={**PRESETS["digits"].unlearning, "t_init": 400},
    judge="digits16",
    network="digits16",
)


def preset(name: str) -> Preset:
    """The preset called ``name``. ValueError where there is none."""
    if name not in PRESETS:
        text = f"text-to-image models are unlearned with {' and '.join(TEXT_PRESETS)}"
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(PRESETS)} ({text})")
    return PRESETS[name]


def _found(name: str) -> Preset | TextPreset:
    return TEXT_PRESETS[name] if name in TEXT_PRESETS else preset(name)


def method_options(name: str, method: type) -> Any:
    """The options of an unlearning method on a preset: its own defaults first, then the preset's for its kind, then the
    class's, then the preset's for it alone."""
    found = _found(name)
    pretrain = asdict(found.pretrain) if isinstance(found, Preset) else {}
    kinds = ((ScoreForgettingOptions, found.unlearning), (DenoisingOptions, pretrain))
    shared = next((values for kind, values in kinds if issubclass(method.Options, kind)), {})
    values = {**shared, **method.defaults, **found.methods.get(method.name, {})}
    return method.Options(**_known(values, method.Options))


def method_loop(name: str, method: type) -> LoopOptions:
    """How a run of an unlearning method is kept on a preset."""
    return replace(_found(name).loop, **method_values(name, method, LoopOptions))


def method_values(name: str, method: type, kind: type) -> dict[str, Any]:
    """Of what a preset says for a method alone, that which is a field of the dataclass ``kind``."""
    return _known(_found(name).methods.get(method.name, {}), kind)


def _known(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """Of ``values`` the fields of ``kind``."""
    known = {item.name for item in fields(kind)}
    return {key: value for key, value in values.items() if key in known}
