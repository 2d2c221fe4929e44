"""report.md of one run and of several, and the table that the command line prints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .curves import draw_comparison, draw_run
from .files import Run, write_file

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
    ("before_forget_accuracy", "{:.1f} %", "before: images of the class to forget that the judge recognised (DDIM)"),
    ("before_retain_accuracy", "{:.1f} %", "before: images of the other classes that it recognised"),
    ("before_frechet_distance", "{:.2f}", "before: distance from the real images of the retained classes"),
    ("iterations", "{:d}", "steps of each network"),
    ("seconds", "{:.1f} s", "of training, evaluation not counted"),
    ("sampler", "{}", "how its images are drawn"),
    ("sampling_steps", "{:d}", "steps of that"),
    ("seconds_per_image", "{:.2g} s", "for an image of the evaluation"),
    ("peak_memory_bytes", "{:,d} bytes", "most memory in use"),
)
CAUTION = (
    "Unlearning accuracy alone can be had by drawing nothing, or noise: read it together with the accuracy, distance "
    "and diversity of the retained classes, and with what is drawn in the forgotten one's place. "
    "All figures are of one network, one request and one seed, judged by one classifier that was trained apart; they "
    "say nothing of how hard it is to bring the class back."
)


def _number(metrics: Mapping[str, Any], key: str, form: str) -> str:
    value = metrics.get(key)
    return "-" if value is None else form.format(value)


def _drawn(metrics: Mapping[str, Any]) -> str:
    """What drew the images after forgetting."""
    sampler = metrics.get("sampler", "one_step")
    if sampler == "one_step":
        return "the one-step generator"
    return f"the network that has forgotten ({sampler.upper()}, {metrics['sampling_steps']} steps)"


def _asked(config: Mapping[str, Any]) -> str:
    if not config:
        return "config.json is missing: what was asked is not known."
    if "concept" in config:
        what = "prompts of files" if config["concept"] is None else f"“{config['concept']}”"
        cover = f", with “{config['cover']}” as cover" if config.get("cover") else ""
        return (
            f"Method `{config.get('method')}`, preset `{config.get('preset')}`, seed {config.get('seed')}: forget "
            f"{what if config.get('task') != 'nudity' or config['concept'] else 'nudity'} of "
            f"{config.get('pretrained_model_name_or_path')}{cover}."
        )
    cover = config.get("cover_class")
    classes = ", ".join(map(str, config.get("forget_classes", [])))
    drawn = "a retained class drawn at random" if cover is None else f"class {cover}"
    source = config.get("pretrained_model_name_or_path") or f"the network that comes with `{config.get('preset')}`"
    return (
        f"Method `{config.get('method')}`, preset `{config.get('preset')}`, seed {config.get('seed')}: forget class "
        f"{classes} of {source}, with {drawn} as cover."
    )


def _mask_text(run: Run) -> list[str]:
    mask = run.mask
    if not mask:
        return ["No mask: the forget gradient reached every parameter.", ""]
    ious = [line["mask_iou"] for line in run.log if line.get("mask_iou") is not None]
    said = f"The last mask keeps {mask['mask_density']:.1%} of the parameters"
    if mask.get("mask_touched_ever") is not None:
        said += f"; {mask['mask_touched_ever']:.1%} were salient at some time"
    if ious:
        said += f"; successive masks overlap by {min(ious):.2f} to {max(ious):.2f} (intersection over union)"
    lines = [said + ".", "", "| part of the network | salient |", "| --- | ---: |"]
    lines += [f"| {name} | {share:.1%} |" for name, share in mask["mask_density_by_module"].items()]
    return [*lines, ""]


def write_run_report(folder: Path) -> Path:
    """Draws report.png and writes report.md from what a run left in its folder; returns the latter's path.

    Raises ValueError where there is no metrics.json, ImportError where matplotlib is missing.
    """
    run = Run.read(folder)
    draw_run(run, run.folder / "report.png")
    lines = [f"# Unlearning with {run.metrics.get('method', '?')}", "", _asked(run.config), "", "## Result", ""]
    lines += ["| | | |", "| --- | ---: | --- |"]
    lines += [f"| {key} | {_number(run.metrics, key, form)} | {meaning} |" for key, form, meaning in ROWS]
    lines += ["", f"Features and judge: {run.metrics.get('feature_extractor') or 'none, nothing was measured'}.", ""]
    lines += [CAUTION, "", "## Samples", ""]
    picture = run.folder / "samples" / "before_after.png"
    if picture.is_file():
        lines += ["![before and after](samples/before_after.png)", ""]
        lines += [
            f"Left: the pretrained network (DDIM). Right: {_drawn(run.metrics)}. Framed: what was to be forgotten.",
            "",
        ]
    else:
        lines += ["samples/before_after.png is missing.", ""]
    lines += ["## Curves", "", "![curves](report.png)", ""]
    if not run.evaluations:
        lines += ["evaluation.jsonl is missing or empty: there are no curves of what was measured.", ""]
    lines += ["## Mask", "", *_mask_text(run), "## Configuration", "", "```json"]
    lines += [json.dumps(run.config, indent=1), "```", ""]
    write_file(run.folder / "report.md", lambda path: path.write_text("\n".join(lines)))
    return run.folder / "report.md"


def comparison_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a method: forgetting, what is kept, time. Fixed width; "-" for what was not measured."""
    head = ("method", "UA %", "retained %", "Fréchet", "/ real", "diversity", "seconds")
    rows = [head]
    for name, found in metrics.items():
        distance, split = found.get("frechet_distance"), found.get("frechet_real_split")
        ratio = "-" if distance is None or not split else f"{distance / split:.2f}x"
        rows.append(
            (
                name,
                _number(found, "ua", "{:.1f}"),
                _number(found, "retain_accuracy", "{:.1f}"),
                _number(found, "frechet_distance", "{:.2f}"),
                ratio,
                _number(found, "diversity", "{:.2f}"),
                _number(found, "seconds", "{:.0f}"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_comparison(folder: Path, runs: Mapping[str, Path]) -> Path:
    """report.md, report.png and compare.json of several runs on one preset and seed; returns report.md's path.

    ``runs``: name to folder, in the order of the rows; folders below ``folder`` are linked.
    """
    folder = Path(folder)
    read = {name: Run.read(path) for name, path in runs.items()}
    draw_comparison(read, folder / "report.png")
    first = next(iter(read.values()))
    compared = {
        "preset": first.config.get("preset"),
        "seed": first.metrics.get("seed"),
        "methods": {name: run.metrics for name, run in read.items()},
    }
    write_file(folder / "compare.json", lambda path: path.write_text(json.dumps(compared, indent=1) + "\n"))
    columns = list(read)
    lines = [
        "# Forgetting a class of handwritten digits",
        "",
        _asked({**first.config, "method": ", ".join(columns)}),
        "",
    ]
    lines += ["| | " + " | ".join(columns) + " | |", "| --- |" + " ---: |" * len(columns) + " --- |"]
    for key, form, meaning in ROWS:
        cells = " | ".join(_number(run.metrics, key, form) for run in read.values())
        lines.append(f"| {key} | {cells} | {meaning} |")
    lines += ["", CAUTION, "", "![curves](report.png)", ""]
    for name, run in read.items():
        lines += [f"## {name}", ""]
        place = run.folder.relative_to(folder) if run.folder.is_relative_to(folder) else run.folder
        if (run.folder / "samples" / "before_after.png").is_file():
            lines += [f"![before and after]({place}/samples/before_after.png)", ""]
        lines += [*_mask_text(run), f"[The run's own report]({place}/report.md)", ""]
    write_file(folder / "report.md", lambda path: path.write_text("\n".join(lines)))
    return folder / "report.md"
