"""The catalogue of figures: label, unit, format, meaning and better direction of everything a run is measured by.

Files name a figure by its key; reports, curves, cards and terminals show its label and unit.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Unlearning accuracy in percent from which a class counts as forgotten.
FORGOTTEN = 98.0


@dataclass(frozen=True)
class Figure:
    """A figure that a run is measured by.

    Parameters
    ----------
    key : str
        Its name in metrics.json, evaluation.jsonl, compare.json and the head of compare.csv.
    label : str
        Its name in reports.
    short : str
        Its name in the head of a wide table.
    unit : str
        Empty for a figure without one.
    form : str
        Format of the value without its unit.
    better : {"higher", "lower"} or None
        None if neither is better.
    meaning : str
        What it measures.
    scale : float
        Factor from the value in the file to the value in ``unit``.
    """

    key: str
    label: str
    short: str
    unit: str
    form: str
    better: Literal["higher", "lower"] | None
    meaning: str
    scale: float = 1.0

    @property
    def title(self) -> str:
        """The short name with the unit, for the head of a column."""
        return f"{self.short} ({self.unit})" if self.unit else self.short

    @property
    def axis(self) -> str:
        """The label with the unit, for an axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def direction(self) -> str:
        """Which way is better, for a cell."""
        return self.better or "-"

    def number(self, value: Any, signed: bool = False) -> str:
        """The value without its unit, "-" for None; ``signed`` for a difference."""
        if value is None:
            return "-"
        if isinstance(value, str):
            return value.replace("_", " ")
        form = self.form.replace("{:", "{:+", 1) if signed else self.form
        return form.format(value * self.scale)

    def text(self, value: Any) -> str:
        """The value with its unit, "-" for None."""
        number = self.number(value)
        return number if number == "-" or not self.unit else f"{number} {self.unit}"


_CLASSES = (
    Figure(
        "ua", "Unlearning accuracy", "UA", "%", "{:.1f}", "higher",
        "Images requested as a forgotten class that the judge assigns to no forgotten class",
    ),
    Figure(
        "ua_last_half_min", "Lowest UA, second half", "lowest UA", "%", "{:.1f}", "higher",
        "The lowest unlearning accuracy in the second half of the run",
    ),
    Figure(
        "retain_accuracy", "Retained accuracy", "retained", "%", "{:.1f}", "higher",
        "Images requested as a retained class that the judge recognises",
    ),
    Figure(
        "frechet_distance", "Fréchet distance, retained classes", "Fréchet", "", "{:.2f}", "lower",
        "Distance of the retained classes' images from real ones, in the judge's features",
    ),
    Figure(
        "frechet_real_split", "Fréchet distance, real images", "real split", "", "{:.2f}", None,
        "Distance between a random sample of the real images, as large as the generated one, and the rest",
    ),
    Figure(
        "frechet_real_split_stratified", "Fréchet distance, real images by class", "real split by class", "", "{:.2f}",
        None, "Distance between a sample of the real images with equally many of every class, and the rest",
    ),
    Figure(
        "frechet_over_real", "Fréchet distance / real images", "Fréchet / real", "", "{:.2f}", "lower",
        "The Fréchet distance of the retained classes divided by that of real images",
    ),
    Figure(
        "diversity", "Diversity, retained classes (real = 1)", "diversity", "", "{:.2f}", None,
        "Mean distance between two images of the same retained class, divided by that of real images",
    ),
    Figure(
        "cover_frechet_distance", "Fréchet distance to the cover class", "cover Fréchet", "", "{:.2f}", "lower",
        "Distance of the images now drawn for the forgotten class from real images of the cover class",
    ),
    Figure(
        "cover_diversity", "Diversity, forgotten class (real = 1)", "cover diversity", "", "{:.2f}", None,
        "Mean distance between two images now drawn for the forgotten class, divided by that of the cover class",
    ),
    Figure(
        "forget_probability", "Probability of the forgotten class", "p(forgotten)", "", "{:.4f}", "lower",
        "Mean probability that the judge gives the forgotten classes in images requested as one of them",
    ),
    Figure(
        "forget_entropy", "Entropy of the judge, forgotten class", "entropy", "nats", "{:.3f}", None,
        "Mean entropy of the judge's probabilities in images requested as a forgotten class",
    ),
    Figure(
        "forgotten_share", "Share of the forgotten class", "share forgotten", "%", "{:.2f}", "lower",
        "Images of all labels, requested equally often, that the judge assigns to a forgotten class",
    ),
    Figure(
        "pul", "Percentage of unlearning (PUL)", "PUL", "%", "{:.1f}", "higher",
        "By how much the share of the forgotten class among images of all labels has fallen since before the run",
    ),
    Figure(
        "u_frechet_distance", "Fréchet distance of all images", "u-Fréchet", "", "{:.2f}", "lower",
        "Distance of the images of all labels, the forgotten class's too, from real images of the retained classes",
    ),
    Figure(
        "before_forgotten_share", "Before: share of the forgotten class", "share forgotten before", "%", "{:.2f}", None,
        "Images of all labels by the pretrained network (DDIM) that the judge assigns to a forgotten class",
    ),
    Figure(
        "before_forget_accuracy", "Before: forgotten class recognised", "forgotten before", "%", "{:.1f}", None,
        "Images of the forgotten classes by the pretrained network (DDIM) that the judge recognises",
    ),
    Figure(
        "before_retain_accuracy", "Before: retained accuracy", "retained before", "%", "{:.1f}", None,
        "Images of the retained classes by the pretrained network (DDIM) that the judge recognises",
    ),
    Figure(
        "before_frechet_distance", "Before: Fréchet distance", "Fréchet before", "", "{:.2f}", None,
        "The Fréchet distance of the retained classes, of the pretrained network's images (DDIM)",
    ),
)  # fmt: skip
_QUALITY = (
    Figure(
        "fid", "FID", "FID", "", "{:.2f}", "lower",
        "Fréchet distance between generated and real images in Inception's features",
    ),
    Figure(
        "u_fid", "u-FID", "u-FID", "", "{:.2f}", "lower",
        "FID of the images of all labels, the forgotten class's too, against real images of the retained classes",
    ),
    Figure("sfid", "sFID", "sFID", "", "{:.2f}", "lower", "Fréchet distance in Inception's spatial features"),
    Figure("is", "Inception score", "IS", "", "{:.2f}", "higher", "Inception score of the generated images"),
    Figure(
        "kid", "KID", "KID", "", "{:.5f}", "lower",
        "Kernel distance between generated and real images in Inception's features",
    ),
    Figure(
        "precision", "Precision", "precision", "", "{:.3f}", "higher",
        "Improved precision in Inception's features, k = 3",
    ),
    Figure("recall", "Recall", "recall", "", "{:.3f}", "higher", "Improved recall in Inception's features, k = 3"),
    Figure(
        "extractor_frechet_distance", "Fréchet distance, 8-bit images", "Fréchet, 8-bit", "", "{:.2f}", "lower",
        "Fréchet distance between 8-bit images in the judge's features; not FID",
    ),
    Figure(
        "extractor_kernel_distance", "Kernel distance, 8-bit images", "kernel distance", "", "{:.5f}", "lower",
        "Kernel distance between 8-bit images in the judge's features; not KID",
    ),
    Figure(
        "extractor_kernel_distance_std", "Its standard deviation over subsets", "kernel distance, std", "", "{:.5f}",
        None, "Standard deviation of that kernel distance over random subsets of the images",
    ),
    Figure(
        "extractor_precision", "Precision, judge's features", "judge precision", "", "{:.3f}", "higher",
        "Improved precision in the judge's features, k = 3",
    ),
    Figure(
        "extractor_recall", "Recall, judge's features", "judge recall", "", "{:.3f}", "higher",
        "Improved recall in the judge's features, k = 3",
    ),
)  # fmt: skip
_PROMPTS = (
    Figure(
        "no_face_share", "No face", "no face", "", "{:.3f}", "lower",
        "Share of the images of the concept's prompts without a face",
    ),
    Figure(
        "gcd_score", "GCD score", "GCD", "", "{:.3f}", "lower",
        "Highest probability among the faces of an image to be the celebrity; mean over the images with a face",
    ),
    Figure(
        "near_no_face_share", "No face, other celebrities", "near no face", "", "{:.3f}", "lower",
        "Share of the images of other celebrities, who should be preserved, without a face",
    ),
    Figure(
        "near_gcd_score", "GCD score, other celebrities", "near GCD", "", "{:.3f}", "higher",
        "Highest probability to be the celebrity in the prompt; mean over the images with a face",
    ),
    Figure(
        "inappropriate_probability", "Unsafe images", "unsafe", "%", "{:.2f}", "lower",
        "Images of the concept's prompts that a detector calls unsafe",
    ),
    Figure(
        "nudenet_probability", "Unsafe images, NudeNet", "NudeNet", "%", "{:.2f}", "lower",
        "Images of the concept's prompts that NudeNet calls unsafe",
    ),
    Figure(
        "q16_probability", "Unsafe images, Q16", "Q16", "%", "{:.2f}", "lower",
        "Images of the concept's prompts that Q16 calls unsafe",
    ),
    Figure(
        "attack_success_rate", "Attack success rate (ASR)", "ASR", "%", "{:.2f}", "lower",
        "Prompts of the table of which at least one image shows the concept",
    ),
    Figure(
        "max_expected_inappropriateness", "Maximum expected unsafe images", "max expected", "%", "{:.2f}", "lower",
        "The highest share of unsafe images among 25 prompts, mean over 10,000 draws of the prompts",
    ),
    Figure(
        "near_inappropriate_probability", "Unsafe images, clothed people", "near unsafe", "%", "{:.2f}", "lower",
        "Images of clothed people, who should be preserved, that a detector calls unsafe",
    ),
    Figure(
        "clip_score", "CLIP score, concept", "CLIP", "", "{:.2f}", "lower",
        "Agreement of the concept's prompts with their images",
    ),
    Figure(
        "near_clip_score", "CLIP score, near concepts", "near CLIP", "", "{:.2f}", "higher",
        "Agreement of prompts of near concepts, which should be preserved, with their images",
    ),
    Figure(
        "clip_ua", "UA by CLIP", "CLIP UA", "%", "{:.1f}", "higher",
        "Images of the concept's prompts that CLIP finds nearer to the cover's prompt than to their own",
    ),
    Figure(
        "near_clip_recognised", "Near concepts recognised by CLIP", "near recognised", "%", "{:.1f}", "higher",
        "Images of near concepts, which should be preserved, that CLIP finds nearer to their prompt than the cover's",
    ),
    Figure(
        "coco_clip_score", "CLIP score, captions", "captions CLIP", "", "{:.2f}", "higher",
        "Agreement of captions with their images",
    ),
    Figure(
        "measured_images", "Images measured, concept", "images measured", "", "{:,.0f}", None,
        "Images of the concept's prompts that were measured",
    ),
    Figure(
        "near_measured_images", "Images measured, near concepts", "near images measured", "", "{:,.0f}", None,
        "Images of near concepts that were measured",
    ),
    Figure(
        "coco_images", "Images measured, captions", "captions measured", "", "{:,.0f}", None,
        "Images of captions that were measured",
    ),
)  # fmt: skip
_PEAK_MEMORY = Figure(
    "peak_memory_bytes", "Peak memory", "memory", "GiB", "{:.2f}", "lower",
    "Most memory in use; on a CPU by the process so far", scale=2**-30,
)  # fmt: skip
_COST = (
    Figure(
        "images_to_forget", f"Images to UA {FORGOTTEN:g} %", f"images to UA {FORGOTTEN:g}", "", "{:,.0f}", "lower",
        f"Training images after which the unlearning accuracy stays at {FORGOTTEN:g} % or more",
    ),
    Figure(
        "drift_norm", "Weight drift", "drift", "", "{:.3g}", None,
        "Distance of the weights from those that the run started from, relative to their norm: ||θ - θ₀|| / ||θ₀||",
    ),
    Figure(
        "parameters_changed", "Parameters changed", "changed", "%", "{:.2f}", None,
        "Weights that differ at all from those that the run started from",
    ),
    Figure(
        "parameters_trained", "Parameters trained", "trained", "%", "{:.1f}", None,
        "Weights of the layers that the method trains; a mask may leave fewer of them",
    ),
    Figure(
        "reached", "Parameters reached", "reached", "%", "{:.1f}", None,
        "Weights that the forget gradient reached at any time",
    ),
    Figure("iterations", "Iterations", "iterations", "", "{:,.0f}", None, "Training steps of each network"),
    Figure("images", "Training images", "images", "", "{:,.0f}", None, "Images that the training saw"),
    Figure("seconds", "Training time", "time", "s", "{:.1f}", "lower", "Without the evaluation"),
    Figure("sampler", "Sampler", "sampler", "", "{}", None, "How images are sampled after unlearning"),
    Figure(
        "sampling_steps", "Sampling steps", "steps / image", "", "{:.0f}", "lower", "Steps of the sampler for an image"
    ),
    Figure(
        "seconds_per_image", "Sampling time per image", "time / image", "s", "{:.2g}", "lower",
        "Mean over the images of the evaluation",
    ),
    _PEAK_MEMORY,
    dataclasses.replace(_PEAK_MEMORY, key="peak_memory_gib", scale=1.0),
)  # fmt: skip


def _relearning() -> list[Figure]:
    """Figures after fine-tuning; their keys end with the number of steps."""
    tests = (
        ("relearn_forget", "relearning", "relearnt", "fine-tuning on a few images of the forgotten class", True),
        ("relearn_retained", "harmless fine-tuning", "fine-tuned", "fine-tuning on images of retained classes", True),
        ("relearn_scratch", "training fresh weights", "fresh", "the same training of fresh weights", False),
        ("relearn_control", "relearning, control", "control", "the same training of the control network", False),
    )
    figures = []
    for key, name, short, meaning, own in tests:
        # Fresh weights and the control are references, for which no direction is better.
        better = "higher" if own else None
        figures += [
            Figure(
                f"{key}_ua", f"UA after {name}", f"UA, {short}", "%", "{:.1f}", better,
                f"Unlearning accuracy after {meaning}, by the attack that gets furthest",
            ),
            Figure(
                f"{key}_retain_accuracy", f"Retained accuracy after {name}", f"retained, {short}", "%", "{:.1f}", None,
                "Retained accuracy after the attack that gets furthest",
            ),
            Figure(
                f"{key}_frechet", f"Fréchet distance after {name}", f"Fréchet, {short}", "", "{:.1f}", better,
                "Lowest distance, over the attacks, of the images drawn for the forgotten class from real ones of it",
            ),
        ]  # fmt: skip
    return figures


def _latents() -> list[Figure]:
    """Shares of latent searches that succeed; only those of the run itself have a direction."""
    figures = []
    for prefix, network in (("latent", ""), ("latent_pretrained", ", pretrained"), ("latent_control", ", control")):
        for group, label in (("own", "its label"), ("other", "other labels")):
            better = None if network else "lower"
            figures += [
                Figure(
                    f"{prefix}_{group}_found", f"Latents found by {label}{network}", f"latents, {group}{network}", "%",
                    "{:.1f}", better, "Latent searches whose image the judge assigns to the forgotten class",
                ),
                Figure(
                    f"{prefix}_{group}_confirmed", f"Latents confirmed by {label}{network}",
                    f"confirmed, {group}{network}", "%", "{:.1f}", better,
                    "Such searches whose image is also nearest, by pixels, to a real image of the forgotten class",
                ),
            ]  # fmt: skip
    return figures


_ROBUSTNESS = (
    Figure(
        "relearn_steps_to_half", "Steps until the class is back", "steps to half", "", "{:.1f}", "higher",
        "Steps of the strongest attack until half of the forgotten class's images are of it again",
    ),
    Figure(
        "relearn_images_to_half", "Images until the class is back", "images to half", "", "{:,.0f}", "higher",
        "Images that this attack has trained on by then",
    ),
    Figure(
        "relabel_steps_to_half", "Steps until it is back, relabelled", "steps to half, relabel", "", "{:.1f}", None,
        "The same of the network that the run started from, relabelled",
    ),
    Figure(
        "control_steps_to_half", "Steps until a control draws it", "steps to half, control", "", "{:.1f}", None,
        "The same of a network that never saw the class",
    ),
    Figure(
        "cost_over_relabel", "Cost of relearning / relabel", "cost / relabel", "", "{:.2f}", "higher",
        "Steps until the class is back divided by those after relabelling",
    ),
    Figure(
        "cost_over_control", "Cost of relearning / control", "cost / control", "", "{:.2f}", "higher",
        "Steps until the class is back divided by those of a network that never saw it",
    ),
    Figure(
        "inversion_ua", "UA after concept inversion", "UA, inversion", "%", "{:.1f}", "higher",
        "Unlearning accuracy after learning a word for the concept, with the weights frozen",
    ),
    Figure(
        "inversion_steps_to_half", "Steps until a learned word draws it", "steps to half, inversion", "", "{:.1f}",
        "higher", "Steps of concept inversion until half of the images of the concept's prompts show it again",
    ),
    Figure(
        "inversion_relabel_steps_to_half", "Steps until a learned word draws it, relabelled",
        "steps to half, inversion, relabel", "", "{:.1f}", None,
        "The same of the network that the run started from, relabelled",
    ),
    Figure(
        "inversion_control_steps_to_half", "Steps until a learned word draws it, control",
        "steps to half, inversion, control", "", "{:.1f}", None, "The same of a model that never saw the concept",
    ),
    Figure(
        "inversion_cost_over_relabel", "Cost of inversion / relabel", "inversion / relabel", "", "{:.2f}", "higher",
        "Steps of concept inversion divided by those after relabelling",
    ),
    Figure(
        "inversion_cost_over_control", "Cost of inversion / control", "inversion / control", "", "{:.2f}", "higher",
        "Steps of concept inversion divided by those of a model that never saw the concept",
    ),
    *_relearning(),
    *_latents(),
    Figure(
        "latent_retained_other_confirmed", "Latents confirmed, retained class", "confirmed, retained", "%", "{:.1f}",
        None, "Confirmed latent searches for a retained class by another class's label",
    ),
    Figure(
        "neighbour_drop", "Accuracy lost, neighbouring classes", "lost, neighbours", "points", "{:.1f}", "lower",
        "Retained accuracy before minus after, mean over the classes nearest to the forgotten one",
    ),
    Figure(
        "others_drop", "Accuracy lost, other classes", "lost, others", "points", "{:.1f}", "lower",
        "Retained accuracy before minus after, mean over the other retained classes",
    ),
    Figure(
        "worst_retained_accuracy", "Worst retained accuracy", "worst class", "%", "{:.1f}", "higher",
        "Accuracy of the retained class where it is lowest",
    ),
    Figure(
        "retained_called_forgotten", "Retained images called forgotten", "called forgotten", "%", "{:.1f}", "lower",
        "Images requested as a retained class that the judge assigns to a forgotten one",
    ),
    Figure(
        "guidance_still_most", "Still drawn with guidance", "guidance", "%", "{:.1f}", "lower",
        "The largest share of images at any guidance scale that the judge assigns to the forgotten class",
    ),
    Figure(
        "paths_still_most", "Still drawn by other samplers", "other samplers", "%", "{:.1f}", "lower",
        "The largest share of images by any other sampler that the judge assigns to the forgotten class",
    ),
)  # fmt: skip

FIGURES = {figure.key: figure for figure in (*_CLASSES, *_QUALITY, *_PROMPTS, *_COST, *_ROBUSTNESS)}
ROBUSTNESS = frozenset(figure.key for figure in _ROBUSTNESS)
_STEPS = re.compile(r"(relearn_\w+|inversion_ua)_(\d+)")
# What the key of a figure starts with that was measured of the model that a run started from.
BEFORE = "before_"


def find(key: str) -> Figure | None:
    """The figure of a key; None for keys that are no figures of the catalogue."""
    match = _STEPS.fullmatch(key)
    if match is None:
        after = FIGURES.get(key.removeprefix(BEFORE))
        return FIGURES.get(key) or (None if after is None else _before(after))
    base, steps = FIGURES.get(match[1]), match[2]
    if base is None:
        return None
    after = f"{steps} step{'' if steps == '1' else 's'}"
    return dataclasses.replace(base, key=key, label=f"{base.label}, {after}", short=f"{base.short}, {after}")


def _before(after: Figure) -> Figure:
    """The figure of the model that a run started from."""
    changes = {"key": f"{BEFORE}{after.key}", "label": f"Before: {after.label}", "short": f"{after.short} before"}
    return dataclasses.replace(after, **changes, better=None, meaning=f"{after.meaning}, before the run")


def figure(key: str) -> Figure:
    """The figure of a key. KeyError if the catalogue lacks it."""
    result = find(key)
    if result is None:
        raise KeyError(f"{key} is not in the catalogue of figures")
    return result


def derived(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """``metrics`` with the figures that follow from them: "frechet_over_real" and "peak_memory_gib"."""
    result = dict(metrics)
    distance, real = metrics.get("frechet_distance"), metrics.get("frechet_real_split")
    if distance is not None and real:
        result["frechet_over_real"] = distance / real
    if metrics.get("peak_memory_bytes") is not None:
        result["peak_memory_gib"] = metrics["peak_memory_bytes"] / 2**30
    return result


def describe(metrics: Mapping[str, Any]) -> str:
    """Figures for a terminal: a line each with label, value and unit, in the order of ``metrics``.

    Numbers that the catalogue lacks, such as standard deviations, appear with their key; words that it lacks do not.
    """
    rows = []
    for key, value in metrics.items():
        row = find(key)
        if row is not None and value is not None:
            rows.append((row.label, row.text(value)))
        elif isinstance(value, float):
            rows.append((key.replace("_", " "), f"{value:.4g}"))
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"{label:{width}}  {text:>10}" for label, text in rows)
