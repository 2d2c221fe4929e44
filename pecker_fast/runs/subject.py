"""The run that is attacked, the networks that it is compared with, and the adversary's images."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import run_records
from ..checks import check_int
from ..data import LabelledImages
from ..diffusion import Parametrisation
from ..hashing import weights_hash
from ..models import resolve
from ..records import RecordError
from ..unlearning import ForgetRequest
from ..unlearning.relabel import relabelled
from ..unlearning.streams import derived_seed
from .distilled import Distilled, existing_distilled
from .folder import run_config
from .presets import class_preset
from .task import unlearn_arguments

# The method whose network never saw the class.
RETRAIN = "retrain"
RELABEL_MISSING = (
    "There is no relabelled generator to compare with: the run did not start from a distilled one, and none has been "
    "made for its timestep (--controls makes one, --relabel names one)."
)
CONTROL_MISSING = (
    "The control is missing: a network that never saw the class, distilled in the same way (--controls makes it, "
    "--control names it). Without it these figures do not tell what relearning is from what any network learns anew."
)
CONTROL_NOT_DISTILLED = (
    "The control is a retrained network that has not been distilled, so it does not draw in one step as the run does: "
    "its costs are not comparable (--controls distils it)."
)


@dataclass(frozen=True, eq=False)
class Subject:
    """A run that has ended.

    Parameters
    ----------
    folder, config
        Of the run.
    schedule, request
        Its noise schedule, and what it has forgotten.
    networks : dict
        "run", "pretrained", "scratch" (the architecture with fresh weights), "relabel" (the network that the run
        started from, relabelled) and "control" (one that never saw the class), if there are such.
    seed : int
        Of the attacks.
    notes : tuple of str
        What the networks to compare with lack, in words.
    control, relabel : str or None
        Where these two came from; None if there is none, or it was made in memory.
    """

    folder: Path
    config: dict[str, Any]
    schedule: Parametrisation
    request: ForgetRequest
    networks: dict[str, nn.Module]
    seed: int
    notes: tuple[str, ...] = ()
    control: str | None = None
    relabel: str | None = None

    @property
    def t_init(self) -> int | None:
        return self.config["options"].get("t_init")

    @classmethod
    def read(
        cls,
        folder: Path,
        control: str | None,
        seed: int | None,
        device: torch.device,
        relabel: str | None = None,
    ) -> "Subject":
        """Read a run; ``seed`` is the run's by default, ``relabel`` its starting network, relabelled.

        Raises
        ------
        ValueError
            If there is no such run, its pretrained network is gone or has changed, or a network to compare with is
            another one's counterpart.
        """
        config = read_config(folder)
        if not (folder / "unet").is_dir():
            raise ValueError(f"run is {str(folder)!r}, which has no unet: the run has not ended")
        seed = config["seed"] if seed is None else seed
        check_int("seed", seed, 0)
        model = resolve(folder / "unet", name="run")
        network, schedule = model.network, model.schedule
        teacher = resolve(
            config["pretrained_model_name_or_path"],
            shipped=class_preset(config["preset"]).network,
            state=config.get("checkpoint_state", "auto"),
        ).network
        if weights_hash(teacher) != config["pretrained_sha256"]:
            raise ValueError(f"run is {str(folder)!r}, whose pretrained network has changed since the run started")
        networks = {"run": network, "pretrained": teacher, "scratch": _fresh(network, seed)}
        request = ForgetRequest.of(network, config["forget_classes"], config["cover_class"])
        others = {"relabel": relabel, "control": control}
        for name, path in others.items():
            if path is not None:
                _check_request(name, path, config)
                networks[name] = resolve(path, name=name).network
        notes = []
        if relabel is None:
            start = _start(config, teacher)
            if start is None:
                notes.append(RELABEL_MISSING)
            else:
                networks["relabel"] = relabelled(start, request, config["seed"])
        if control is None:
            notes.append(CONTROL_MISSING)
        elif config["options"].get("t_init") is not None and run_config(Path(control)).get("method") == RETRAIN:
            notes.append(CONTROL_NOT_DISTILLED)
        for name in others:
            if name in networks and _shapes(networks[name]) != _shapes(network):
                raise ValueError(f"{name} is {others[name]!r}, a network of another architecture than the run's")
        for x in networks.values():
            x.to(device).eval().requires_grad_(False)
        return cls(folder, config, schedule.to(device), request, networks, seed, tuple(notes), control, relabel)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run of unlearning on classes. ValueError if the folder is not that of one."""
    try:
        config = run_records.read_config(folder)
    except RecordError as error:
        raise ValueError(f"run is {str(folder)!r}, expected the folder of a run of unlearning: {error}") from error
    if "options" not in config or "forget_classes" not in config:
        raise ValueError(f"run is {str(folder)!r}, whose config.json is not that of a run of unlearning")
    return config


def _check_request(name: str, path: str, config: dict[str, Any]) -> None:
    """Raise ValueError if ``path`` is the folder of a run that has forgotten other classes."""
    own = run_config(Path(path))
    classes = own.get("forget_classes")
    if classes is not None and list(classes) != list(config["forget_classes"]):
        raise ValueError(
            f"{name} is {path!r}, which has forgotten the classes {list(classes)}; expected those of the run, "
            f"{list(config['forget_classes'])}"
        )


def _start(config: dict[str, Any], teacher: nn.Module) -> nn.Module | None:
    """The network to relabel: what the run started from, if it draws as the run does, or else a generator that was
    distilled for the same timestep. None if there is none any more."""
    t_init, name = config["options"].get("t_init"), config.get("initial_generator")
    if t_init is None:
        return teacher
    try:
        distilled = config.get("distilled")
        if name is None and distilled is None:
            base = {"pretrained_model_name_or_path": config["pretrained_model_name_or_path"]}
            args = unlearn_arguments(config["preset"], "relabel", base)
            distilled = existing_distilled(args, config["pretrained_sha256"])
            if distilled is None or Distilled.read(distilled).t_init != t_init:
                return None
        if distilled is not None:
            name = Distilled.read(distilled).networks["initial_generator"]
        return resolve(name, name="initial_generator").network
    except ValueError:
        return None


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def _fresh(network: nn.Module, seed: int) -> nn.Module:
    """The same architecture with the weights that training starts from."""
    fresh = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "scratch"))
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return fresh


def adversary_images(
    real: LabelledImages, request: ForgetRequest, data: str, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """``count`` real images of each forgotten class, or as many of the retained ones, drawn at random."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "relearn images", data))
    groups = [(c,) for c in request.forget_classes] if data == "forgotten" else [request.retained_classes]
    count = count if data == "forgotten" else count * len(request.forget_classes)
    chosen = []
    for classes in groups:
        members = torch.isin(real.labels, torch.tensor(classes)).nonzero().flatten()
        if len(members) < count:
            raise ValueError(
                f"relearn_images is {count}, but there are {len(members)} images of the classes {list(classes)}"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    indices = torch.cat(chosen)
    return real.batch(indices), real.labels[indices]
