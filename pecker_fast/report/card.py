"""README.md of a run's folder: the model card of the exported pipeline, as the Hugging Face hub reads it."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

from ..figures import FIGURES, figure
from ..files import write_text
from .across import PROMPTS
from .blocks import Block, Caution, Code, Link, Picture, Section, Text
from .cautions import cautions
from .files import RunRecord
from .places import portable
from .render import to_markdown
from .tables import metrics_table
from .words import DISTIL, RELABEL, asked, caution, class_names, grid_words, numbered

# Ends a card that was written here; the hash tells whether it has been edited since.
MARK = "<!-- written by pecker-fast (sha256 of the lines above: {}); not replaced once it has been edited -->\n"
_MARKED = re.compile(re.escape(MARK).replace(r"\{\}", "([0-9a-f]{64})") + r"\Z")
# Ends the cards of text-to-image runs by earlier versions. It does not tell whether a card has been edited.
OLD_MARK = "<!-- written by pecker-fast -->\n"
CLASS_FIGURES = (
    "ua", "retain_accuracy", "frechet_distance", "diversity", "fid", "sfid", "is", "kid", "precision", "recall",
)  # fmt: skip
OWN_PIPELINE = """\
import torch
from diffusers import DiffusionPipeline

# The folder holds the pipeline's code, pipeline.py: read it before you trust it.
folder = "{folder}"
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe({request}, generator=torch.Generator().manual_seed(0)).images"""
MANY_STEPS = """\
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{folder}")
images = pipe({request}, generator=torch.Generator().manual_seed(0)).images"""


def write_card(run: RunRecord) -> Path | None:
    """Writes README.md beside a pipeline (model_index.json) and returns its path.

    Writes nothing and returns None if there is no pipeline, or if the README.md in the folder is the user's own, has
    been edited, or may have been: see ``card_note``.
    """
    path = run.folder / "README.md"
    if not (run.folder / "model_index.json").is_file() or (path.exists() and not is_ours(path)):
        return None
    text = card_text(run)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(path, text + MARK.format(digest))
    return path


def is_ours(path: Path) -> bool:
    """Whether a card is exactly as ``write_card`` left it."""
    text = _read(path)
    mark = None if text is None else _MARKED.search(text)
    return mark is not None and hashlib.sha256(text[: mark.start()].encode()).hexdigest() == mark[1]


def card_note(folder: Path) -> str | None:
    """Why the card of a run is not refreshed; None if it is, or if there is no pipeline to describe."""
    path = folder / "README.md"
    if not path.exists() or not (folder / "model_index.json").is_file() or is_ours(path):
        return None
    if (_read(path) or "").endswith(OLD_MARK):
        return (
            "README.md is not refreshed: an earlier version of pecker-fast wrote it, and it may have been edited "
            "since. Delete it to have it written again."
        )
    return "README.md is not refreshed: it has been edited. Delete it to have it written again."


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def card_text(run: RunRecord) -> str:
    """The card: metadata for the hub, then the sections for its reader."""
    # A dependency of diffusers, without which there is no pipeline.
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    config, metrics = run.config, run.metrics
    dataset = str(config.get("dataset_name") or config.get("preset") or "unknown")
    name = run.folder.resolve().name
    task = "text-to-image" if run.of_prompts else "unconditional-image-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=key,
            metric_name=figure(key).axis,
            metric_value=float(metrics[key]),
        )
        for key in _measured(run)
        if isinstance(metrics.get(key), (int, float)) and math.isfinite(metrics[key])
    ]
    source = str(metrics.get("pretrained", ""))
    tags = [] if run.method == DISTIL else ["machine-unlearning", "concept-erasure"]
    tags += ["one-step"] if _one_step(run) else []
    tags += [] if run.of_prompts else ["class-conditional"]
    data = ModelCardData(
        # The licence follows from that of the original model, which only the user knows.
        license="other",
        library_name="diffusers",
        pipeline_tag=task,
        # A name on the hub; a folder of this machine means nothing to others.
        base_model=source.removeprefix("hub:") if source.startswith("hub:") else None,
        tags=[*tags, f"method:{run.method}"],
        model_name=name,
        eval_results=results or None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{to_markdown(name, _sections(run, name), run.folder)}"))


def _measured(run: RunRecord) -> tuple[str, ...]:
    """Keys of the figures that a card has, if they were measured."""
    return PROMPTS.columns[: PROMPTS.columns.index("sampling_steps")] if run.of_prompts else CLASS_FIGURES


def _one_step(run: RunRecord) -> bool:
    if run.of_prompts:
        return run.config.get("options", {}).get("t_init") is not None
    return run.metrics.get("sampler", "one_step") == "one_step"


def _sections(run: RunRecord, name: str) -> list[Section]:
    measured = _measured(run)
    keys = [key for key in FIGURES if key in measured and run.metrics.get(key) is not None]
    figures: list[Block] = [metrics_table(keys, {"value": run.metrics})] if keys else [Text(_nothing_measured(run))]
    done = "distillation" if run.method == DISTIL else "unlearning"
    grid = Picture("samples/before_after.png", f"Samples before and after {done}, a row a class or prompt")
    if (run.folder / grid.path).is_file():
        figures += [grid, Text(grid_words(run, "the pretrained model"))]
    what, request = _of_prompts(run) if run.of_prompts else _of_classes(run)
    diffusers_own = run.of_prompts and not _one_step(run)
    code = (MANY_STEPS if diffusers_own else OWN_PIPELINE).format(folder=name, request=request)
    warning = (
        "Unlearning changes weights; it does not prove that nothing is left. Training on a few images of what was "
        "forgotten may bring it back, and what is drawn in its place may resemble real images of the cover."
    )
    doubts = [Caution(text) for text in cautions(run.metrics)]
    licence = (
        "Not stated: it follows from the licences of the original model and of its training data. Whoever publishes "
        "this model must fill it in, here and in the metadata."
    )
    return [
        Section("What it is", [*what, Text(asked(portable(run.config), class_names(run)))]),
        Section("How to draw", [Code(code, "python")]),
        Section("Figures", figures),
        Section("Caution", [*doubts, Text(caution(run)), *([] if run.method == DISTIL else [Text(warning)])]),
        Section("Licence", [Text(licence)]),
        Section("More", [Link("The run's report", "report")]),
    ]


def _nothing_measured(run: RunRecord) -> str:
    return "Nothing was measured" + (": pecker-fast evaluate-concept does that." if run.of_prompts else ".")


def _of_classes(run: RunRecord) -> tuple[list[Block], str]:
    """What a model of classes is, and the arguments of its pipeline."""
    forgotten, names = run.config.get("forget_classes", []), class_names(run)
    classes = [numbered(label, names) for label in forgotten]
    steps = "one step" if _one_step(run) else f"{run.metrics.get('sampling_steps', 'many')} steps"
    text = (
        f"A class-conditional image generator that draws in {steps} and has unlearned classes: "
        f"{', '.join(classes) or 'unknown'}. If asked for one of these, it should draw something else."
    )
    if run.method == DISTIL:
        text = "A class-conditional image generator that draws in one step. Its score network is in score/."
    measured = (run.metrics.get("by_class") or {}).get("classes") or ()
    count = len(names) or len(measured) or len(forgotten) + 3
    retained = [str(label) for label in range(count) if label not in forgotten][:3]
    return [Text(text)], f"class_labels=[{', '.join(retained)}]"


def _of_prompts(run: RunRecord) -> tuple[list[Block], str]:
    """What a text-to-image model is, and the arguments of its pipeline."""
    config: dict[str, Any] = run.config
    concept, cover, prompts = config.get("concept"), config.get("cover"), config["prompts"]
    if concept is not None:
        what = f"“{concept}”" + (f" (in its place: “{cover}”)" if cover else "")
    else:
        count = len(prompts["forget"])
        what = f"{count} prompt{'' if count == 1 else 's'}, such as “{prompts['forget'][0]}”"
    kind = "generator that draws in one step and" if _one_step(run) else "model that"
    source = portable(str(run.metrics.get("pretrained", "")).removeprefix("hub:"))
    steps = config.get("options", {}).get("max_train_steps", "?")
    trained = "without training" if run.method == RELABEL else f"{steps} iterations"
    does = "was distilled from a diffusion model" if run.method == DISTIL else f"has unlearned {what}"
    text = (
        f"A text-to-image {kind} {does}. It is the U-Net of {source} after {run.method} (preset "
        f"{config.get('preset')}, seed {config.get('seed')}, {trained}), with that model's text encoder and "
        "autoencoder."
    )
    example = prompts["pictured"][-1].replace('"', "'")
    rows = "; ".join(f"{i}. “{prompt}”" for i, prompt in enumerate(prompts["pictured"], 1))
    return [Text(text), Text(f"Prompts of the pictures: {rows}.")], f'"{example}"'
