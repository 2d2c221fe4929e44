"""Measuring text-to-image models: how well a concept was forgotten, and what was kept."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...data import EvaluationPrompts
from ...diffusion.sld import SAFETY_CONCEPT
from ...metrics import ClipModel, ConceptMeter, Uint8Images, clip_score, image_quality
from ..arguments import device_of
from ..evaluate import EvaluateArguments
from ..presets import prompt_preset
from ..samples import SampleCache
from .measure import Captions, DetectorArguments, MeasureArguments, real_image
from .parts import Concept, Part, near_alternatives, prompts_of, shown_first
from .sampling import PromptSampler, SamplerOptions, read_model
from .sheets import pictured, prompt_items, save_sheets

# Images that are drawn, measured and cached at a time.
CHUNK = 100


@dataclass(frozen=True, kw_only=True)
class PromptEvaluation(EvaluateArguments):
    """Options of an evaluation of a text-to-image model."""

    preset: str | None = None
    """sd15-celebrity, sd15-nudity, sdxl-celebrity or sdxl-nudity, in place of task and concept."""
    task: Literal["celebrity", "nudity"] | None = None
    """What is measured. Default: that of the run."""
    concept: str | None = None
    """Name of the celebrity. Default: that of the run."""
    base: str | None = None
    """Folder of the Stable Diffusion that the other parts come from, if the model is only a U-Net."""
    sampler: Literal["auto", "one_step", "ddim", "sld"] = "auto"
    """one_step; ddim with guidance; sld: ddim steered away from a text; auto: in one step for a one-step generator,
    otherwise ddim."""
    t_init: int | None = None
    """Timestep of the one-step sampler. Default: that of the run."""
    sld: Literal["weak", "medium", "strong", "max"] = "max"
    """Configuration of SLD."""
    before: str | None = None
    """Model that draws the pictures of "before", by ddim. Default: the base."""
    measure_before: bool | None = None
    """Measure the model that the run started from, too, with the same prompts, seeds and detectors. Its images are kept
    in a folder before-... beside the run, for all runs that start from it. Default: of a run, if there is a
    detector."""
    images: MeasureArguments = field(default_factory=MeasureArguments)
    """What is drawn."""
    detectors: DetectorArguments = field(default_factory=DetectorArguments)
    """What measures it."""

    key: ClassVar = "concept"
    runs_measure: ClassVar = False

    def measure(self, target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        model, task, concepts = self._subject()
        concept = ", ".join(c.name for c in concepts if c.name is not None) or None
        trained_on = self.config.get("prompts", {}).get("forget")
        prompts, parts, count, captions = prompts_of(self.images, task, concepts, trained_on)
        device, seed, folder = device_of(self.device), self.images.sample_seed, target.parent
        detectors = self.detectors.load(task, device)
        meters = self._meters(detectors, prompts, parts, count)
        options = SamplerOptions(
            sampler=self.sampler,
            t_init=self.t_init,
            num_inference_steps=self.images.num_inference_steps,
            guidance_scale=self.images.guidance_scale,
            sld=self.sld,
            safety_text=self.images.safety_text or (SAFETY_CONCEPT if task == "nudity" else concept),
            resolution=self.images.resolution,
        )
        how = {"device": device, "dtype": self.images.dtype, "batch_size": self.images.batch_size}
        texts = [*prompts.prompts, *prompts.near]
        sampler = PromptSampler(read_model(model, self.base), options, texts, **how)
        if not any(detectors.values()):
            print("pecker-fast: no detector is given: images are drawn, but nothing is measured", file=sys.stderr)
        figures: dict[str, Any] = {"task": task, "concept": concept, "model": model}
        samples, by_prompt = {}, {}
        for prefix, meter in meters.items():
            cache, items = _cached(sampler, folder, meter, prompts if prefix == "" else None, seed)
            for _, images in cache.chunks(items, seed, self.progress_bar):
                meter.add(images)
            figures |= {f"{prefix}{name}": value for name, value in meter.result().items()}
            figures[f"{prefix}measured_images"] = len(items)
            samples[prefix] = cache.described
            by_prompt["near" if prefix else "concept"] = meter.by_prompt()
        figures = _with_ua(figures)
        if prompts.table and (rate := meters[""].attack_success_rate()) is not None:
            figures["attack_success_rate"] = rate
        if len(parts) > 1:
            figures["concepts"] = {part.concept.name: _figures_of(part, meters) for part in parts}
        protocol: dict[str, Any] = {
            "arguments": {**dataclasses.asdict(self.images), **dataclasses.asdict(self.detectors)},
            "prompts": {"source": prompts.source, "count": len(prompts.prompts), "images_of_each": count},
            "near": {
                "count": len(prompts.near),
                "images_of_each": self.images.near_images_per_prompt,
                "concepts": sorted(set(prompts.near_concepts)),
                "unknown_to_the_detector": meters["near_"].unknown,
            },
            "detectors": meters[""].describe(),
            "samples": samples[""],
            "near_samples": samples["near_"],
        }
        before, first = None, shown_first(prompts, parts)
        if self.before or self.base:
            ddim = dataclasses.replace(options, sampler="ddim")
            shown = [text for texts in pictured(first).values() for text in texts]
            before = PromptSampler(read_model(self.before or self.base), ddim, shown, **how)
        save_sheets(folder, sampler, before, first, seed)
        protocol["cut_prompts"] = sampler.cut
        if captions is not None:
            caption_figures, protocol["coco"] = self._captions(sampler, folder, captions, detectors["clip"])
            figures |= caption_figures
        if any(detectors.values()):
            figures["by_prompt"] = by_prompt
        if self.measure_before or (self.measure_before is None and any(detectors.values())):
            from .before import measure_before

            start_figures, start_protocol = measure_before(self, figures)
            figures |= start_figures
            protocol |= {"before": start_protocol} if start_protocol else {}
        return figures, protocol

    def _subject(self) -> tuple[str, str, list[Concept]]:
        """Model, task and concepts, by default those of the preset or of the run. ValueError if one is missing."""
        if self.path is None:
            raise ValueError("run is not given: expected the folder of a run or a model, or a name on the hub")
        values = None if self.preset is None else prompt_preset(self.preset)
        task = self.task or (values.subject if values else self.config.get("task"))
        if task is None:
            raise ValueError("task is not given, and the model is not of a run: expected celebrity or nudity")
        several = self.config.get("concepts") if self.concept is None and values is None else None
        if several:
            return self.path, task, [Concept(*pair) for pair in several]
        concept = self.concept or (values.concept if values else self.config.get("concept"))
        known = concept is not None and concept == self.config.get("concept")
        return self.path, task, [Concept(concept, self.config.get("cover") if known else None)]

    def _meters(
        self, detectors: dict[str, Any], prompts: EvaluationPrompts, parts: Sequence[Part], count: int
    ) -> dict[str, ConceptMeter]:
        """Prefix of the figures to what measures them. ValueError if the detector does not know a concept."""
        named = detectors.get("celebrities") is not None
        names = [part.concept.name for part in parts for _ in part.rows] if named else ()
        others = [text for part in parts for text in part.alternatives]
        meter = ConceptMeter(prompts.prompts, count, names=names, alternatives=others, **detectors)
        if meter.unknown:
            raise ValueError(f"the celebrity detector does not know {meter.unknown[0]!r}")
        near_count, near_names = self.images.near_images_per_prompt, prompts.near_concepts if named else ()
        near_others = near_alternatives(parts)
        if not near_names and named:
            # Prompts of a table name nobody.
            detectors = {**detectors, "celebrities": None}
        near = ConceptMeter(prompts.near, near_count, names=near_names, alternatives=near_others, **detectors)
        return {"": meter, "near_": near}

    def _captions(
        self, sampler: PromptSampler, folder: Path, captions: Captions, clip: ClipModel | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """CLIP score and FID of one image of each caption, and how they were measured.

        Bounded in memory: captions are encoded, and images drawn and read, a chunk at a time.
        """
        options, seed, texts, own = self.images, self.images.sample_seed, captions.table.prompts, captions.table.seeds
        described = {**sampler.describe_texts(texts), "seed": seed, "chunk": CHUNK}
        if own:
            described["seeds_of_prompts"] = True
        # Each caption has its own noise: together they are one sample of what the model draws.
        items = torch.tensor([(i, own[i] if own else seed + i) for i in range(len(texts))])
        cache = SampleCache(folder / "evaluation", described, sampler.drawing_anew(texts), CHUNK)
        scores = []
        for part, images in cache.chunks(items, seed, self.progress_bar):
            if clip is not None:
                rows = clip.texts([texts[i] for i in part[:, 0].tolist()])
                scores.append(len(part) * clip_score(clip.images(images), rows))
        figures: dict[str, Any] = {"coco_images": len(texts)}
        protocol: dict[str, Any] = {"captions": len(texts), "samples": described}
        if clip is not None:
            figures["coco_clip_score"] = math.fsum(scores) / len(texts)
        if captions.files:
            files, size = captions.files, sampler.source.vae_scale_factor * sampler.settings["latent_size"]
            generated = Uint8Images(cache.reader(items, seed), len(items))
            real = Uint8Images(lambda i: real_image(files[i], size), len(files))
            cuda = sampler.device.type == "cuda"
            quality = image_quality(generated, real, weights=options.inception_weights, batch_size=32, cuda=cuda)
            resized = {"real_images_are": "cut to squares, resized (bicubic, antialiased)"}
            protocol["image_quality"] = {**quality.pop("protocol"), **resized}
            figures |= quality
        return figures, protocol


def _with_ua(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with UA in place of the share of the concept's images that CLIP recognises."""
    figures = dict(figures)
    recognised = figures.pop("clip_recognised", None)
    return figures if recognised is None else {**figures, "clip_ua": 100 - recognised}


def _figures_of(part: Part, meters: dict[str, ConceptMeter]) -> dict[str, Any]:
    """The figures of one of several concepts and of its near concepts."""
    own, near = meters[""].only(part.rows).result(), meters["near_"].only(part.near_rows).result()
    return {"cover": part.concept.cover, **_with_ua(own), **{f"near_{name}": value for name, value in near.items()}}


def _cached(
    sampler: PromptSampler, folder: Path, meter: ConceptMeter, prompts: EvaluationPrompts | None, seed: int
) -> tuple[SampleCache, Tensor]:
    """The cached images of a meter's prompts; ``prompts`` if these have their own seeds and guidance scales."""
    own, scales = (prompts.seeds, prompts.guidance_scales) if prompts is not None else ((), ())
    items = prompt_items(meter.prompts, meter.images_per_prompt, seed, own)
    described = {
        **sampler.describe(meter.prompts),
        "images_of_each": meter.images_per_prompt,
        "seed": seed,
        "seeds_of_prompts": bool(own),
        "guidance_scales_of_prompts": bool(scales),
        "chunk": CHUNK,
    }
    return SampleCache(folder / "evaluation", described, sampler.drawing(meter.prompts, scales), CHUNK), items
