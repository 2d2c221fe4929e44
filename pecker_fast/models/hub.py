"""Models of the Hugging Face hub or its cache. Configurations are checked before weights are downloaded."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .folders import WEIGHTS, check_network_folder, network_folder
from .generators import SUFFIXES
from .loaded import read_stable_diffusion
from .stable_diffusion import StableDiffusion

# owner/model.
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_PLACES = ("", "unet/", "scheduler/", "unet/scheduler/")
_CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")
_WEIGHTS = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}-*.safetensors")
_TEXT_CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/*",
    "tokenizer_2/*",
)
_TEXT_WEIGHTS = (
    f"unet/{WEIGHTS}.safetensors",
    f"vae/{WEIGHTS}.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
)


def is_hub_name(path: str) -> bool:
    """Whether ``path`` has the form owner/model and is not the name of a checkpoint file."""
    return bool(_NAME.fullmatch(path)) and Path(path).suffix not in SUFFIXES


def fetch(name: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """Fetch the files of a model that match ``patterns``, from the hub or its cache.

    Parameters
    ----------
    name : str
        owner/model.
    patterns : iterable of str
        Glob patterns of files.
    revision : str, optional
        Commit; the newest one by default.

    Returns
    -------
    Path
        Folder of the snapshot, whose name is the commit.

    Raises
    ------
    ValueError
        If the hub and its cache have no such model.
    """
    import huggingface_hub
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    options: dict[str, Any] = {"revision": revision, "allow_patterns": list(patterns)}
    if offline and revision is not None:
        # Some clients (1.33) try to ask the hub for the files of a commit although its snapshot is in the cache.
        options["local_files_only"] = True
    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:
        # Versions of the client raise different exceptions for unknown names and without a network.
        mode = " (HF_HUB_OFFLINE is set)" if offline else ""
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"there is no such file or folder, and the hub gives no such model{mode}: {reason}") from error


def split_hub_file(path: str) -> tuple[str, str] | None:
    """Name of a model and of a file in it, of owner/model/file; None if ``path`` is none."""
    name, _, file = path.rpartition("/")
    return (name, file) if _NAME.fullmatch(name) and Path(file).suffix in SUFFIXES else None


def is_hub_file(path: str) -> bool:
    """Whether ``path`` is owner/model/file and no file here."""
    return split_hub_file(path) is not None and not Path(path).exists()


def fetch_unet(path: str) -> Path:
    """Fetch the U-Net of a text-to-image model: of owner/model its folder, of owner/model/file the file.

    ValueError if there is none.
    """
    parts = split_hub_file(path)
    if parts is not None:
        name, file = parts
        folder = fetch(name, [file])
        if not (folder / file).is_file():
            raise ValueError(f"the model {name} on the hub has no file {file}")
        return folder / file
    root = fetch(path, _TEXT_CONFIGS)
    if not (root / "unet" / "config.json").is_file():
        raise ValueError(f"the model {path} on the hub has no unet/config.json")
    return fetch(path, [f"unet/{file}" for file in _WEIGHTS], root.name) / "unet"


def fetch_configs(name: str) -> Path:
    """Fetch the configurations of a network, pipeline or Stable Diffusion. ValueError if there is no such model."""
    return fetch(name, [f"{place}{file}" for place in _PLACES for file in _CONFIGS])


def fetch_network(name: str) -> Path:
    """Fetch a class-conditional network and return its folder. ValueError if there is none."""
    root = fetch_configs(name)
    folder = network_folder(root)
    # Before downloading the weights, which may be many gigabytes.
    check_network_folder(folder)
    place = "" if folder == root else "unet/"
    # The commit of the configurations, in case the model changes in between.
    fetch(name, [f"{place}{file}" for file in _WEIGHTS], root.name)
    return folder


def fetch_stable_diffusion(name: str) -> StableDiffusion:
    """Fetch a Stable Diffusion 1.x, 2.x or XL. ValueError if there is none."""
    root = fetch(name, _TEXT_CONFIGS)
    # Checks the configurations before the weights are downloaded.
    read_stable_diffusion(root)
    return read_stable_diffusion(fetch(name, _TEXT_WEIGHTS, root.name))
