"""What ``pecker-fast unlearn`` is told about a text-to-image model: arguments, and the prompts that they come to."""

from dataclasses import asdict, dataclass
from typing import Literal

import torch

from ..data.prompts import (
    CONCEPT,
    COVERS,
    concept_pairs,
    default_cover,
    fill,
    keyword_pairs,
    load_prompts,
    negative_text,
    override,
)
from ..training.text_presets import TextPreset
from ..unlearning import Placement, PromptRequest
from ..unlearning.streams import derived_seed

# Prompts of samples: what is to be forgotten, and what is to stay.
PICTURED_PROMPTS = 4


@dataclass(frozen=True)
class TextRequestArguments:
    """What to forget, of which model, and where to put the result."""

    pretrained_model_name_or_path: str | None = None
    """The Stable Diffusion 1.x or 2.x: a folder as diffusers saves it, the folder of a run, or a name on the Hugging
    Face hub (HF_HUB_OFFLINE=1 keeps to what has been fetched)."""
    concept: str | None = None
    """What is to be forgotten, by name; the preset's by default."""
    cover: str | None = None
    """What is to be drawn in its place; of a name in the lists that come with the package, that list's by default."""
    forget_prompts: str | None = None
    """File of prompts to forget, or of templates with {concept}, one a line; those of the preset by default."""
    cover_prompts: str | None = None
    """File with the prompt to be drawn in place of each; by default the same with the cover for the concept."""
    retain_prompts: str = "retain"
    """File of prompts of what is to stay; "retain" is a list that comes with the package."""
    max_retain_prompts: int = 4096
    """Of a longer file as many are drawn at random: each takes 118 KB in bfloat16 on Stable Diffusion 1.x."""
    negative_prompt: str | None = None
    """Text that stands for "no condition" in the roles of negative_roles; the preset's keywords by default."""
    resolution: int | None = None
    """Of images, in pixels; what the model was trained for by default."""
    initial_generator: str | None = None
    """U-Net to start the one-step generator from: the folder of a run or of a U-Net, such as a converted SiD-LSG
    checkpoint (pecker-fast convert); the model's own by default."""
    initial_score: str | None = None
    """U-Net to start the score network from, likewise."""
    fisher: str | None = None
    """For selective_amnesia: file with the Fisher information of the model, which pecker-fast fisher makes."""
    output_dir: str | None = None
    """Folder of the run; runs/<preset>-<method>-seed<seed> by default."""
    overwrite_output_dir: bool = False
    """Begin anew in a folder that has a run."""
    sample_prompts: str | None = None
    """File of prompts that are drawn at every validation; some of what is to be forgotten and to stay by default."""
    samples_per_prompt: int = 2
    """Images of each."""
    sample_guidance_scale: float = 7.5
    """Guidance of the samples of the pretrained model, which are drawn with DDIM."""
    sample_steps: int = 50
    """Steps of these samples."""
    report_to: str = "none"
    """Where the log goes beside train.jsonl: none or tensorboard."""
    progress_bar: bool = True
    """Show a progress bar."""
    dry_run: bool = False
    """Only print the resolved configuration and an estimate of the memory that it takes."""


@dataclass(frozen=True)
class MemoryArguments:
    """What keeps memory small."""

    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that are trained. In bfloat16 updates are rounded at random, which is right in expectation."""
    master_weights: bool = False
    """With bfloat16: keep float32 copies of the weights instead."""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the frozen teacher."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass."""
    fsdp: bool = False
    """Under torchrun: the processes share out weights, gradients and optimizer states of the networks that are trained
    (FSDP2). For pecker, pecker+ and sfd."""
    score_lora_rank: int = 0
    """Train the score network as a low-rank change of this rank of its linear layers (needs peft); 0: all of it."""

    def placement(self) -> Placement:
        """What a method is given of them."""
        dtypes = {name: getattr(torch, getattr(self, name)) for name in ("weights_dtype", "teacher_dtype")}
        return Placement(**{**asdict(self), **dtypes})


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run: ``request``, and those of its samples, ``forgotten`` of which come first."""

    request: PromptRequest
    pictured: tuple[str, ...]
    forgotten: int
    concept: str | None
    cover: str | None


def resolve_prompts(args: TextRequestArguments, preset: TextPreset, seed: int) -> Prompts:
    """Reads the prompt files and pairs what is to be forgotten with what is to be drawn instead.

    Raises ValueError where something is missing, does not fit, or leaves nothing to forget.
    """
    concept, cover = _names(args, preset)
    forget, covers = _pairs(args, preset, concept, cover)
    retain = _retained(args, seed)
    both = set(retain) & set(forget)
    if both:
        raise ValueError(f"{len(both)} prompts are to stay and to be forgotten, such as {sorted(both)[0]!r}")
    pictured, forgotten = _pictured(args, forget, retain, concept)
    request = PromptRequest(retain, forget, covers, _negative(args, preset), pictured)
    return Prompts(request, pictured, forgotten, concept, cover)


def _names(args: TextRequestArguments, preset: TextPreset) -> tuple[str | None, str | None]:
    """Concept and cover; the preset's cover holds for its own concept alone."""
    concept = preset.concept if args.concept is None and args.forget_prompts is None else args.concept
    if args.cover is not None or concept is None:
        return concept, args.cover
    return concept, preset.cover if concept == preset.concept else default_cover(concept)


def _pairs(
    args: TextRequestArguments, preset: TextPreset, concept: str | None, cover: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if args.cover_prompts is not None and args.forget_prompts is None:
        raise ValueError("cover_prompts is given without forget_prompts: expected both, a line for each other")
    if args.forget_prompts is None and concept is None:
        if preset.task != "nudity":
            raise ValueError("concept is not given, nor a file of forget_prompts")
        pairs = keyword_pairs()
        return pairs.forget, pairs.cover
    if args.cover_prompts is not None:
        forget = load_prompts(args.forget_prompts)
        if any(CONCEPT in line for line in forget):
            forget = fill(forget, _given("concept", concept))
        return forget, load_prompts(args.cover_prompts)
    known = " and ".join(COVERS)
    concept = _given("concept", concept, "cover_prompts, or the concept that a cover replaces in the forget_prompts")
    cover = _given("cover", cover, f"what is to be drawn in place of {concept!r}, which is not in the lists {known}")
    if args.forget_prompts is None:
        pairs = concept_pairs(concept, cover)
        return pairs.forget, pairs.cover
    lines = load_prompts(args.forget_prompts)
    forget = fill(lines, concept) if any(CONCEPT in line for line in lines) else lines
    return forget, override(forget, concept, cover)


def _given(name: str, value: str | None, wanted: str = "a name for the templates") -> str:
    if value is None:
        raise ValueError(f"{name} is not given, expected {wanted}")
    return value


def _retained(args: TextRequestArguments, seed: int) -> tuple[str, ...]:
    if args.max_retain_prompts < 1:
        raise ValueError(f"max_retain_prompts is {args.max_retain_prompts}, expected at least 1")
    # Each once: a label is a text.
    found = tuple(dict.fromkeys(load_prompts(args.retain_prompts)))
    if len(found) <= args.max_retain_prompts:
        return found
    generator = torch.Generator().manual_seed(derived_seed(seed, "retain prompts"))
    order = torch.randperm(len(found), generator=generator)[: args.max_retain_prompts]
    return tuple(found[i] for i in sorted(order.tolist()))


def _negative(args: TextRequestArguments, preset: TextPreset) -> str | None:
    if args.negative_prompt is None:
        return negative_text() if preset.task == "nudity" and args.forget_prompts is None else None
    return args.negative_prompt or None


def _pictured(
    args: TextRequestArguments, forget: tuple[str, ...], retain: tuple[str, ...], concept: str | None
) -> tuple[tuple[str, ...], int]:
    """Prompts of samples, and how many of them are of what is to be forgotten."""
    if args.samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt is {args.samples_per_prompt}, expected at least 1")
    if args.sample_prompts is None:
        spread = max(1, len(forget) // PICTURED_PROMPTS)
        chosen = tuple(dict.fromkeys(forget[::spread]))[:PICTURED_PROMPTS]
        return (*chosen, *retain[:PICTURED_PROMPTS]), len(chosen)
    lines = load_prompts(args.sample_prompts)
    if any(CONCEPT in line for line in lines):
        filled = fill([line for line in lines if CONCEPT in line], _given("concept", concept))
        others = [line for line in lines if CONCEPT not in line]
        return tuple(dict.fromkeys((*filled, *others))), len(dict.fromkeys(filled))
    named = [line for line in lines if line in set(forget)]
    others = [line for line in lines if line not in set(forget)]
    return tuple(dict.fromkeys((*named, *others))), len(dict.fromkeys(named))
