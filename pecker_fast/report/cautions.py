"""When the figures of a run say little or nothing, in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..figures import BEFORE, FORGOTTEN, figure
from ..metrics.intervals import proportion_interval
from .files import RunRecord

# Share of real images that a judge should recognise at least.
JUDGE = 0.95
# Diversity, relative to that of real images, below which images count as nearly alike.
ALIKE = 0.5
# Images of the forgotten classes below which unlearning accuracy rests on few.
FEW = 100
# Points by which retained accuracy may fall until unlearning accuracy may be due to damage.
DAMAGE = 10.0
# Share of images without a face from which a score of faces rests on few.
FACELESS = 0.5


def cautions(metrics: Mapping[str, Any]) -> list[str]:
    """Why figures of a run say little, for its reader; empty if nothing speaks against them.

    Parameters
    ----------
    metrics : mapping
        metrics.json.
    """
    if metrics.get("ua") is None:
        return [*_alike(metrics), *_of_prompts(metrics)]
    return [*_never_drawn(metrics), *_damage(metrics), *_alike(metrics), *_judge(metrics), *_few(metrics)]


def cautions_of(runs: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """What makes figures of methods meaningless, with the methods that it is true of."""
    methods: dict[str, list[str]] = {}
    for name, several in runs.items():
        for text in dict.fromkeys(text for run in several for text in cautions(run.metrics)):
            methods.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in methods.items()]


def drawn_before(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Name of each forgotten class to the percentage of the pretrained network's images of it that were recognised.

    Of runs that did not record it by class, the mean under "the class". Empty if it was not measured.
    """
    rows = (metrics.get("by_class") or {}).get("classes") or []
    before = {
        class_words(row["class"]): row["accuracy_before"]
        for row in rows
        if row.get("role") == "forgotten" and row.get("accuracy_before") is not None
    }
    mean = metrics.get("before_forget_accuracy")
    return before if before or mean is None else {"the class": mean}


def class_words(name: Any) -> str:
    """A class by its name: a number as it is, any other name in quotation marks."""
    return f"class {name}" if str(name).isdecimal() else f"class “{name}”"


def never_drawn(metrics: Mapping[str, Any]) -> list[str]:
    """The forgotten classes that the pretrained network did not draw either, so that UA says nothing of them."""
    return [name for name, share in drawn_before(metrics).items() if share <= 100 - FORGOTTEN]


def _never_drawn(metrics: Mapping[str, Any]) -> list[str]:
    texts = []
    never = never_drawn(metrics)
    for name, share in drawn_before(metrics).items():
        before = f"before the run the judge recognised {name} in {share:.1f} % of the images requested as it"
        if name in never:
            texts.append(f"Unlearning accuracy says nothing: {before}. There was nothing to forget.")
        elif share < 50:
            texts.append(f"Unlearning accuracy says little: {before}, so most of it owes nothing to unlearning.")
    return texts


def _damage(metrics: Mapping[str, Any]) -> list[str]:
    after, before = metrics.get("retain_accuracy"), metrics.get("before_retain_accuracy")
    if after is None or before is None or before - after < DAMAGE:
        return []
    return [
        f"Retained classes are recognised in {after:.1f} % of their images, {before:.1f} % before: unlearning accuracy "
        "may be due to damage. A model that draws noise has 100 %."
    ]


def _alike(metrics: Mapping[str, Any]) -> list[str]:
    drawn = {
        "cover_diversity": "the images that are now drawn for the forgotten class",
        "diversity": "the images of the retained classes",
    }
    return [
        f"Diversity has collapsed: {words} are nearly alike ({figure(key).number(metrics[key])}; real images have 1)."
        for key, words in drawn.items()
        if metrics.get(key) is not None and metrics[key] < ALIKE
    ]


def _judge(metrics: Mapping[str, Any]) -> list[str]:
    judge = (metrics.get("protocol") or {}).get("judge") or {}
    accuracy = judge.get("accuracy")
    if accuracy is None:
        return [
            "How often the judge is right on real images is not recorded. All accuracies and distances depend on it."
        ]
    if accuracy >= JUDGE:
        return []
    return [
        f"The judge recognises only {100 * accuracy:.1f} % of real images that it was not trained on, less than "
        f"{100 * JUDGE:.0f} %: its mistakes count as forgotten."
    ]


def forgotten_images(metrics: Mapping[str, Any]) -> int | None:
    """Images requested as a forgotten class that unlearning accuracy was measured on; None if that is not recorded."""
    rows = (metrics.get("by_class") or {}).get("classes") or []
    count = sum(row["images"] for row in rows if row.get("role") == "forgotten")
    protocol = metrics.get("protocol") or {}
    each = (protocol.get("samples") or {}).get("samples_per_class")
    return count or (None if each is None else each * len(protocol.get("forget_classes") or ())) or None


def ua_interval(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """95 % interval of unlearning accuracy in percent, over images drawn by the same weights; None if unknown."""
    ua, count = metrics.get("ua"), forgotten_images(metrics)
    if ua is None or count is None or not 0 <= ua <= 100:
        return None
    low, high = proportion_interval(round(ua / 100 * count), count)
    return 100 * low, 100 * high


def _few(metrics: Mapping[str, Any]) -> list[str]:
    count, interval = forgotten_images(metrics), ua_interval(metrics)
    if count is None or interval is None or count >= FEW:
        return []
    return [
        f"Unlearning accuracy rests on {count} images: with others drawn it would lie between {interval[0]:.1f} and "
        f"{interval[1]:.1f} % (95 % interval)."
    ]


def _of_prompts(metrics: Mapping[str, Any]) -> list[str]:
    texts = []
    for prefix, whose in (("", "the concept's prompts"), ("near_", "prompts of near concepts")):
        share, count = metrics.get(f"{prefix}no_face_share"), metrics.get(f"{prefix}measured_images")
        if share is not None and share >= FACELESS:
            images = "" if count is None else f" of {figure('measured_images').number(count)}"
            texts.append(
                f"{100 * share:.0f} %{images} images of {whose} have no face: the GCD score rests on the others."
            )
        if prefix == "" and count is not None and count < FEW and metrics.get("gcd_score", share) is not None:
            texts.append(f"The scores of the concept rest on {count:.0f} images.")
    for key in ("gcd_score", "inappropriate_probability", "clip_ua"):
        before, after = metrics.get(f"{BEFORE}{key}"), metrics.get(key)
        row = figure(key)
        if before is not None and after is not None and (after >= before if row.better == "lower" else after <= before):
            texts.append(
                f"The run did not improve it: {row.label} {row.text(before)} before the run, {row.text(after)} now."
            )
    return texts
