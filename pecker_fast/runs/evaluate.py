"""Measuring a run, or any network, with samples that are drawn once: the steps that all kinds of networks share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..environment import environment
from ..figures import describe
from ..files import write_json
from ..locks import PATIENCE, locked
from ..records import read_object
from ..report import portable
from ..run_records import read_metrics
from .arguments import check_output, option_groups
from .audit import update_metrics
from .folder import run_config
from .presets import preset


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(ABC):
    """Options of an evaluation. ``ClassEvaluation`` and ``PromptEvaluation`` add their own, and measure."""

    run: str | None = None
    """Folder of a run or of a model, a checkpoint, or a name on the Hugging Face hub."""
    pretrained_model_name_or_path: str | None = None
    """The same, under the name that other commands have for it."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: a GPU if there is one."""
    output: str | None = None
    """File for the result. Default: evaluation.json in the folder that is measured."""
    progress_bar: bool = True
    """Show a progress bar."""

    #: Key of "protocol" in metrics.json of a run, and whether runs measure such figures themselves.
    key: ClassVar[str]
    runs_measure: ClassVar[bool]

    @property
    def path(self) -> str | None:
        """What is measured. ValueError if it is given twice."""
        name = self.pretrained_model_name_or_path
        if self.run is not None and name is not None:
            raise ValueError(
                f"pretrained_model_name_or_path is {name!r}, but {self.run!r} is given as well: expected one of the two"
            )
        return self.run if name is None else name

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the run that is measured; empty if it is no run of unlearning."""
        return run_config(None if self.path is None else Path(self.path))

    @abstractmethod
    def measure(self, target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw and measure samples; return the figures, and the protocol of how they were measured, as JSON.

        Samples are cached in the folder evaluation/ beside ``target``. ValueError or TypeError for a wrong option,
        before anything is drawn.
        """


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation.

    Parameters
    ----------
    figures : dict
        Value of each figure by its key.
    protocol : dict
        How they were measured.
    path : Path
        The file that both were written to.
    """

    figures: dict[str, Any]
    protocol: dict[str, Any]
    path: Path

    @property
    def table(self) -> str:
        """The figures for a terminal."""
        return describe(self.figures)


def evaluate(args: EvaluateArguments) -> Measured:
    """Measure a run or a network and write evaluation.json.

    Samples are drawn once for a network, a sampler and a seed, and cached in evaluation/ beside the result: an
    interrupted evaluation continues, and further measurements draw nothing. Figures of a run that it has not measured
    itself are added to its metrics.json and its report.

    Parameters
    ----------
    args : EvaluateArguments
        ``ClassEvaluation`` or ``PromptEvaluation``.

    Returns
    -------
    Measured
        The figures and their protocol.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, before anything is drawn.
    """
    folder = None if args.path is None else Path(args.path)
    if args.output is None:
        target = check_output(_result_file(folder))
    else:
        target = check_output(args.output, ".json", "a result of evaluate", _read_result)
    figures, protocol = args.measure(target)
    figures, protocol = portable(figures), portable({**protocol, "environment": environment()})
    write_json(target, {**figures, "protocol": protocol})
    if folder is not None and args.config and (folder / "metrics.json").is_file():
        _add_to_run(folder, args, figures, protocol)
    return Measured(figures, protocol, target)


def _result_file(folder: Path | None) -> Path:
    # A model on the hub has no folder here.
    if folder is None or not folder.exists():
        return Path("evaluation.json")
    return (folder if folder.is_dir() else folder.parent) / "evaluation.json"


def _read_result(path: Path) -> None:
    """ValueError unless a file has the figures of a network with their protocol."""
    if "environment" not in read_object(path).get("protocol", ()):
        raise ValueError(f"{path} is not a result of evaluate")


def _add_to_run(folder: Path, args: EvaluateArguments, figures: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Add the figures that a run has not measured itself to its metrics.json, with their protocol."""
    with locked(folder, PATIENCE):
        _add(folder, args, figures, protocol)


def _add(folder: Path, args: EvaluateArguments, figures: dict[str, Any], protocol: dict[str, Any]) -> None:
    metrics = read_metrics(folder)
    protocols = metrics.get("protocol", {})
    # Figures of an earlier evaluation are replaced. Older versions did not list them if runs measure none themselves.
    unlisted = [] if args.runs_measure or args.key not in protocols else list(figures)
    earlier = protocols.get(args.key, {}).get("measured", unlisted)
    metrics = {name: value for name, value in metrics.items() if name not in earlier}
    new = {name: value for name, value in figures.items() if metrics.get(name) is None}
    described = {name: value for name, value in protocol.items() if name != "environment"}
    described |= {"packages": protocol["environment"]["packages"], "measured": list(new)}
    update_metrics(folder, {**metrics, **new, "protocol": {**protocols, args.key: described}})


def evaluation_class(
    paths: Sequence[str] = (), preset_name: str | None = None, options: Iterable[str] = ()
) -> type[EvaluateArguments]:
    """The kind of evaluation for a run or a model.

    Parameters
    ----------
    paths : sequence of str
        What may be the folder of a run or of a model.
    preset_name : str, optional
        Name of a preset, which decides.
    options : iterable of str
        Names of the options that are set: one that only evaluations of text-to-image models have decides, too.
    """
    # They bring libraries that take a while.
    from .classes.evaluation import ClassEvaluation
    from .prompts.evaluation import PromptEvaluation

    if preset_name is not None:
        return PromptEvaluation if preset(preset_name).task == "prompts" else ClassEvaluation
    own = set(option_groups(PromptEvaluation())) - set(option_groups(ClassEvaluation()))
    records = [run_config(Path(path)) for path in paths]
    if any(record and "prompts" not in record for record in records):
        return ClassEvaluation
    if own & set(options) or any(_is_of_prompts(Path(path)) for path in paths):
        return PromptEvaluation
    return ClassEvaluation


def _is_of_prompts(folder: Path) -> bool:
    """Whether it is the folder of a run on prompts, or of a text-to-image model."""
    config = run_config(folder)
    return "prompts" in config if config else (folder / "text_encoder").is_dir()
