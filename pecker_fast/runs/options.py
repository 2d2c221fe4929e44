"""Arguments that subcommands share, and what they are resolved to."""

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated

import tyro
from torch import nn

from ..diffusion import NoiseSchedule
from ..models import check_network_folder, load_ancestor, load_network

# Types of arguments. A run or a model is given by its place, or by --pretrained-model-name-or-path; see run_or_model.
RunOrModel = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_MODEL")]
_PRESET = tyro.conf.arg(name="preset", aliases=("--preset-name",))
PresetName = Annotated[str, _PRESET]
OptionalPresetName = Annotated[str | None, _PRESET]

# owner/model, as the Hugging Face hub names things.
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")
HUB_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-*.safetensors",
)
# No names on the hub, although they look like it.
CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def shipped_network(name: str) -> Path:
    """Folder of a pretrained network that comes with the package. ValueError where it is not installed."""
    folder = Path(str(resources.files("pecker_fast").joinpath("assets", name, "unet")))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not installed: pecker-fast pretrain --preset {name} makes this network")
    return folder


def network_folder(path: str | Path) -> Path:
    """The folder of a network: ``path`` itself, or its ``unet`` where ``path`` is the folder of a run."""
    path = Path(path)
    return path / "unet" if not (path / "config.json").is_file() or (path / "unet").is_dir() else path


def fetch_from_hub(name: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """The folder of a snapshot of the Hugging Face hub with the files of these patterns, fetched or from its cache.

    ValueError where it cannot be had.
    """
    import huggingface_hub
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    options = {"revision": revision, "allow_patterns": list(patterns)}
    if offline and revision is not None:
        # Some clients (1.33) ask the hub for the files of a commit, and fail, although its snapshot is in the cache.
        options["local_files_only"] = True
    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:
        # What is raised for a name that is not there, or without a network, changes with the client's version.
        why = " (HF_HUB_OFFLINE is set)" if offline else ""
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"there is no such file or folder, and the hub gives no such model{why}: {said}") from error


def _from_hub(name: str) -> Path:
    """The folder of a network of the Hugging Face hub. ValueError where it cannot be had."""
    places = ("", "unet/", "scheduler/", "unet/scheduler/")
    root = fetch_from_hub(name, [f"{place}{file}" for place in places for file in HUB_CONFIGS])
    folder = network_folder(root)
    # Before the weights are fetched, which may be many gigabytes.
    check_network_folder(folder)
    place = "" if folder == root else "unet/"
    # A snapshot's folder is named by its commit: nothing is mixed where the model changes meanwhile.
    fetch_from_hub(name, [f"{place}{file}" for file in HUB_WEIGHTS], root.name)
    return folder


def load_pretrained(path: str | None, shipped: str | None, state: str = "auto") -> tuple[nn.Module, NoiseSchedule, str]:
    """Network, schedule, and where they came from. ValueError where there is none.

    ``path``: the folder of a network, of a pipeline or of a run; a checkpoint file of the public DDPM code, of which
    ``state`` is taken; a name on the hub. None: the network ``shipped``.
    """
    if state != "auto" and (path is None or not Path(path).is_file()):
        raise ValueError(
            f"checkpoint_state is {state!r}, but only the checkpoint file of an earlier code has several: expected auto"
        )
    if path is None:
        if shipped is None:
            raise ValueError(
                "pretrained_model_name_or_path is not given, and no network of this preset comes with the package"
            )
        return *load_network(shipped_network(shipped)), f"shipped:{shipped}"
    try:
        if Path(path).is_file():
            return *load_ancestor(path, state), str(path)
        if Path(path).exists():
            return *load_network(network_folder(path)), str(path)
        if HUB_NAME.fullmatch(path) and Path(path).suffix not in CHECKPOINTS:
            return *load_network(_from_hub(path)), f"hub:{path}"
        raise ValueError("there is no such file or folder")
    except ValueError as error:
        raise ValueError(f"pretrained_model_name_or_path is {str(path)!r}: {error}") from error
