"""The report of one run, written to be audited: report.md, report.html, report.png and the model card."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..figures import BEFORE, figure, find
from .blocks import Block, Items, Link, Picture, Section, Table, Text, blocks_of
from .card import card_note, write_card
from .concepts import by_concept
from .curves import draw_run
from .files import RunRecord
from .places import portable
from .render import json_code, write_document
from .tables import meanings_table, metrics_table
from .verdict import history_blocks, verdict
from .words import DISTIL, caution, class_names, cover_of, grid_words, numbered, shown_figures, source_of, unmasked

COST = ("images", "seconds", "seconds_per_image", "peak_memory_bytes")
# Figures in the table of costs; the others are results.
COSTS = (
    *("images_to_forget", "drift_norm", "parameters_changed", "parameters_trained", "reached", "iterations", "images"),
    *("seconds", "sampler", "sampling_steps", "seconds_per_image", "peak_memory_bytes"),
)
# What evaluations record beside figures.
NO_FIGURES = ("task", "concept", "model", "pretrained", "feature_extractor", "by_class", "by_prompt")
GRIDS = "samples/before_after.png"
# Written by evaluate-concept: the file and what it shows.
CONCEPT_GRIDS = (
    ("samples/concept.png", "Samples of the concept's prompts that were measured, a row a prompt"),
    ("samples/near.png", "Samples of prompts of near concepts, which should be preserved, a row a prompt"),
)


def write_run_report(folder: Path, changed: Collection[str] = ()) -> Path:
    """Writes report.png, report.md and report.html from the files of a run, and the model card of a pipeline.

    Parameters
    ----------
    folder : Path
        Of the run.
    changed : collection of str
        Files that have changed since the run ended.

    Returns
    -------
    Path
        Of report.md.

    Raises
    ------
    ValueError
        If there is no metrics.json.
    ImportError
        If matplotlib is missing.
    """
    run = RunRecord.read(folder)
    drawn = draw_run(run, run.folder / "report.png")
    write_card(run)
    title = "Distillation" if run.method == DISTIL else f"Unlearning with {run.metrics.get('method', '?')}"
    return write_document(run.folder, title, sections(run, drawn, changed))


def sections(run: RunRecord, drawn: Sequence[str] = (), changed: Collection[str] = ()) -> list[Section]:
    """The sections of the report, in order; ``drawn``: what the curves show."""
    return [
        Section("Verdict", verdict(run)),
        Section("Figures", _result(run)),
        *_by_class(run),
        *by_concept(run.metrics),
        *_by_prompt(run),
        Section("Samples", _samples(run)),
        Section("Curves", _curves(run, drawn)),
        Section("Robustness", _robustness(run)),
        Section("How it was measured", _protocol(run)),
        Section("Request and command", [*_request(run), *history_blocks(run)]),
        Section("Files", _files(run, changed)),
        Section("Mask", mask_blocks(run)),
        Section("Drift of the weights", _drift(run)),
        Section("Time, memory and energy", _cost(run)),
        Section("Environment", _environment(run)),
        Section("Configuration", [json_code(portable(run.config))]),
    ]


def _request(run: RunRecord) -> list[Block]:
    config = portable(run.config)
    blocks: list[Block] = []
    if config:
        rows = [
            ("method", str(config.get("method"))),
            *_forgotten(config, class_names(run)),
            ("pretrained network", source_of(config)),
            ("its weights' sha256", config.get("pretrained_sha256") or "-"),
            ("seed", str(config.get("seed"))),
        ]
        if run.method != DISTIL and not run.of_prompts:
            rows.append(("images of the class to forget", config.get("forget_data") or "none given"))
        if not run.of_prompts:
            rows.append(("training images", _data_words(run)))
        rows += [
            (name.replace("_", " "), config[name])
            for name in ("distilled", "initial_generator", "initial_score")
            if config.get(name) is not None
        ]
        blocks.append(Table(("request", "value"), rows, "ll", "What was asked"))
    return blocks


def _forgotten(config: dict[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """The classes or prompts to forget, and what is drawn in their place."""
    if config.get("method") == DISTIL and "prompts" not in config:
        return [("classes to forget", "none")]
    if "prompts" not in config:
        classes = ", ".join(numbered(label, names) for label in config.get("forget_classes", []))
        return [("classes to forget", classes), ("drawn in their place", cover_of(config, names))]
    forget, cover = config["prompts"]["forget"], config["prompts"]["cover"]
    several = [(f"forget “{name}”", f"draw “{text}”") for name, text in config.get("concepts") or ()]
    return [
        *several,
        ("concept to forget", config.get("concept") or "-"),
        ("prompts to forget", f"{len(forget):,d}" + (f", such as “{forget[0]}”" if forget else "")),
        ("drawn in their place", f"“{cover[0]}”" if cover else "-"),
        ("prompts to preserve", str(config["prompts"]["retain"])),
    ]


def _data_words(run: RunRecord) -> str:
    needed = run.config.get("training_images")
    return "unknown" if needed is None else "none: the method is data-free" if needed == 0 else f"{needed:,d}"


def _result(run: RunRecord) -> list[Block]:
    keys, values = shown_figures(run), {"value": run.metrics}
    results = [key for key in keys if key not in COSTS]
    before = {key: run.metrics[f"{BEFORE}{key}"] for key in results if run.metrics.get(f"{BEFORE}{key}") is not None}
    # Runs on classes have figures of their own for that.
    compared = {"before": before, **values} if before and run.of_prompts else values
    blocks: list[Block] = [metrics_table(results, compared, "What was measured")] if results else []
    blocks.append(metrics_table([key for key in keys if key in COSTS], values, "What it took, and what it changed"))
    if run.of_prompts and "concept" not in (run.metrics.get("protocol") or {}):
        blocks.insert(0, Text("The images have not been measured: pecker-fast evaluate-concept does that."))
    elif not run.of_prompts:
        extractor = run.metrics.get("feature_extractor") or "none, nothing was measured"
        blocks.append(Text(f"Features and judge: {extractor}."))
    return [*blocks, Text(caution(run))]


def _by_class(run: RunRecord) -> list[Section]:
    """A section with the judge's view of each class; none for runs that did not record it."""
    recorded = run.metrics.get("by_class")
    if not recorded:
        return []
    percent, probability = figure("ua").number, figure("forget_probability").number
    rows = [
        (
            row["class"],
            row["role"],
            f"{row['images']:,d}",
            percent(row.get("accuracy_before")),
            percent(row["accuracy"]),
            probability(row["probability"]),
            row["called"] or "-",
            percent(row["called_share"]),
        )
        for row in recorded["classes"]
    ]
    head = ["class", "role", "images", "recognised before (%)", "recognised (%)", "mean probability"]
    head += ["else taken most for", "share of that (%)"]
    blocks: list[Block] = [
        Text(
            "Recognised: images requested as the class that the judge assigns to it, of a forgotten class fewer is "
            "better. Before: the pretrained network."
        ),
        Table(head, rows, "llrrrrlr", "By requested class"),
    ]
    if recorded["drawn_as"]:
        names = list(recorded["drawn_as"][0]["shares"])
        cells = [(row["class"], *(percent(row["shares"][name]) for name in names)) for row in recorded["drawn_as"]]
        caption = "What a forgotten class is drawn as now: percentage of its images by the judge's class"
        blocks.append(Table(["requested", *names], cells, "l" + "r" * len(names), caption))
    return [Section("Class by class", blocks)]


# Figures of single prompts, and how many prompts a table shows at most.
PROMPT_FIGURES = ("gcd_score", "no_face_share", "inappropriate_probability", "clip_score")
SHOWN_PROMPTS = 50


def _by_prompt(run: RunRecord) -> list[Section]:
    """A section with the figures of each prompt; none for runs that did not record it."""
    recorded = run.metrics.get("by_prompt") or {}
    blocks: list[Block] = []
    for kind, words in (("concept", "Prompts of the concept"), ("near", "Prompts of near concepts")):
        rows = recorded.get(kind) or []
        keys = [key for key in PROMPT_FIGURES if any(row.get(key) is not None for row in rows)]
        if not keys:
            continue
        caption = f"{words}, in the order in which they were measured"
        if len(rows) > SHOWN_PROMPTS:
            # Those on which the concept shows most, or what should be preserved shows least.
            rows = sorted(rows, key=lambda row: _shows(row, keys), reverse=kind == "concept")[:SHOWN_PROMPTS]
            end = "highest" if kind == "concept" else "lowest"
            caption = (
                f"The {SHOWN_PROMPTS} of {len(recorded[kind]):,d} {words[0].lower()}{words[1:]} with the {end} "
                f"{figure(keys[0]).title}; metrics.json has all"
            )
        titles = ["prompt", "images", *(figure(key).title for key in keys)]
        cells = [
            (row["prompt"], f"{row['images']:,d}", *(figure(key).number(row.get(key)) for key in keys)) for row in rows
        ]
        blocks.append(Table(titles, cells, "l" + "r" * (len(titles) - 1), caption))
    if not blocks:
        return []
    shown = [figure(key) for key in PROMPT_FIGURES if any(key in row for rows in recorded.values() for row in rows)]
    return [Section("Prompt by prompt", [*blocks, meanings_table(shown)])]


def _shows(row: dict[str, Any], keys: Sequence[str]) -> float:
    """By the first of the figures, how much an image of a prompt shows of the prompt; without a face, nothing."""
    value = row.get(keys[0])
    return -1.0 if value is None else value


def _protocol(run: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    own = dict(run.metrics.get("protocol") or {})
    later = {"evaluate": own.pop("evaluation", None), "evaluate-concept": own.pop("concept", None)}
    if own:
        blocks += blocks_of(own, "During the run and at its end")
    for command, protocol in later.items():
        if protocol:
            keys = protocol.get("measured")
            shown = None if keys is None else [_label(key) for key in keys if key not in NO_FIGURES]
            labels = "" if shown is None else f": {', '.join(shown) or 'nothing new'}"
            blocks.append(Text(f"Measured after the run by pecker-fast {command}{labels}."))
            rest = {key: value for key, value in protocol.items() if key != "measured"}
            blocks += blocks_of(rest, "After the run")
    if blocks:
        return blocks
    if run.of_prompts:
        return [Text("Nothing has been measured since the run ended, and a run on prompts measures nothing itself.")]
    return [Text("Nothing was measured, or metrics.json does not say how.")]


def _label(key: str) -> str:
    known = find(key)
    return key if known is None else known.label


def _samples(run: RunRecord) -> list[Block]:
    exists = (run.folder / GRIDS).is_file()
    blocks: list[Block] = [
        Picture(GRIDS, _grid_words(run), grid_words(run, "the pretrained network") if exists else "")
    ]
    if run.of_prompts:
        forget = set(run.config["prompts"]["forget"])
        pictured = run.config["prompts"].get("pictured", [])
        words = [f"{prompt} (to be forgotten)" if prompt in forget else prompt for prompt in pictured]
        blocks += [Text("The prompts of the rows:"), Items(words)] if words else []
    blocks += [Picture(file, text, text) for file, text in CONCEPT_GRIDS if (run.folder / file).is_file()]
    return blocks


def _grid_words(run: RunRecord) -> str:
    if run.of_prompts:
        return "Samples of prompts to forget and to preserve, before and after unlearning, a row a prompt"
    classes = ", ".join(numbered(label, class_names(run)) for label in run.config.get("forget_classes", []))
    done = f"forgetting class {classes}" if classes else "distillation"
    return f"Samples of every class before and after {done}, a row a class"


def _curves(run: RunRecord, drawn: Sequence[str]) -> list[Block]:
    blocks: list[Block] = [Picture("report.png", f"Curves and bars: {'; '.join(drawn)}")] if drawn else []
    if not run.evaluations and not run.of_prompts:
        blocks.append(Text("evaluation.jsonl is missing or empty: there are no curves of figures."))
    elif not drawn:
        blocks.append(Text("train.jsonl is missing or empty: there is nothing to draw."))
    return blocks


def mask_blocks(run: RunRecord) -> list[Block]:
    """The density and overlap of a run's masks."""
    mask = run.mask
    if not mask:
        return [Text(unmasked(run) + ".")]
    ious = [line["mask_iou"] for line in run.log if line.get("mask_iou") is not None]
    text = f"The last mask keeps {mask['mask_density']:.1%} of the parameters"
    if mask.get("mask_touched_ever") is not None:
        text += f"; {mask['mask_touched_ever']:.1%} were salient at some time"
    if ious:
        text += f"; successive masks overlap by {min(ious):.2f} to {max(ious):.2f} (intersection over union)"
    rows = [(name, f"{share:.1%}") for name, share in mask["mask_density_by_module"].items()]
    return [Text(text + "."), Table(("part of the network", "salient"), rows, "lr", "Salient entries of the last mask")]


def _drift(run: RunRecord) -> list[Block]:
    recorded = run.json("drift")
    if not recorded:
        return [Text("drift.json is missing: the change of the weights was not recorded.")]
    masked = "salient" in recorded["total"]
    head = ["weights", "parameters", "drift", "changed", *(["salient, last mask"] if masked else [])]

    def rows(parts: dict[str, Any]) -> list[list[str]]:
        lines = []
        for name, part in parts.items():
            share = [f"{part['salient']:.1%}"] if masked else []
            drift = figure("drift_norm").number(part["drift"])
            lines.append([name, f"{part['parameters']:,d}", drift, f"{part['changed']:.2%}", *share])
        return lines

    align = "l" + "r" * (len(head) - 1)
    return [
        Text(
            "Drift is the 2-norm of the difference from the weights that training began with, divided by their norm: "
            "the pretrained weights, or those of distilled or initial_generator if given. Changed is the share of the "
            "weights that differ at all. Both are of the saved weights."
        ),
        Table(
            head, rows({"the whole network": recorded["total"], **recorded["modules"]}), align, "By part of the network"
        ),
        Table(head, rows(recorded["layers"]), align, "By layer"),
    ]


def _robustness(run: RunRecord) -> list[Block]:
    recorded = run.json("robustness")
    if not recorded and run.method == DISTIL:
        return [Text("Not tested: nothing is forgotten.")]
    if not recorded:
        return [Text("Not tested: how hard it is to bring the class back is unknown.")]
    blocks: list[Block] = []
    if (run.folder / "robustness.md").is_file():
        blocks.append(Link("The attacks in words and tables", "robustness"))
    summary = recorded.get("summary", {})
    keys = [key for key in summary if find(key) is not None]
    if keys:
        blocks.append(metrics_table(keys, {"value": summary}, "Summary"))
    unknown = {key: value for key, value in summary.items() if key not in keys}
    rest = {key: value for key, value in recorded.items() if key != "summary"}
    blocks += blocks_of({**rest, **({"summary": unknown} if unknown else {})})
    if (run.folder / "robustness.png").is_file():
        blocks.append(Picture("robustness.png", "Curves of unlearning accuracy against steps of relearning"))
    return blocks


def _cost(run: RunRecord) -> list[Block]:
    metrics, profile = run.metrics, run.json("profile")
    rows = [(figure(key).label, figure(key).text(metrics.get(key))) for key in COST]
    if metrics.get("seconds") and metrics.get("images"):
        rows.append(("Images per second", f"{metrics['images'] / metrics['seconds']:.1f}"))
    energy = profile.get("joules_per_image")
    rows.append(("Energy per image", "not measured" if energy is None else f"{energy:.3g} J"))
    if energy is not None:
        rows.append(("Energy of all images, at that rate", f"{energy * metrics.get('images', 0):.4g} J"))
    blocks: list[Block] = [Table(("figure", "value"), rows, "lr", "Cost")]
    if profile:
        blocks += blocks_of(profile, "profile.json")
    return blocks


def _files(run: RunRecord, changed: Collection[str]) -> list[Block]:
    note = card_note(run.folder)
    notes: list[Block] = [] if note is None else [Text(note)]
    recorded = run.json("hashes")
    if not recorded:
        return [Text("hashes.json is missing: later changes of the files cannot be detected."), *notes]
    rows = [
        (name, f"{file['bytes']:,d}", file["sha256"], "CHANGED" if name in changed else "-")
        for name, file in recorded.items()
    ]
    blocks: list[Block] = [
        Table(("file", "bytes", "sha256 when the run ended", "since"), rows, "lrll", "Hashes of the files")
    ]
    names = {
        "pretrained_sha256": run.config.get("pretrained_sha256"),
        "initial_generator_sha256": run.config.get("initial_generator_sha256"),
        "initial_score_sha256": run.config.get("initial_score_sha256"),
        "weights_sha256": run.metrics.get("weights_sha256"),
    }
    weights = [(name, value) for name, value in names.items() if value is not None]
    if weights:
        caption = "Hashes of the weights with their names and shapes, independent of the file format"
        blocks.append(Table(("weights", "sha256"), weights, "ll", caption))
    return [*blocks, *notes]


def _environment(run: RunRecord) -> list[Block]:
    recorded = run.json("environment")
    if not recorded:
        return [Text("environment.json is missing.")]
    # The file holds the reason why a back end cannot be used, or null if it can.
    backends = {
        device: {name: reason or "available" for name, reason in reasons.items()}
        for device, reasons in recorded.get("backends", {}).items()
    }
    return blocks_of({**recorded, "backends": backends})
