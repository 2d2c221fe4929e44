"""The weights of a network on disk, as they are: in their dtype, in one safetensors file or several, of one variant."""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import finish_pending, replace_together, replacing, save_tensors
from .folders import WEIGHTS, check_weights_file, network_folder

# diffusion_pytorch_model.safetensors, .fp16.safetensors, -00001-of-00002.safetensors, .fp16-00001-of-00002.safetensors,
# and -00001-of-00002.fp16.safetensors, which older versions of diffusers wrote.
_FILE = re.compile(rf"{WEIGHTS}(?:\.(\w+))?(?:-(\d{{5}})-of-(\d{{5}}))?(?:\.(\w+))?\.safetensors")

# Called with a tensor's name and all its entries as unsigned integers in row-major order, to change in place.
Edit = Callable[[str, NDArray], None]


@dataclass(frozen=True)
class WeightFiles:
    """The files that have the weights of one network.

    Parameters
    ----------
    files : tuple of Path
        safetensors files in one folder, which together have every tensor once.
    variant : str
        Such as "fp16"; "" for the plain one, or a file by itself.
    """

    files: tuple[Path, ...]
    variant: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.files[0].parent

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weights in their saved dtype, mapped into memory. ValueError if they cannot be read."""
        weights: dict[str, Tensor] = {}
        for file in self.files:
            check_weights_file(file)
            try:
                with safe_open(os.fspath(file), framework="pt") as content:
                    tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file.name} cannot be read: {error}") from error
            if twice := sorted(weights.keys() & tensors.keys()):
                raise ValueError(f"{file.name} has {twice[0]}, which is in another of the files too")
            weights |= tensors
        return weights

    def save(self, weights: Mapping[str, Tensor], target: Path) -> None:
        """Write other weights with these names into files of the same names and metadata, in the folder ``target``."""
        for file in self.files:
            with safe_open(os.fspath(file), framework="pt") as content:
                names, metadata = list(content.keys()), content.metadata()
            save_tensors(target / file.name, {name: weights[name].contiguous() for name in names}, metadata)

    def copy_changed(self, names: Sequence[str], edit: Edit, target: Path) -> None:
        """Copy the files to the folder ``target`` with some tensors changed.

        Names, order and metadata in the files stay as they are, byte for byte.

        Parameters
        ----------
        names : sequence of str
            The tensors to change.
        edit : callable
            Changes one.
        target : Path
            An existing folder.
        """
        for file in self.files:
            _copy_changed(file, target / file.name, names, edit)

    def change(self, names: Sequence[str], edit: Edit) -> None:
        """``copy_changed`` in place: all files are replaced, or none."""
        files = [file.name for file in self.files if any(name in _layout(file)[1] for name in names)]
        replace_together(self.folder, files, lambda name, path: _copy_changed(self.folder / name, path, names, edit))

    def save_changed(self, names: Sequence[str], edit: Edit, path: Path) -> None:
        """``copy_changed`` of a single file to ``path``."""
        (file,) = self.files
        with replacing(path) as temporary:
            _copy_changed(file, temporary, names, edit)


def find_weight_files(path: str | os.PathLike, variant: str | None = None, *, name: str = "model") -> list[WeightFiles]:
    """Find the weights of a network on disk.

    Parameters
    ----------
    path : path-like
        A safetensors file; or the folder of a U-Net, of a pipeline or of a run, whose U-Net is meant.
    variant : str, optional
        The variant wanted, such as "fp16"; "" for the plain one. Default: all that are there, the plain one first.
    name : str
        Name of the argument in error messages.

    Returns
    -------
    list of WeightFiles
        At least one.

    Raises
    ------
    ValueError
        If there are none, a shard is missing, or there is no such variant.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{name} is {str(path)!r}, expected a safetensors file or a folder")
        finish_pending(path.parent)
        return [WeightFiles((path,))]
    folder = network_folder(path)
    if folder.is_dir():
        finish_pending(folder)
    groups: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for file in sorted(folder.glob(f"{WEIGHTS}*.safetensors")):
        if match := _FILE.fullmatch(file.name):
            groups[match[1] or match[4] or "", match[3] or ""].append(file)
    if not groups or not (folder / "config.json").is_file():
        raise ValueError(f"{name} is {str(path)!r}: there is no network (config.json and {WEIGHTS}.safetensors)")
    if variant is not None:
        groups = {key: files for key, files in groups.items() if key[0] == variant}
        if not groups:
            raise ValueError(f"{name} is {str(path)!r}: it has no weights of the variant {variant!r}")
    for (_, shards), files in groups.items():
        if shards and len(files) != int(shards):
            raise ValueError(f"{name} is {str(path)!r}: it has {len(files)} of {int(shards)} files of weights")
    return [WeightFiles(tuple(files), key[0]) for key, files in sorted(groups.items())]


def other_weights(weights: WeightFiles) -> Iterator[Path]:
    """Files beside these that have weights of a network too: other variants, pickles."""
    for file in sorted(weights.folder.glob(f"{WEIGHTS}*")):
        if file not in weights.files and file.suffix in (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack", ".onnx"):
            yield file


def _layout(file: Path) -> tuple[int, dict[str, tuple[int, int, int]]]:
    """Where the data begin, and of each tensor its first byte, its last byte, and the bytes of an entry."""
    # It checks the header: places that are in order and within the file.
    with safe_open(os.fspath(file), framework="pt") as content:
        sizes = {name: content.get_tensor(name).element_size() for name in content.keys()}  # noqa: SIM118
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return 8 + length, {name: (*header[name]["data_offsets"], size) for name, size in sizes.items()}


def _copy_changed(file: Path, target: Path, names: Sequence[str], edit: Edit) -> None:
    shutil.copyfile(file, target)
    begin, places = _layout(target)
    for name in names:
        if name in places and places[name][1] > places[name][0]:
            first, last, size = places[name]
            content = np.memmap(target, np.uint8, "r+", begin + first, (last - first,))
            edit(name, content.view(f"<u{size}"))
            content.flush()
