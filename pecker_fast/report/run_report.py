"""The report of one run, for whoever has to check it: report.md, report.html, report.png and the model card."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from .blocks import Block, Link, Picture, Section, Table, Text, blocks_of
from .card import write_card
from .curves import draw_run
from .files import Run
from .places import portable
from .render import json_code, write_document
from .words import CAUTION, MAIN, ROWS, asked, cover_of, drawn, number, source_of, unmasked

COST = ("seconds", "images", "peak_memory_bytes", "seconds_per_image")
GRIDS = "samples/before_after.png"


def write_run_report(folder: Path, changed: Collection[str] = ()) -> Path:
    """Draws report.png and writes report.md, report.html and, where there is a pipeline, README.md, its model card,
    from what a run left in its folder; returns the path of report.md.

    ``changed``: files that are no longer as the run left them.

    Raises ValueError where there is no metrics.json, ImportError where matplotlib is missing.
    """
    run = Run.read(folder)
    draw_run(run, run.folder / "report.png")
    write_card(run)
    return write_document(run.folder, f"Unlearning with {run.metrics.get('method', '?')}", sections(run, changed))


def sections(run: Run, changed: Collection[str] = ()) -> list[Section]:
    """What the report says, in order."""
    return [
        Section("Request", _request(run)),
        Section("Result", _result(run)),
        Section("Samples", _samples(run)),
        Section("Curves", _curves(run)),
        Section("How it was measured", _protocol(run)),
        Section("Mask", mask_blocks(run)),
        Section("Drift of the weights", _drift(run)),
        Section("Robustness", _robustness(run)),
        Section("Time, memory and energy", _cost(run)),
        Section("Files", _files(run, changed)),
        Section("Environment", _environment(run)),
        Section("Configuration", [json_code(portable(run.config))]),
    ]


def _request(run: Run) -> list[Block]:
    config = portable(run.config)
    blocks: list[Block] = [Text(asked(config))]
    if config:
        rows = [
            ("method", str(config.get("method"))),
            *_forgotten(config),
            ("pretrained network", source_of(config)),
            ("its weights' sha256", config.get("pretrained_sha256") or "-"),
            ("seed of everything random", str(config.get("seed"))),
            ("images of what is to be forgotten", config.get("forget_data") or "none given"),
            ("images of the training set", _data_words(run)),
        ]
        rows += [
            (name.replace("_", " "), config[name])
            for name in ("initial_generator", "initial_score")
            if config.get(name) is not None
        ]
        blocks.append(Table(("what", "as asked"), rows, "ll"))
    return blocks


def _forgotten(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What is to be forgotten and drawn instead: classes, or prompts."""
    if "prompts" not in config:
        classes = ", ".join(map(str, config.get("forget_classes", [])))
        return [("classes to forget", classes), ("drawn in their place", cover_of(config))]
    forget, cover = config["prompts"]["forget"], config["prompts"]["cover"]
    return [
        ("concept to forget", config.get("concept") or "-"),
        ("prompts to forget", f"{len(forget)}, such as “{forget[0]}”"),
        ("drawn in their place", f"“{cover[0]}”"),
        ("prompts to stay", str(config["prompts"]["retain"])),
    ]


def _data_words(run: Run) -> str:
    needed = run.config.get("training_images")
    return "not known" if needed is None else "none: the method is data-free" if needed == 0 else f"{needed:,d}"


def _result(run: Run) -> list[Block]:
    kept = [row for row in ROWS if row[0] in MAIN or run.metrics.get(row[0]) is not None]
    rows = [(key, number(run.metrics, key, form), meaning) for key, form, meaning in kept]
    extractor = run.metrics.get("feature_extractor") or "none, nothing was measured"
    return [
        Table(("figure", "value", "meaning"), rows, "lrl"),
        Text(f"Features and judge: {extractor}."),
        Text(CAUTION),
    ]


def _protocol(run: Run) -> list[Block]:
    blocks: list[Block] = []
    own = dict(run.metrics.get("protocol") or {})
    evaluation = own.pop("evaluation", None)
    if own:
        blocks += blocks_of(own, "during the run and at its end")
    if evaluation:
        measured = ", ".join(evaluation.get("measured", []))
        blocks.append(Text(f"Measured after the run, by pecker-fast evaluate: {measured or 'nothing new'}."))
        blocks += blocks_of({k: v for k, v in evaluation.items() if k != "measured"}, "after the run")
    return blocks or [Text("Nothing was measured, or metrics.json does not say how.")]


def _samples(run: Run) -> list[Block]:
    blocks: list[Block] = [Picture(GRIDS, _grid_words(run))]
    if (run.folder / GRIDS).is_file():
        said = f"Left: the pretrained network (DDIM). Right: {drawn(run.metrics)}. Framed: what was to be forgotten."
        blocks.append(Text(said))
    return blocks


def _grid_words(run: Run) -> str:
    if "prompts" in run.config:
        return "Samples of prompts to forget and to stay before and after forgetting, a row a prompt"
    classes = ", ".join(map(str, run.config.get("forget_classes", [])))
    return f"Samples of every class before and after forgetting class {classes}, a row a class"


def _curves(run: Run) -> list[Block]:
    words = "Curves of unlearning accuracy, retained accuracy, Fréchet distance, diversity and losses, and bars of the "
    blocks: list[Block] = [Picture("report.png", words + "mask's density by part of the network")]
    if not run.evaluations:
        blocks.append(Text("evaluation.jsonl is missing or empty: there are no curves of what was measured."))
    return blocks


def mask_blocks(run: Run) -> list[Block]:
    """What is known of a run's masks."""
    mask = run.mask
    if not mask:
        return [Text(unmasked(run) + ".")]
    ious = [line["mask_iou"] for line in run.log if line.get("mask_iou") is not None]
    said = f"The last mask keeps {mask['mask_density']:.1%} of the parameters"
    if mask.get("mask_touched_ever") is not None:
        said += f"; {mask['mask_touched_ever']:.1%} were salient at some time"
    if ious:
        said += f"; successive masks overlap by {min(ious):.2f} to {max(ious):.2f} (intersection over union)"
    rows = [(name, f"{share:.1%}") for name, share in mask["mask_density_by_module"].items()]
    return [Text(said + "."), Table(("part of the network", "salient"), rows, "lr")]


def _drift(run: Run) -> list[Block]:
    found = run.json("drift")
    if not found:
        return [Text("drift.json is missing: how far the weights moved was not recorded.")]
    masked = "salient" in found["total"]
    head = ["weights", "parameters", "drift", "changed", *(["salient, last mask"] if masked else [])]

    def rows(described: dict[str, Any]) -> list[list[str]]:
        lines = []
        for name, said in described.items():
            share = [f"{said['salient']:.1%}"] if masked else []
            drift = "-" if said["drift"] is None else f"{said['drift']:.4f}"
            lines.append([name, f"{said['parameters']:,d}", drift, f"{said['changed']:.1%}", *share])
        return lines

    align = "l" + "r" * (len(head) - 1)
    return [
        Text(
            "Drift is the 2-norm of the difference from the pretrained weights (those of initial_generator, where it "
            "is given) over the norm of these; changed is the share of entries that differ at all. Both are of the "
            "weights that were saved."
        ),
        Table(head, rows({"the whole network": found["total"], **found["modules"]}), align, "by part"),
        Table(head, rows(found["layers"]), align, "by layer"),
    ]


def _robustness(run: Run) -> list[Block]:
    found = run.json("robustness")
    if not found:
        return [Text("Not probed: how hard it is to bring the class back is not known.")]
    blocks = blocks_of(found)
    if (run.folder / "robustness.md").is_file():
        blocks.insert(0, Link("The attacks in words and tables", "robustness"))
    if (run.folder / "robustness.png").is_file():
        blocks.append(Picture("robustness.png", "Curves of unlearning accuracy against steps of relearning"))
    return blocks


def _cost(run: Run) -> list[Block]:
    m, profile = run.metrics, run.json("profile")
    rows = [(key, number(m, key, form)) for key, form, _ in ROWS if key in COST]
    if m.get("seconds") and m.get("images"):
        rows.append(("images per second", f"{m['images'] / m['seconds']:.1f}"))
    energy = profile.get("joules_per_image")
    rows.append(("joules per image", "not measured" if energy is None else f"{energy:.3g}"))
    if energy is not None:
        rows.append(("joules in all, at that rate", f"{energy * m.get('images', 0):.4g}"))
    blocks: list[Block] = [Table(("figure", "value"), rows, "lr")]
    if profile:
        blocks += blocks_of(profile, "profile.json")
    return blocks


def _files(run: Run, changed: Collection[str]) -> list[Block]:
    found = run.json("hashes")
    if not found:
        return [Text("hashes.json is missing: nothing says what the files were when the run ended.")]
    rows = []
    for name, said in found.items():
        rows.append((name, f"{said['bytes']:,d}", said["sha256"], "CHANGED" if name in changed else "-"))
    blocks: list[Block] = [Table(("file", "bytes", "sha256 when the run ended", "since"), rows, "lrll")]
    names = {
        "pretrained_sha256": run.config.get("pretrained_sha256"),
        "initial_generator_sha256": run.config.get("initial_generator_sha256"),
        "initial_score_sha256": run.config.get("initial_score_sha256"),
        "weights_sha256": run.metrics.get("weights_sha256"),
    }
    weights = [(name, value) for name, value in names.items() if value is not None]
    if weights:
        blocks.append(
            Table(("weights", "sha256"), weights, "ll", "of weights, names and shapes, whatever file they are in")
        )
    return blocks


def _environment(run: Run) -> list[Block]:
    found = run.json("environment")
    if not found:
        return [Text("environment.json is missing.")]
    # In the file they have the reason why one cannot be used, or nothing.
    backends = {
        device: {name: reason or "available" for name, reason in reasons.items()}
        for device, reasons in found.get("backends", {}).items()
    }
    return blocks_of({**found, "backends": backends})
