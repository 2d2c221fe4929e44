"""The files of a run's folder as records: which fields the readers of runs rely on, and of which type.

Older versions wrote fewer fields, so few are required.
"""

from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import NotRequired, Required

from .figures import find
from .records import COUNT, POSITIVE, SHA256, RecordError, check_object, read_lines, read_object


class Options(TypedDict, total=False):
    """Options of a method that readers of its run need. The method's own dataclass checks the others."""

    t_init: COUNT | None
    eval_sampler: str
    num_inference_steps: POSITIVE
    eval_guidance_scale: float
    clip_sample: bool


class Prompts(TypedDict):
    """What a run on prompts forgets and keeps."""

    forget: list[str]
    cover: list[str] | None
    retain: COUNT
    negative: NotRequired[str | None]
    pictured: NotRequired[list[str]]


class Config(TypedDict, total=False):
    """config.json of a run."""

    method: str
    preset: str
    seed: int
    options: Options
    prompts: Prompts
    forget_classes: list[COUNT]
    class_names: list[str] | None
    cover_class: int | str | None
    pretrained_model_name_or_path: str | None
    checkpoint_state: str
    pretrained_sha256: SHA256 | None
    initial_generator: str | None
    initial_generator_sha256: SHA256 | None
    initial_score: str | None
    initial_score_sha256: SHA256 | None
    distilled: str | None
    judge: str | None
    dataset_name: str | None
    data_root: str | None
    concept: str | None
    cover: str | None
    concepts: list[list[str]] | None
    training_images: COUNT | None
    num_processes: POSITIVE


# The name of a class; "class" is no name of an attribute.
Named = TypedDict("Named", {"class": str})


class ClassRow(Named):
    """What a judge makes of the images of a class."""

    images: COUNT
    accuracy: float
    accuracy_before: NotRequired[float | None]
    probability: float
    called: str | None
    called_share: float
    role: str


class DrawnAs(Named):
    """As what a forgotten class is drawn: percentages of its images."""

    shares: dict[str, float]


class ByClass(TypedDict):
    """ "by_class" of metrics.json."""

    classes: list[ClassRow]
    drawn_as: list[DrawnAs]


class Samples(TypedDict, total=False):
    """How the images of a measurement were drawn."""

    sampler: str | None
    num_inference_steps: POSITIVE | None
    samples_per_class: COUNT | None


class Judge(TypedDict, total=False):
    """The classifier of a measurement."""

    accuracy: float | None


class PromptRow(TypedDict, total=False):
    """The scores of a prompt alone."""

    prompt: Required[str]
    images: Required[COUNT]
    gcd_score: float | None
    no_face_share: float | None
    inappropriate_probability: float | None
    clip_score: float | None


class Measurement(TypedDict, total=False):
    """How a later measurement was made, and which figures are its own."""

    measured: list[str]
    packages: dict[str, Any]
    samples: Samples


class Protocol(TypedDict, total=False):
    """ "protocol" of metrics.json: how the run measured itself, and how later commands measured it."""

    evaluation: Measurement
    concept: Measurement
    packages: dict[str, Any]
    judge: Judge
    samples: Samples
    forget_classes: list[COUNT]


class Metrics(TypedDict, total=False):
    """metrics.json of a run. Its figures are those of the catalogue: numbers, or null."""

    method: str
    # Rows of a comparison that train nothing have none.
    seed: int | None
    sampler: str
    sampling_steps: int
    pretrained: str | None
    weights_sha256: SHA256
    feature_extractor: str | None
    protocol: Protocol
    by_class: ByClass | None
    by_prompt: dict[str, list[PromptRow]] | None
    before_diversity: float | None
    images: COUNT
    iterations: COUNT
    seconds: float


class Hash(TypedDict):
    """Size and sha256 of a file."""

    bytes: COUNT
    sha256: SHA256


class Drift(TypedDict):
    """How far a part of a network is from where it started."""

    parameters: COUNT
    changed: float
    drift: float | None
    salient: NotRequired[float]


class Drifts(TypedDict):
    """drift.json."""

    total: Drift
    modules: dict[str, Drift]
    layers: dict[str, Drift]


class Environment(TypedDict, total=False):
    """environment.json."""

    packages: dict[str, str | None]
    gpus: list[Any]
    backends: dict[str, dict[str, str | None]]
    chosen: dict[str, dict[str, str | None]]


class Event(TypedDict, total=False):
    """A line of history.jsonl."""

    event: str
    date: str
    step: COUNT
    command: list[str]
    version: str | None
    commit: str | None
    python: str | None
    torch: str | None


class Cost(TypedDict):
    """What an attack takes to bring a class back."""

    attack: str
    steps: float
    images: float
    censored: bool


class Verdict(TypedDict):
    """How that compares with another network."""

    text: str


class Costs(TypedDict):
    """ "cost" of robustness.json: of the strongest attack on each network."""

    networks: dict[str, Cost]
    verdicts: dict[str, Verdict]


class Robustness(TypedDict, total=False):
    """robustness.json of a run."""

    summary: dict[str, float | None]
    cost: Costs | None
    inversion_cost: Costs | None


class LogLine(TypedDict, total=False):
    """A line of train.jsonl."""

    phase: str
    iteration: COUNT
    step: COUNT
    images: COUNT
    seconds: float
    mask_density: float
    mask_iou: float | None
    mask_touched_ever: float
    mask_density_by_module: dict[str, float]


class Evaluation(TypedDict, total=False):
    """A line of evaluation.jsonl."""

    step: COUNT
    images: COUNT
    seconds: float
    feature_extractor: str | None


# Files whose fields are checked, by the name without ".json".
RECORDS: dict[str, Any] = {"config": Config, "drift": Drifts, "environment": Environment, "robustness": Robustness}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run. RecordError if it is missing or damaged."""
    return read_object(folder / "config.json", Config)


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a run. RecordError if it is missing or damaged."""
    path = folder / "metrics.json"
    metrics = read_object(path, Metrics)
    check_figures(metrics, str(path))
    return metrics


def read_log(folder: Path) -> list[dict[str, Any]]:
    """train.jsonl of a run, empty if there is none. RecordError if it is damaged."""
    return read_lines(folder / "train.jsonl", LogLine)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """history.jsonl of a run, empty if there is none. RecordError if it is damaged."""
    return read_lines(folder / "history.jsonl", Event)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """evaluation.jsonl of a run, empty if there is none. RecordError if it is damaged."""
    path = folder / "evaluation.jsonl"
    records = read_lines(path, Evaluation)
    for number, record in enumerate(records, 1):
        check_figures(record, f"{path}, record {number},")
    return records


def read_file(folder: Path, name: str) -> dict[str, Any]:
    """``name``.json of a run, empty if there is none. RecordError if it is damaged."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return {}
    if name == "metrics":
        return read_metrics(folder)
    return read_hashes(folder) if name == "hashes" else read_object(path, RECORDS.get(name))


def read_hashes(folder: Path) -> dict[str, Any]:
    """hashes.json of a run, empty if there is none. RecordError if it is damaged."""
    path = folder / "hashes.json"
    # Its keys are names of files, so the object is a field of the record that is checked.
    hashes = read_object(path) if path.is_file() else {}
    check_hashes(hashes, str(path))
    return hashes


def check_hashes(hashes: dict[str, Any], name: str) -> None:
    """Raise RecordError unless every value is the size and sha256 of a file inside the folder."""
    for key, value in hashes.items():
        if Path(key).is_absolute() or ".." in Path(key).parts:
            raise RecordError(
                f"{name} is damaged: it names {key!r}, which is not in the folder; restore it from a copy"
            )
        check_object(value, Hash, f"{name}, {key},")


def check_figures(record: dict[str, Any], name: str) -> None:
    """Raise RecordError unless every figure of the catalogue in a record is a number or null."""
    for key, value in record.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not number and (row := find(key)) is not None and row.form != "{}":
            raise RecordError(
                f"{name} is damaged: {key} is {str(value)[:60]!r}, expected a number or null; measure the run again"
            )
