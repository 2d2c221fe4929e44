"""A run of unlearning, read from its folder."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..mask import SaliencyMask
from ..models import ClassModel, TextModel, resolve, resolve_text
from ..models.offline import loading
from ..records import read_object
from ..run_records import read_evaluations, read_log, read_metrics
from .folder import run_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class PipelineIndex(TypedDict):
    """model_index.json."""

    _class_name: str | list[str]


class Run:
    """A run of unlearning. Everything is read from its folder on access.

    Parameters
    ----------
    folder : str or Path
        Folder of the run, as ``unlearn`` or the command line wrote it.

    Attributes
    ----------
    folder : Path
        The folder.
    config : dict
        The configuration: every option, and sha256 of the weights that the run started from (config.json).

    Raises
    ------
    ValueError
        If it is not the folder of a run of unlearning.

    Examples
    --------
    >>> run = pf.Run("runs/digits-pecker-seed0")
    >>> run.metrics["ua"], run.mask.density
    >>> run.pipeline(class_labels=[0, 1]).images
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = run_config(self.folder)
        if not self.config:
            raise ValueError(f"folder is {str(folder)!r}, expected the folder of a run of unlearning (config.json)")

    def __repr__(self) -> str:
        state = "ended" if self.has_ended else "not ended"
        return f"Run({str(self.folder)!r}: {self.config['method']} on {self.config['preset']}, {state})"

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended; otherwise it can be resumed (resume_from_checkpoint="latest")."""
        return (self.folder / "metrics.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured, during the run and by ``evaluate`` since (metrics.json).

        Raises
        ------
        ValueError
            If the run has not ended.
        """
        if not self.has_ended:
            raise ValueError(f"{self.folder} has no metrics.json: the run has not ended")
        return read_metrics(self.folder)

    @property
    def log(self) -> list[dict[str, Any]]:
        """Losses, masks and times, a record a log step (train.jsonl)."""
        return read_log(self.folder)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """What was measured during the run, a record an evaluation (evaluation.jsonl)."""
        return read_evaluations(self.folder)

    @property
    def report(self) -> Path:
        """The report to read, report.md; report.html is the same."""
        return self.folder / "report.md"

    @cached_property
    def mask(self) -> SaliencyMask | None:
        """The last mask, over the parameters of the network; None for methods without one."""
        path = self.folder / "mask.safetensors"
        return SaliencyMask.load(path) if path.is_file() else None

    @cached_property
    def model(self) -> ClassModel | TextModel:
        """The network that has forgotten, with its schedule; its ``sampler()`` draws as the run did.

        Raises
        ------
        ValueError
            If the run has not ended.
        """
        return resolve_text(self.folder) if "prompts" in self.config else resolve(self.folder)

    @cached_property
    def pipeline(self) -> "DiffusionPipeline":
        """The result as a pipeline of diffusers.

        Raises
        ------
        ValueError
            If there is none: the run has not ended, or an earlier version made it, which left a class-conditional
            network that is sampled in many steps without one; ``model`` draws with it.
        """
        path = self.folder / "model_index.json"
        if not path.is_file():
            raise ValueError(
                f"{self.folder} has no pipeline: the run has not ended, or an earlier version made it, which left "
                "networks that are sampled in many steps without one; draw with run.model.sampler().draw"
            )
        kind = read_object(path, PipelineIndex)["_class_name"]
        # (module, class) if the code of the pipeline is saved beside it.
        pipeline = _pipeline_class(kind if isinstance(kind, str) else kind[-1], path)
        with loading(self.folder, "pipeline"):
            return pipeline.from_pretrained(self.folder, local_files_only=True)


def _pipeline_class(name: str, path: Path) -> "type[DiffusionPipeline]":
    """The class of a saved pipeline: this package's own, not the code in the folder."""
    if name == "OneStepPipeline":
        from ..diffusion.pipeline import OneStepPipeline

        return OneStepPipeline
    if name == "ManyStepPipeline":
        from ..diffusion.many_step_pipeline import ManyStepPipeline

        return ManyStepPipeline
    if name == "OneStepTextPipeline":
        from ..diffusion.text_pipeline import OneStepTextPipeline

        return OneStepTextPipeline
    import diffusers

    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise ValueError(f"{path} is of the class {name!r}, expected a pipeline of diffusers or of this package")
    return kind
