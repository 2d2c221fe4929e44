"""What to forget of a text-to-image model: options, and the prompts that they stand for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from ...data.prompts import (
    CONCEPT,
    COVERS,
    concept_pairs,
    default_cover,
    fill,
    keyword_pairs,
    load_concepts,
    load_prompts,
    names_concept,
    negative_text,
    override,
)
from ...unlearning import Placement, PromptRequest
from ...unlearning.streams import derived_seed
from ..presets import PromptPreset

# Prompts of samples, of those to forget and of those to keep.
PICTURED_PROMPTS = 4


@dataclass(frozen=True)
class PromptRequestArguments:
    """What to forget, of which model, and which samples to draw of it."""

    pretrained_model_name_or_path: str | None = None
    """The Stable Diffusion (1.x, 2.x, XL): folder of diffusers or of a run, or name on the Hugging Face hub
    (HF_HUB_OFFLINE=1: from its cache)."""
    concept: str | None = None
    """Name of what to forget. Default: the preset's."""
    cover: str | None = None
    """What to draw in its place. Default: the preset's, or that of the package's list in which the name is."""
    concepts: str | None = None
    """File of several concepts to forget at once, "concept, cover" in each line, in place of concept and cover."""
    forget_prompts: str | None = None
    """File of prompts to forget, or of templates with {concept}, one a line. Default: the preset's."""
    cover_prompts: str | None = None
    """File with the prompt to draw in place of each. Default: the same with the cover in place of the concept."""
    retain_prompts: str = "retain"
    """File of prompts to keep; "retain" is a list that comes with the package."""
    max_retain_prompts: int = 4096
    """Number of these that are drawn at random from a longer file. Each takes 118 KB in bfloat16 on Stable Diffusion
    1.x, 318 KB on XL."""
    negative_prompt: str | None = None
    """Text that stands for "no condition" in the roles of negative_roles. Default: the preset's keywords."""
    resolution: int | None = None
    """Size of the images in pixels. Default: what the model was trained for."""
    distilled: str | None = None
    """Start from the networks in a folder of pecker-fast distil; auto: from those beside the model, which are made if
    there are none. Default: auto if the method needs them."""
    initial_generator: str | None = None
    """U-Net to start the one-step generator from: folder of a run or of a U-Net, such as a converted SiD-LSG checkpoint
    (pecker-fast convert); a file with weights; or a name on the hub, such as stabilityai/sdxl-turbo. Default: the
    model's own."""
    generator_kind: Literal["auto", "plain", "sdxl-turbo", "sdxl-lightning", "dmd2"] = "auto"
    """How initial_generator draws in one step. auto: as its folder records it or by its name; plain: as the model
    predicts, at t_init."""
    initial_score: str | None = None
    """U-Net to start the score network from, given in the same way."""
    fisher: str | None = None
    """For selective_amnesia: file with the Fisher information of the model, which pecker-fast fisher makes."""
    sample_prompts: str | None = None
    """File of prompts to draw at every validation. Default: some prompts to forget and some to keep."""
    samples_per_prompt: int = 2
    """Images of each."""
    sample_guidance_scale: float = 7.5
    """Guidance of the pretrained model's samples, which are drawn by DDIM."""
    sample_steps: int = 50
    """Steps of these samples."""


@dataclass(frozen=True)
class MemoryArguments:
    """Ways to use less memory."""

    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that are trained. In bfloat16 updates are rounded at random, which keeps their mean."""
    master_weights: bool = False
    """With bfloat16: keep float32 copies of the weights instead."""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the frozen teacher."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass."""
    fsdp: bool = False
    """Under torchrun: shard weights, gradients and optimizer states of the trained networks over the processes
    (FSDP2). For pecker, pecker+ and sfd."""
    share_weights: bool = False
    """For patch, with teacher_dtype and weights_dtype alike: one copy of the weights for the teacher and the networks
    that start as it. The same numbers, for a few more forward passes."""
    saliency_parts: int = 1
    """For patch: parts of a network whose scores are computed one after the other. The same mask; the scores of a part
    take memory, and each part takes time."""
    score_lora_rank: int = 0
    """Train the score network as a low-rank change of this rank of its linear layers (needs peft). 0: all of it."""

    def as_placement(self) -> Placement:
        """How a method keeps networks in memory."""
        dtypes = {name: getattr(torch, getattr(self, name)) for name in ("weights_dtype", "teacher_dtype")}
        return Placement(**{**asdict(self), **dtypes})


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run.

    Parameters
    ----------
    request : PromptRequest
        What to forget, to draw in its place and to keep.
    pictured : tuple of str
        Prompts of the samples; the first ``forgotten`` of them are to be forgotten.
    forgotten : int
        Their number.
    concept, cover : str or None
        Names, if there are any; of several concepts one after the other.
    concepts : tuple of (str, str)
        Name and cover of each of several concepts; empty for a request with one or without names.
    """

    request: PromptRequest
    pictured: tuple[str, ...]
    forgotten: int
    concept: str | None
    cover: str | None
    concepts: tuple[tuple[str, str], ...] = ()


def resolve_prompts(args: PromptRequestArguments, preset: PromptPreset, seed: int) -> Prompts:
    """Read the prompt files, and pair each prompt to forget with the one to draw in its place.

    Parameters
    ----------
    args : PromptRequestArguments
        Options of the run.
    preset : PromptPreset
        Values for options that are not set.
    seed : int
        Of the run, for a random choice from a long file.

    Raises
    ------
    ValueError
        If something is missing, does not fit, or leaves nothing to forget.
    """
    concepts = _concepts(args)
    if concepts:
        concept, cover = (", ".join(dict.fromkeys(texts)) for texts in zip(*concepts, strict=True))
        forget, covers = _pairs_of_all(args, concepts)
    else:
        concept, cover = _names(args, preset)
        forget, covers = _pairs(args, preset, concept, cover)
    retain = _retained(args, seed)
    for name, _ in concepts:
        named = next((text for text in retain if names_concept(text, name)), None)
        if named is not None:
            raise ValueError(f"retain_prompts has {named!r}, which names {name!r}, a concept to forget")
    both = set(retain) & set(forget)
    if both:
        raise ValueError(f"{len(both)} prompts are both to keep and to forget, such as {sorted(both)[0]!r}")
    pictured, forgotten = _pictured(args, forget, retain, [name for name, _ in concepts] or [concept])
    request = PromptRequest(retain, forget, covers, _negative(args, preset), pictured)
    return Prompts(request, pictured, forgotten, concept, cover, concepts)


def _concepts(args: PromptRequestArguments) -> tuple[tuple[str, str], ...]:
    """Several concepts and their covers; empty if there is no file of them."""
    if args.concepts is None:
        return ()
    for name in ("concept", "cover", "cover_prompts"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name} is {getattr(args, name)!r}, and concepts is given too: expected one of the two")
    return load_concepts(args.concepts)


def _pairs_of_all(
    args: PromptRequestArguments, concepts: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same templates with each of the concepts, and with its cover: all concepts are equally likely."""
    templates = "celebrity-train" if args.forget_prompts is None else args.forget_prompts
    for line in load_prompts(templates):
        if CONCEPT not in line:
            raise ValueError(f"forget_prompts has {line!r}, expected templates with {CONCEPT}, as concepts is given")
    pairs = [concept_pairs(concept, cover, templates) for concept, cover in concepts]
    return tuple(text for p in pairs for text in p.forget), tuple(text for p in pairs for text in p.cover)


def _names(args: PromptRequestArguments, preset: PromptPreset) -> tuple[str | None, str | None]:
    """Concept and cover; the preset's cover is for its own concept only."""
    concept = preset.concept if args.concept is None and args.forget_prompts is None else args.concept
    if args.cover is not None or concept is None:
        return concept, args.cover
    return concept, preset.cover if concept == preset.concept else default_cover(concept)


def _pairs(
    args: PromptRequestArguments, preset: PromptPreset, concept: str | None, cover: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if args.cover_prompts is not None and args.forget_prompts is None:
        raise ValueError("cover_prompts is given without forget_prompts: expected both, line by line")
    if args.forget_prompts is None and concept is None:
        if preset.subject != "nudity":
            raise ValueError("neither concept nor forget_prompts is given: expected a name, or a file of prompts")
        pairs = keyword_pairs()
        return pairs.forget, pairs.cover
    if args.cover_prompts is not None:
        forget = load_prompts(args.forget_prompts)
        if any(CONCEPT in line for line in forget):
            forget = fill(forget, _required("concept", concept))
        return forget, load_prompts(args.cover_prompts)
    lists = " and ".join(COVERS)
    concept = _required("concept", concept, "cover_prompts, or the concept that a cover replaces in the forget_prompts")
    cover = _required("cover", cover, f"what to draw in place of {concept!r}, which is in none of the lists {lists}")
    if args.forget_prompts is None:
        pairs = concept_pairs(concept, cover)
        return pairs.forget, pairs.cover
    lines = load_prompts(args.forget_prompts)
    forget = fill(lines, concept) if any(CONCEPT in line for line in lines) else lines
    return forget, override(forget, concept, cover)


def _required(name: str, value: str | None, wanted: str = "a name for the templates") -> str:
    if value is None:
        raise ValueError(f"{name} is not given, expected {wanted}")
    return value


def _retained(args: PromptRequestArguments, seed: int) -> tuple[str, ...]:
    if args.max_retain_prompts < 1:
        raise ValueError(f"max_retain_prompts is {args.max_retain_prompts}, expected at least 1")
    # Each once: every text has one label.
    prompts = tuple(dict.fromkeys(load_prompts(args.retain_prompts)))
    if len(prompts) <= args.max_retain_prompts:
        return prompts
    generator = torch.Generator().manual_seed(derived_seed(seed, "retain prompts"))
    order = torch.randperm(len(prompts), generator=generator)[: args.max_retain_prompts]
    return tuple(prompts[i] for i in sorted(order.tolist()))


def _negative(args: PromptRequestArguments, preset: PromptPreset) -> str | None:
    if args.negative_prompt is None:
        return negative_text() if preset.subject == "nudity" and args.forget_prompts is None else None
    return args.negative_prompt or None


def _pictured(
    args: PromptRequestArguments, forget: tuple[str, ...], retain: tuple[str, ...], concepts: Sequence[str | None]
) -> tuple[tuple[str, ...], int]:
    """Prompts of samples, and how many of them are to be forgotten."""
    if args.samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt is {args.samples_per_prompt}, expected at least 1")
    if args.sample_prompts is None:
        shown = max(PICTURED_PROMPTS, len(concepts))
        spread = max(1, len(forget) // shown)
        chosen = tuple(dict.fromkeys(forget[::spread]))[:shown]
        return (*chosen, *retain[:PICTURED_PROMPTS]), len(chosen)
    lines = load_prompts(args.sample_prompts)
    templates = [line for line in lines if CONCEPT in line]
    if templates:
        filled = [text for name in concepts for text in fill(templates, _required("concept", name))]
        others = [line for line in lines if CONCEPT not in line]
        return tuple(dict.fromkeys((*filled, *others))), len(dict.fromkeys(filled))
    named = [line for line in lines if line in set(forget)]
    others = [line for line in lines if line not in set(forget)]
    return tuple(dict.fromkeys((*named, *others))), len(dict.fromkeys(named))
