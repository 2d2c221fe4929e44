"""What the figures of a run are called, and how they are read: shared by the reports of one run and of several."""

from collections.abc import Mapping
from typing import Any

from .files import Run

# Key in metrics.json, format, meaning.
ROWS = (
    ("ua", "{:.1f} %", "unlearning accuracy: images asked for a forgotten class that the judge calls another"),
    ("ua_last_half_min", "{:.1f} %", "the least of it in the last half of the run"),
    ("retain_accuracy", "{:.1f} %", "images asked for retained classes that the judge recognises"),
    ("frechet_distance", "{:.2f}", "distance from the real images of the retained classes; lower is better"),
    ("frechet_real_split", "{:.2f}", "the same of as many real images from the others, drawn at random: the yardstick"),
    ("diversity", "{:.2f}", "mean distance of two images within a retained class over that of real ones"),
    (
        "cover_frechet_distance",
        "{:.2f}",
        "of what is now drawn for the forgotten class, from real images of the cover class",
    ),
    ("cover_diversity", "{:.2f}", "diversity of what is now drawn for the forgotten class"),
    ("forget_probability", "{:.4f}", "mean probability of the forgotten class that the judge sees in it"),
    ("forget_entropy", "{:.3f} nats", "mean entropy of the judge's probabilities for it"),
    ("fid", "{:.2f}", "Fréchet distance of Inception's features, retained classes"),
    ("sfid", "{:.2f}", "the same of its spatial features"),
    ("is", "{:.2f}", "Inception score"),
    ("kid", "{:.5f}", "kernel distance of Inception's features"),
    ("precision", "{:.4f}", "improved precision, k = 3, Inception's features"),
    ("recall", "{:.4f}", "improved recall, k = 3, Inception's features"),
    ("extractor_frechet_distance", "{:.2f}", "Fréchet distance of the judge's features, of 8-bit images: not FID"),
    ("extractor_kernel_distance", "{:.5f}", "kernel distance of the judge's features: not KID"),
    ("extractor_precision", "{:.4f}", "improved precision, k = 3, the judge's features"),
    ("extractor_recall", "{:.4f}", "improved recall, k = 3, the judge's features"),
    ("before_forget_accuracy", "{:.1f} %", "before: images of the class to forget that the judge recognised (DDIM)"),
    ("before_retain_accuracy", "{:.1f} %", "before: images of the other classes that it recognised"),
    ("before_frechet_distance", "{:.2f}", "before: distance from the real images of the retained classes"),
    ("drift_norm", "{:.4f}", "how far the weights moved: ||theta - theta_0|| / ||theta_0||"),
    ("parameters_changed", "{:.1f} %", "entries of the weights that differ at all from the pretrained ones"),
    ("parameters_trained", "{:.1f} %", "entries of the weights that the method trains"),
    ("iterations", "{:d}", "steps of each network"),
    ("images", "{:,d}", "images seen: iterations times the batch"),
    ("seconds", "{:.1f} s", "of training, evaluation not counted"),
    ("sampler", "{}", "how its images are drawn"),
    ("sampling_steps", "{:d}", "steps of that"),
    ("seconds_per_image", "{:.2g} s", "for an image of the evaluation"),
    ("peak_memory_bytes", "{:,d} bytes", "most memory in use"),
)
# Shown as missing where they are; others are left out.
MAIN = ("ua", "retain_accuracy", "frechet_distance", "diversity", "iterations", "seconds")
CAUTION = (
    "Unlearning accuracy alone can be had by drawing nothing, or noise: read it together with the accuracy, distance "
    "and diversity of the retained classes, and with what is drawn in the forgotten one's place. "
    "All figures are of one network, one request and one seed, judged by one classifier that was trained apart; they "
    "say nothing of how hard it is to bring the class back."
)


def number(metrics: Mapping[str, Any], key: str, form: str) -> str:
    value = metrics.get(key)
    return "-" if value is None else form.format(value)


def unmasked(run: Run) -> str:
    """What the forget gradient of a method without a mask reaches."""
    if run.reached is None or run.reached == 100:
        return "No mask: the forget gradient reached every parameter that is trained"
    return f"No mask: the forget gradient reached the {run.reached:.1f} % of the parameters that are trained"


def drawn(metrics: Mapping[str, Any]) -> str:
    """What drew the images after forgetting."""
    sampler = metrics.get("sampler", "one_step")
    if sampler == "one_step":
        return "the one-step generator"
    return f"the network that has forgotten ({sampler.upper()}, {metrics['sampling_steps']} steps)"


def source_of(config: Mapping[str, Any]) -> str:
    return config.get("pretrained_model_name_or_path") or f"the network that comes with {config.get('preset')}"


def cover_of(config: Mapping[str, Any]) -> str:
    cover = config.get("cover_class")
    return "a retained class drawn at random" if cover is None else f"class {cover}"


def _concept_asked(config: Mapping[str, Any]) -> str:
    what = "prompts of files" if config["concept"] is None else f"“{config['concept']}”"
    if config.get("task") == "nudity" and not config["concept"]:
        what = "nudity"
    cover = f", with “{config['cover']}” as cover" if config.get("cover") else ""
    return (
        f"Method {config.get('method')}, preset {config.get('preset')}, seed {config.get('seed')}: forget {what} of "
        f"{config.get('pretrained_model_name_or_path')}{cover}."
    )


def asked(config: Mapping[str, Any]) -> str:
    """The request as a sentence."""
    if not config:
        return "config.json is missing: what was asked is not known."
    if "concept" in config:
        return _concept_asked(config)
    classes = ", ".join(map(str, config.get("forget_classes", [])))
    return (
        f"Method {config.get('method')}, preset {config.get('preset')}, seed {config.get('seed')}: forget class "
        f"{classes} of {source_of(config)}, with {cover_of(config)} as cover."
    )
