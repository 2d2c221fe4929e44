"""Concepts of a text-to-image model one after the other, each request starting from the result of the one before."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data import load_concepts
from ...environment import environment
from ...files import write_folder, write_json, write_text
from ...models import resolve_text
from ...records import read_object
from ...report import RunRecord, portable, write_concept_sequence
from ..arguments import UnlearnArguments
from ..distilled import SCORE, last_score
from ..evaluate import evaluate
from ..presets import prompt_preset
from ..sequence import PATCH, RequestsArguments, run_requests
from ..several import check_alone, check_place, check_shared, command_line, ended
from .evaluation import PromptEvaluation
from .measure import DetectorArguments, MeasureArguments
from .task import PromptTask

# Options of the sequence that its runs take, under the same names.
OF_RUNS = ("device", "pretrained_model_name_or_path", "retain_prompts", "forget_prompts")
# Figures of a request besides those of each concept.
COLUMNS = ("clip_ua", "near_clip_recognised", "near_clip_score", "gcd_score", "near_gcd_score")
COLUMNS += ("parameters_changed", "images", "seconds")


@dataclass(frozen=True, kw_only=True)
class PromptSequenceArguments(RequestsArguments):
    """Options of a sequence of requests on a text-to-image model."""

    concepts: str | None = None
    """File of the concepts, "concept, cover" in each line, in the order in which they are forgotten."""
    method: str = "patch"
    """Name of a method that forgets prompts."""
    preset: str = "sd15-celebrity"
    """sd15-celebrity or sdxl-celebrity."""
    device: str | None = None
    """cpu, cuda, ... Default: a GPU if there is one."""
    pretrained_model_name_or_path: str | None = None
    """The Stable Diffusion to start from: a folder, or a name on the hub."""
    initial_generator: str | None = None
    """U-Net that the generator of the first request, and of all at once, starts from."""
    distilled: str | None = None
    """Folder of a run of distillation, or "auto", in place of it."""
    retain_prompts: str = "retain"
    """File of prompts to keep, for the training."""
    forget_prompts: str | None = None
    """File of templates with {concept}. Default: a list that comes with the package."""
    set: tuple[str, ...] = ()
    """Options of the method, as name=value, such as generator_learning_rate=1e-7; also those of memory and samples."""
    images: MeasureArguments = field(default_factory=MeasureArguments)
    """What is drawn for the measurement."""
    detectors: DetectorArguments = field(default_factory=DetectorArguments)
    """What measures it: clip, a celebrity detector, or both."""

    def run(self, name: str, count: int, **more: Any) -> UnlearnArguments:
        """The options of the request for the first ``count`` concepts, whose file must exist when it runs."""
        own = {"concepts": str(self.part(count))}
        return self.request(name, own, OF_RUNS, more)

    def part(self, count: int) -> Path:
        """The file of the first ``count`` concepts."""
        return self.folder / f"concepts-{count}.txt"

    @property
    def first(self) -> dict[str, Any]:
        """Options that the first request has and later ones have not."""
        values = {name: getattr(self, name) for name in ("initial_generator", "distilled")}
        return {name: value for name, value in values.items() if value is not None}


def prompt_sequence(args: PromptSequenceArguments) -> tuple[Path, str]:
    """Forget concepts one request after the other, measure all of them after each, and compare with all at once.

    Request i forgets all concepts up to the i-th; otherwise as ``sequence`` of classes.

    Parameters
    ----------
    args : PromptSequenceArguments
        The concepts and the options.

    Returns
    -------
    tuple of Path and str
        sequence.md, and its table for a terminal.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, before the first request starts.
    SystemExit
        With status 128 + n if signal n stopped a run, after a checkpoint.
    """
    check_alone("sequence")
    check_place("sequence", args.folder)
    if args.concepts is None:
        raise ValueError('concepts is not given: expected a file with "concept, cover" in each line')
    concepts = load_concepts(args.concepts)
    if args.detectors.clip is None and args.detectors.celebrity_detector is None:
        raise ValueError("clip and celebrity_detector are not given: expected one of them, to measure each request")
    subject = prompt_preset(args.preset).subject
    if subject != "celebrity":
        raise ValueError(f"preset is {args.preset!r}, whose request has no names: expected one for concepts")
    # The last request is checked before the first one starts.
    last = args.run("request", len(concepts), **args.first, concepts=args.concepts)
    resolve_text(args.pretrained_model_name_or_path)
    check_shared(args.shared, [last])
    PromptTask.check(last)
    args.images.resolved(subject, concepts[0][0], (), [name for name, _ in concepts[1:]])
    args.folder.mkdir(parents=True, exist_ok=True)
    for count in range(1, len(concepts) + 1):
        lines = [", ".join(f'"{text}"' if "," in text else text for text in pair) for pair in concepts[:count]]
        write_text(args.part(count), "\n".join(lines) + "\n")
    plan: list[UnlearnArguments] = []
    for count in range(1, len(concepts) + 1):
        plan.append(args.run(f"request-{count}", count, **args.start(plan)))
    once = None
    if args.at_once and len(concepts) > 1:
        # A folder of its own for each number, so that concepts can be added.
        once = args.run(f"at-once-{len(concepts)}", len(concepts), **args.first)
    every = [*plan, *([once] if once else [])]
    for run in every:
        ended(run)
    names = [f"{i + 1}: forget {name}" for i, (name, _) in enumerate(concepts)]
    titles = [*names, *(["all at once"] if once else [])]
    run_requests(args, plan, once, titles, _keep_score)
    rows = [_row(args, title, run) for title, run in zip(titles, every, strict=True)]
    record = {
        "command": command_line("sequence"),
        "method": args.method,
        "preset": args.preset,
        "seed": args.seed,
        "concepts": [list(pair) for pair in concepts],
        "score": args.score if args.distils else None,
        "rows": rows,
        "environment": environment(),
    }
    write_json(args.folder / "sequence.json", portable(record))
    return write_concept_sequence(args.folder, COLUMNS)


def _keep_score(folder: Path) -> None:
    """Write the score network of a run's last checkpoint into ``folder/score``: it fits the generator as it is now."""
    unet = resolve_text(folder).load_unet()
    unet.load_state_dict(last_score(folder, "start over, or choose --score teacher"))
    write_folder(folder / SCORE, lambda path: unet.save_pretrained(path, safe_serialization=True))


def _row(args: PromptSequenceArguments, title: str, run: UnlearnArguments) -> dict[str, Any]:
    """What is reported after a request: the figures of all, and those of each concept forgotten so far."""
    asked = {**dataclasses.asdict(args.images), **dataclasses.asdict(args.detectors)}
    place = run.folder / "sequence.json"
    if not place.is_file() or read_object(place) != json.loads(json.dumps(asked)):
        print(f"measuring: {run.folder.name}")
        evaluate(
            PromptEvaluation(
                run=str(run.folder),
                images=args.images,
                detectors=args.detectors,
                device=args.device,
                progress_bar=args.progress_bar,
                measure_before=False,
            )
        )
        # Written last: the figures in metrics.json are complete then.
        write_json(place, asked)
    metrics, patch = RunRecord.read(run.folder).metrics, run.folder / PATCH
    (name, _), *others = load_concepts(run.request.concepts)
    return {
        "request": title,
        "folder": run.folder.name,
        # One concept is measured as all of them.
        "by_concept": metrics["concepts"] if others else {name: {key: metrics.get(key) for key in COLUMNS}},
        **{key: metrics.get(key) for key in COLUMNS},
        **({"patch_bytes": patch.stat().st_size} if patch.is_file() else {}),
    }
