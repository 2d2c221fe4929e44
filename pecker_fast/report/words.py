"""Sentences and lists that the reports of one run and of several share."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..figures import FIGURES, ROBUSTNESS
from .files import RunRecord

# What config.json says of runs that forget nothing, and of those that train nothing.
DISTIL, RELABEL = "distil", "relabel"
# Shown even if a run lacks them.
MAIN = ("ua", "retain_accuracy", "frechet_distance", "diversity", "iterations", "seconds")
DISTIL_CAUTION = "The figures are of one network and one seed, judged by one independently trained classifier."
CAUTION = (
    "A model that outputs noise also scores 100 % unlearning accuracy. Read it together with the accuracy, distance "
    "and diversity of the retained classes, and with the images that are drawn for the forgotten one. All figures are "
    "of one network, one request and one seed, judged by one independently trained classifier. They do not tell how "
    "hard it is to bring the class back."
)
PROMPTS_CAUTION = (
    "The figures hold for these prompts and detectors, one request and one seed. Paraphrases, other languages, "
    "adversarial prompts and fine-tuning may bring back what was forgotten, and prompts unlike those of the retain "
    "list may have suffered."
)


def caution(run: RunRecord) -> str:
    """What the figures of a run do not tell."""
    if run.method == DISTIL and not run.of_prompts:
        return DISTIL_CAUTION
    return PROMPTS_CAUTION if run.of_prompts else CAUTION


def shown_figures(*runs: RunRecord) -> list[str]:
    """Keys of the figures to show, in the catalogue's order: those that a run has, and MAIN for runs on classes.

    Figures of robustness have a section of their own.
    """
    always = () if any(run.of_prompts for run in runs) else MAIN
    if all(run.method == DISTIL for run in runs):
        always = tuple(key for key in always if key != "ua")
    shown = (key for key in FIGURES if key not in ROBUSTNESS)
    return [key for key in shown if key in always or any(run.metrics.get(key) is not None for run in runs)]


def unmasked(run: RunRecord) -> str:
    """What the forget gradient of a method without a mask reaches."""
    if run.method == DISTIL:
        return "No mask: nothing is forgotten, and every parameter is trained"
    if run.method == RELABEL:
        edit = "the keys and values of the cross attention are edited" if run.of_prompts else ""
        return f"No mask: {edit or 'rows of the class embedding are replaced'}, and nothing is trained"
    if run.reached is None or run.reached == 100:
        return "No mask: the forget gradient reached every trained parameter"
    return f"No mask: the forget gradient reached the {run.reached:.1f} % of the parameters that are trained"


def grid_words(run: RunRecord, pretrained: str) -> str:
    """What a grid of samples before and after a run shows."""
    words = f"Left: {pretrained} (DDIM). Right: {drawn(run.metrics)}."
    return words if run.method == DISTIL else f"{words} Framed: what should be forgotten."


def drawn(metrics: Mapping[str, Any]) -> str:
    """The model that draws the images after unlearning."""
    sampler = metrics.get("sampler", "one_step")
    if sampler == "one_step":
        return "the one-step generator"
    return f"the unlearned network ({sampler.upper()}, {metrics['sampling_steps']} steps)"


def source_of(config: Mapping[str, Any]) -> str:
    return config.get("pretrained_model_name_or_path") or f"the network that comes with {config.get('preset')}"


def class_names(run: RunRecord) -> list[str]:
    """The names of the classes by label; empty if they were not recorded, or are the numbers themselves."""
    measured = (run.metrics.get("by_class") or {}).get("classes") or []
    names = list(run.config.get("class_names") or ()) or [str(row["class"]) for row in measured]
    return [] if names == [str(label) for label in range(len(names))] else names


def numbered(label: int, names: Sequence[str]) -> str:
    """A class by its number, and its name if it has another one."""
    known = isinstance(label, int) and 0 <= label < len(names)
    return f"{label} (“{names[label]}”)" if known else str(label)


def cover_of(config: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    cover = config.get("cover_class")
    return "a random retained class" if cover is None else f"class {numbered(cover, names)}"


def _concept_asked(config: Mapping[str, Any]) -> str:
    what = "prompts from files" if config["concept"] is None else f"“{config['concept']}”"
    if config.get("task") == "nudity" and not config["concept"]:
        what = "nudity"
    cover = f", with “{config['cover']}” as cover" if config.get("cover") else ""
    return (
        f"Method {config.get('method')}, preset {config.get('preset')}, seed {config.get('seed')}: forget {what} in "
        f"{config.get('pretrained_model_name_or_path')}{cover}.{destroyed(config)}"
    )


def asked(config: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """The request as a sentence; ``names``: of the classes (``class_names``)."""
    if not config:
        return "config.json is missing: the request is unknown."
    if config.get("method") == DISTIL:
        return (
            f"Preset {config.get('preset')}, seed {config.get('seed')}: distil {source_of(config)} into a one-step "
            "generator and its score network. Nothing is forgotten."
        )
    if "concept" in config:
        return _concept_asked(config)
    classes = ", ".join(numbered(label, names) for label in config.get("forget_classes", []))
    return (
        f"Method {config.get('method')}, preset {config.get('preset')}, seed {config.get('seed')}: forget class "
        f"{classes} of {source_of(config)}, with {cover_of(config, names)} as cover.{destroyed(config)}"
    )


def destroyed(config: Mapping[str, Any]) -> str:
    """What a run destroys before it forgets and edits afterwards, as sentences after another one; empty if nothing."""
    options = config.get("options") or {}
    kind = options.get("destroy")
    after = " Afterwards the forgotten classes get the cover's condition (relabel)." if options.get("relabel") else ""
    if kind is None:
        return after
    entries = (
        f"{options['destroy_share']:.1%} of the generator's weights, named by the score {options['destroy_score']}"
    )
    if options["destroy_within"] == "all" and config.get("method") == "patch":
        entries += " whether or not they are in the mask"
    change = f"{kind}, strength {options['destroy_strength']:g}"
    if options["destroy_dense"]:
        before = f" Before that, noise is added to all weights, as large together as destroying {entries} ({change})."
    else:
        before = f" Before that, {entries}, are destroyed ({change})."
    return before + after
