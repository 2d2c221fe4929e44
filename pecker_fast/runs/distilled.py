"""Distilled networks: the folder that a run of distillation leaves, where it is looked for, and what it starts.

The folder has the one-step generator in ``unet``, its score network in ``score``, and config.json, which says of which
pretrained network and for which ``t_init`` they were distilled.
"""

import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models import shipped_network
from ..run_records import read_config
from ..training.checkpoints import STATE, Checkpoints
from ..training.state import load_state
from ..unlearning import method_class
from .arguments import UnlearnArguments, with_options
from .presets import ClassPreset, preset
from .task import task_class

METHOD = "distil"
# Folder of the score network in that of a run.
SCORE = "score"
# Networks that come with the package, such as "shipped:digits".
SHIPPED = "shipped:"
# Folder of the distilled networks that come with the package, and of those beside a pretrained network.
GENERATOR = "distilled"
AUTO = "auto"
MAKE = "pecker-fast distil makes it"
INITIAL = ("initial_generator", "initial_score")


@dataclass(frozen=True)
class Distilled:
    """A run of distillation that has ended.

    Parameters
    ----------
    name : str
        Its folder, or ``SHIPPED`` and a name.
    folder : Path
        Its folder.
    t_init : int
        Timestep of the generator.
    pretrained_sha256 : str
        Of the network that was distilled.
    """

    name: str
    folder: Path
    t_init: int
    pretrained_sha256: str

    @classmethod
    def read(cls, name: str) -> "Distilled":
        """Read config.json of a run of distillation, or of one that comes with the package.

        Raises
        ------
        ValueError
            If there is no such run, or it has not ended.
        """
        folder = _folder_of(name)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"distilled is {name!r}, expected the folder of a run of distillation ({MAKE}): there is no "
                f"{folder / 'config.json'}"
            )
        try:
            config = read_config(folder)
            if config["method"] != METHOD:
                raise ValueError(f"it is of a run of {config['method']}")
            facts = int(config["options"]["t_init"]), str(config["pretrained_sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"distilled is {name!r}, expected the folder of a run of distillation ({MAKE}): {error}"
            ) from error
        if not is_distilled(name):
            raise ValueError(
                f"distilled is {name!r}, whose distillation has not ended: continue it with pecker-fast distil and "
                "--resume_from_checkpoint latest"
            )
        return cls(name, folder, *facts)

    @property
    def networks(self) -> dict[str, str]:
        """The folder of each network, by the option that a run starts from it with."""
        return dict(zip(INITIAL, (str(self.folder), str(self.folder / SCORE)), strict=True))

    def check_base(self, pretrained_sha256: str) -> None:
        """Raise ValueError unless it was distilled of the network with these weights."""
        if self.pretrained_sha256 != pretrained_sha256:
            raise ValueError(
                f"distilled is {self.name!r}, which was distilled of another network (sha256 "
                f"{self.pretrained_sha256[:12]}) than the pretrained one ({pretrained_sha256[:12]}): {MAKE} of this one"
            )


@dataclass(frozen=True)
class SaveArguments:
    """How distilled networks are saved."""

    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the files. The weights are rounded to it before they are measured, so the files hold what was measured.
    """

    @property
    def dtype(self) -> torch.dtype:
        """``save_dtype`` as torch's."""
        return getattr(torch, self.save_dtype)


def initial_paths(request: Any) -> tuple[dict[str, str], Distilled | None]:
    """The networks that a run starts from, by option, and the run of distillation that they are of.

    Parameters
    ----------
    request : object
        Options of a task, which ``with_distilled`` has settled.

    Raises
    ------
    ValueError
        If there is no such run of distillation.
    """
    if request.distilled is not None:
        distilled = Distilled.read(request.distilled)
        return distilled.networks, distilled
    paths = {name: getattr(request, name) for name in INITIAL}
    return {name: path for name, path in paths.items() if path is not None}, None


def with_distilled(args: UnlearnArguments) -> UnlearnArguments:
    """Settle what the options leave open: what earlier runs recorded (``Task.settled``), and from which distilled
    networks a run starts.

    Parameters
    ----------
    args : UnlearnArguments
        Options of a run. If ``distilled`` is "auto", or is not given and the method needs distilled networks, they are
        those that come with the preset, or that are beside the pretrained network.

    Returns
    -------
    UnlearnArguments
        With the name of a folder, which need not exist in these two cases, and its ``t_init``.

    Raises
    ------
    ValueError
        If the method takes no distilled networks, initial networks or another ``t_init`` are given as well, or there is
        no such folder.
    """
    method = method_class(args.method)
    args = task_class(args.preset, forgets=method.forgets).settled(args)
    request = args.request
    name = request.distilled
    others = [option for option in INITIAL if getattr(request, option) is not None]
    if name is None and (not method.needs_distilled or others or preset(args.preset).one_step):
        return args
    if not hasattr(args.options, "t_init") or not method.forgets:
        raise ValueError(f"distilled is {name!r}, but {args.method} starts from the pretrained network: expected none")
    if others:
        raise ValueError(f"distilled is {name!r}, and {others[0]} is given as well: expected one of the two")
    if name is None or name == AUTO:
        name = _usual_place(args)
        if not is_distilled(name):
            return with_options(args, {"distilled": name})
    t_init, own = Distilled.read(name).t_init, args.options.t_init
    usual = task_class(args.preset).defaults(args.preset, args.method).options.t_init
    if own not in (t_init, usual):
        raise ValueError(f"t_init is {own}, but {name} was distilled for {t_init}: leave t_init out")
    return with_options(args, {"distilled": name, "t_init": t_init})


def distil_arguments(preset_name: str, values: Mapping[str, Any] | None = None) -> UnlearnArguments:
    """The options of a distillation on a preset, with ``values`` (option to value) in place of the defaults. Raises as
    ``unlearn_arguments`` does."""
    return with_options(task_class(preset_name, forgets=False).defaults(preset_name, METHOD), values or {})


def distillation_for(args: UnlearnArguments) -> UnlearnArguments:
    """The options of the distillation that a run needs first: the preset's, on the same network and device."""
    base = distil_arguments(args.preset)
    own, names = ({item.name for item in dataclasses.fields(x.request)} for x in (args, base))
    options = {name: getattr(args.request, name) for name in (own & names) - {"distilled", *INITIAL}}
    options |= {"output_dir": args.request.distilled, "overwrite_output_dir": True}
    options |= {"progress_bar": args.output.progress_bar}
    if args.options.t_init is not None:
        options["t_init"] = args.options.t_init
    if hasattr(args.resources, "score_lora_rank"):
        # A distillation trains the whole score network; an adapter is for what starts from it.
        options["score_lora_rank"] = 0
    # The networks serve runs of every seed.
    compute = dataclasses.replace(args.compute, seed=0)
    return with_options(dataclasses.replace(base, compute=compute, resources=args.resources), options)


def is_distilled(name: str) -> bool:
    """Whether a distillation in the folder ``name`` has ended."""
    return (_folder_of(name) / "metrics.json").is_file()


def existing_distilled(args: UnlearnArguments, pretrained_sha256: str) -> str | None:
    """The distilled networks of a run's pretrained one, whose hash is given, that come with the preset or are beside
    it; None if none have been made."""
    name = _usual_place(args)
    return name if is_distilled(name) and Distilled.read(name).pretrained_sha256 == pretrained_sha256 else None


def last_score(folder: Path, fix: str = "start over") -> dict[str, Tensor]:
    """The weights of the score network in the last checkpoint of a run. ValueError, with the ``fix``, if there is no
    checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints", None, {})
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{folder} has no score network and no checkpoint: {fix}")
    path = checkpoints.path(steps[-1])
    checkpoints.verify(path)
    return load_state(path / STATE)["state"]["score"]


def rounded(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network in ``dtype``. ValueError if a weight is too large for it."""
    # diffusers' own ``to`` warns about modules that should stay in float32, even if there are none.
    network = nn.Module.to(copy.deepcopy(network), dtype)
    if not all(bool(param.isfinite().all()) for param in network.parameters()):
        raise ValueError(f"save_dtype is {dtype}, which cannot hold the largest weights: expected bfloat16 or float32")
    return network


def _folder_of(name: str) -> Path:
    if name.startswith(SHIPPED):
        return shipped_network(name.removeprefix(SHIPPED)).with_name(GENERATOR)
    return Path(name)


def _usual_place(args: UnlearnArguments) -> str:
    """Where distilled networks of the pretrained one are kept: in the package, beside it, or among the runs."""
    path, values = args.request.pretrained_model_name_or_path, preset(args.preset)
    if path is None and isinstance(values, ClassPreset) and values.network is not None:
        name = f"{SHIPPED}{values.network}"
        if is_distilled(name):
            return name
    if path is not None and Path(path).is_dir():
        folder = Path(path).parent if Path(path).name == "unet" else Path(path)
        if os.access(folder, os.W_OK):
            return str(folder / GENERATOR)
    return str(Path("runs") / f"{args.preset}-distil-seed0")
