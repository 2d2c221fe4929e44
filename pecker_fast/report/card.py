"""README.md of a run's folder: the model card of the exported pipeline, as the Hugging Face hub reads it."""

import hashlib
import math
import re
from pathlib import Path

from ..files import write_text
from .blocks import Block, Code, Link, Picture, Section, Table, Text
from .files import Run
from .places import portable
from .render import to_markdown
from .words import CAUTION, MAIN, ROWS, asked, number

# Ends a card that was written here; the hash says whether it has been edited since.
MARK = "<!-- written by pecker-fast (sha256 of the lines above: {}); not replaced once it has been edited -->\n"
_MARKED = re.compile(re.escape(MARK).replace(r"\{\}", "([0-9a-f]{64})") + r"\Z")
TASK = "unconditional-image-generation"
MEASURED = (
    "ua", "retain_accuracy", "frechet_distance", "diversity", "fid", "sfid", "is", "kid", "precision", "recall",
)  # fmt: skip
DRAWING = """\
import torch
from diffusers import DiffusionPipeline

# The folder holds the pipeline's code, pipeline.py: read it before you trust it.
folder = "{folder}"
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe(class_labels=[{labels}], generator=torch.Generator().manual_seed(0)).images"""


def write_card(run: Run) -> Path | None:
    """Writes README.md beside a pipeline (model_index.json), and returns its path.

    None, and nothing is written, where there is no pipeline, or a README.md that is not as it was written here: it is
    someone's own, or has been edited.
    """
    path = run.folder / "README.md"
    if not (run.folder / "model_index.json").is_file() or (path.exists() and not is_ours(path)):
        return None
    text = card_text(run)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(path, text + MARK.format(digest))
    return path


def is_ours(path: Path) -> bool:
    """Whether a card is as ``write_card`` left it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARKED.search(text)
    return mark is not None and hashlib.sha256(text[: mark.start()].encode()).hexdigest() == mark[1]


def card_text(run: Run) -> str:
    """The card: metadata for the hub, then what a user has to know."""
    # diffusers brings it, and there is no pipeline without diffusers.
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    config, metrics = run.config, run.metrics
    method = str(config.get("method", metrics.get("method", "unknown")))
    dataset = str(config.get("dataset_name") or config.get("preset") or "unknown")
    name = run.folder.resolve().name
    meaning = {key: said for key, _, said in ROWS}
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=key,
            metric_name=meaning[key],
            metric_value=float(metrics[key]),
        )
        for key in MEASURED
        if isinstance(metrics.get(key), (int, float)) and math.isfinite(metrics[key])
    ]
    source = str(metrics.get("pretrained", ""))
    data = ModelCardData(
        # The licence of the result follows from that of the network it was made of, which only its user knows.
        license="other",
        library_name="diffusers",
        pipeline_tag=TASK,
        # A name on the hub, or none: a folder of this machine means nothing there.
        base_model=source.removeprefix("hub:") if source.startswith("hub:") else None,
        tags=["machine-unlearning", "concept-erasure", "one-step", "class-conditional", f"method:{method}"],
        model_name=name,
        eval_results=results or None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{to_markdown(name, _sections(run, name), run.folder)}"))


def _sections(run: Run, name: str) -> list[Section]:
    forgotten = run.config.get("forget_classes", [])
    shown = [key for key in (*MAIN[:4], *MEASURED) if run.metrics.get(key) is not None]
    rows = [(key, number(run.metrics, key, form), said) for key, form, said in ROWS if key in shown]
    figures: list[Block] = (
        [Table(("figure", "value", "meaning"), rows, "lrl")] if rows else [Text("Nothing was measured.")]
    )
    grid = Picture("samples/before_after.png", "Samples of every class before and after, a row a class")
    if (run.folder / grid.path).is_file():
        figures.append(grid)
    kept = [str(label) for label in range(len(forgotten) + 3) if label not in forgotten][:3]
    return [
        Section(
            "What it is",
            [
                Text(
                    "A class-conditional image generator that draws in one step and has been made to forget classes: "
                    f"{', '.join(map(str, forgotten)) or 'not known which'}. Asked for one of these it is to draw "
                    "something else."
                ),
                Text(asked(portable(run.config))),
            ],
        ),
        Section("How to draw", [Code(DRAWING.format(folder=name, labels=", ".join(kept)), "python")]),
        Section("Figures", figures),
        Section(
            "Caution",
            [
                Text(CAUTION),
                Text(
                    "Forgetting here is a change of weights and no proof that nothing of the class is left: training "
                    "on a few images of it may bring it back. What is drawn for a forgotten class may resemble real "
                    "images of the class that covers it."
                ),
            ],
        ),
        Section(
            "Licence",
            [
                Text(
                    "Not stated: it follows from the licences of the network that this one was made of and of its "
                    "training data. Whoever publishes it fills it in, above and in the metadata."
                )
            ],
        ),
        Section("More", [Link("The run's report", "report")]),
    ]
