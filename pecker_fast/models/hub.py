"""Models of the Hugging Face hub, fetched or from its cache: first what kind of model it is, then its weights."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .folders import WEIGHTS, check_network_folder, network_folder
from .stable_diffusion import StableDiffusion

# owner/model.
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Files that look like names on the hub.
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")

_PLACES = ("", "unet/", "scheduler/", "unet/scheduler/")
_CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")
_WEIGHTS = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}-*.safetensors")
_TEXT_CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/*",
)
_TEXT_WEIGHTS = (
    f"unet/{WEIGHTS}.safetensors",
    f"vae/{WEIGHTS}.safetensors",
    "text_encoder/model.safetensors",
)


def is_hub_name(path: str) -> bool:
    """Whether ``path`` has the form owner/model and is not the name of a checkpoint file."""
    return bool(_NAME.fullmatch(path)) and Path(path).suffix not in _CHECKPOINTS


def fetch(name: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """Fetch the files of a model that match ``patterns``, or find them in the hub's cache.

    Returns
    -------
    Path
        Folder of the snapshot, named by its commit.

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
        # Some clients (1.33) ask the hub for the files of a commit, and fail, although its snapshot is in the cache.
        options["local_files_only"] = True
    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:
        # The exception for an unknown name, or without a network, differs between versions of the client.
        why = " (HF_HUB_OFFLINE is set)" if offline else ""
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"there is no such file or folder, and the hub gives no such model{why}: {reason}") from error


def fetch_configs(name: str) -> Path:
    """The folder of a network, pipeline or Stable Diffusion with its configurations alone. ValueError if there is no
    such model."""
    return fetch(name, [f"{place}{file}" for place in _PLACES for file in _CONFIGS])


def fetch_network(name: str) -> Path:
    """The folder of a class-conditional network. ValueError if there is none."""
    root = fetch_configs(name)
    folder = network_folder(root)
    # Before the weights are fetched, which may be many gigabytes.
    check_network_folder(folder)
    place = "" if folder == root else "unet/"
    # A snapshot's folder is named by its commit: nothing is mixed if the model changes meanwhile.
    fetch(name, [f"{place}{file}" for file in _WEIGHTS], root.name)
    return folder


def fetch_stable_diffusion(name: str) -> StableDiffusion:
    """A Stable Diffusion. ValueError if there is none."""
    root = fetch(name, _TEXT_CONFIGS)
    # As above: the weights are some gigabytes.
    StableDiffusion(root)
    return StableDiffusion(fetch(name, _TEXT_WEIGHTS, root.name))
