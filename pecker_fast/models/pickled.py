"""Weights from pickled modules, without running any pickled code.

SiD-LSG's checkpoints are pickled ``nn.Module`` objects, which ``torch.load(weights_only=True)`` refuses. The unpickler
here builds only tensors and plain containers. Objects of other classes and results of functions become passive
stand-ins with their arguments and state. Modules are then traversed through their ``_parameters``, ``_buffers`` and
``_modules``.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..archives import check_archive, load_plain

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MAX_DEPTH = 200


class Stub:
    """Stand-in for an object: the name of its class, its arguments, items and state."""

    qualified = ""

    # Not __init__, because some pickle protocols do not call it.
    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        self = super().__new__(cls)
        self.args, self.kwargs, self.state, self.items = args, kwargs, {}, {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # Objects with slots have a pair: their dict and the slots.
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state |= part

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    def add(self, value: Any) -> None:
        self.append(value)


def _stub(module: str, name: str) -> type[Stub]:
    """A class of stand-ins for ``module.name``. Calling it, as a pickle's reduce does, only creates a stand-in."""
    return type(name.rpartition(".")[2] or "Stub", (Stub,), {"qualified": f"{module}.{name}"})


class _StorageType:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError("the storage of a tensor has another type")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor has invalid sizes")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _encode(text: Any, encoding: Any) -> bytes:
    # Old protocols write bytes as text.
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"a text has the unknown encoding {encoding!r}")
    return text.encode("latin1")


def _rebuild_from_type(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    if function not in (_rebuild_tensor, _rebuild_parameter):
        raise pickle.UnpicklingError("a tensor has an unknown type")
    return function(*args)


# Functions of this module that take the arguments of torch's.
_FUNCTIONS = {
    ("_codecs", "encode"): _encode,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    """Builds tensors, numbers, texts and containers. Everything else becomes a stand-in."""

    def __init__(self, file: Any, storages: Any) -> None:
        super().__init__(file, encoding="latin1")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            # A plain pickle contains tensors as archives.
            return _load_archive_bytes
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _stub(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise pickle.UnpicklingError(f"it refers to {str(pid)[:60]}, which is not the storage of a tensor")
        return self._storages(pid[1].dtype, str(pid[2]), int(pid[4]))


def _load_archive_bytes(data: Any) -> Any:
    # torch saves a storage in a plain pickle in its own format, which its safe reader reads.
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("the data of a storage are not bytes")
    storage = load_plain(io.BytesIO(data))
    if not isinstance(storage, (torch.UntypedStorage, torch.TypedStorage)):
        raise pickle.UnpicklingError("the data of a storage are not a storage")
    # An untyped storage has no dtype.
    untyped = storage if isinstance(storage, torch.UntypedStorage) else storage._untyped_storage
    return torch.empty(0, dtype=getattr(storage, "dtype", torch.uint8)).set_(untyped)


def _read_zip(path: Path) -> Any:
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(names) != 1:
            raise ValueError(f"it is an archive with {len(names)} files data.pkl, expected one")
        root, storages = names[0][: -len("data.pkl")], {}
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its byte order is not little-endian")

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in storages:
                data = archive.read(f"{root}data/{key}")
                storages[key] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
            content = storages[key]
            size = count * torch.empty(0, dtype=dtype).element_size()
            if content.numel() < size:
                raise pickle.UnpicklingError("a storage is shorter than its declared size")
            return content[:size].view(dtype)

        return _Unpickler(io.BytesIO(archive.read(names[0])), storage).load()


def _no_storage(*_: Any) -> Any:
    raise pickle.UnpicklingError("it refers to a storage outside the file")


def read_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle or a file of ``torch.save`` without running any code in it.

    Parameters
    ----------
    path : str or os.PathLike
        The file.

    Returns
    -------
    Any
        Tensors, plain values and containers, with stand-ins (``Stub``) for all other objects.

    Raises
    ------
    ValueError
        If there is no such file, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        with open(path, "rb") as file:
            return _Unpickler(file, _no_storage).load()
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        # For damaged pickles Python raises almost anything.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path} cannot be read as a pickle: {reason}") from error


def state_of(module: Any) -> dict[str, Tensor]:
    """Return parameters and buffers by name from a module's stand-in or a mapping of tensors. ValueError for others."""
    if isinstance(module, Mapping):
        return dict(_tensors(module.items()))
    if not isinstance(module, Stub) or "_modules" not in module.state:
        raise ValueError(f"a {type(module).__name__} is not a module")
    return dict(_walk(module, "", 0))


def _tensors(items: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in items:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{str(name)[:60]!r} is not a tensor")
        yield name, value


def _walk(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, Stub) or depth > MAX_DEPTH:
        raise ValueError(f"{prefix or 'it'} is not a module")
    unsaved = module.state.get("_non_persistent_buffers_set", ())
    # Before protocol 4, pickles contain sets as calls of set().
    unsaved = set(unsaved.args[0] if unsaved.args else ()) if isinstance(unsaved, Stub) else set(unsaved)
    for kind in ("_parameters", "_buffers"):
        for name, value in _dict(module.state.get(kind)).items():
            if value is not None and name not in unsaved:
                yield from _tensors([(f"{prefix}{name}", value)])
    for name, inner in _dict(module.state.get("_modules")).items():
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.", depth + 1)


def _dict(value: Any) -> Mapping:
    if isinstance(value, Stub):
        return value.items
    return value if isinstance(value, Mapping) else {}


def config_of(module: Any) -> dict[str, Any] | None:
    """Return the plain values of the configuration in a pickled diffusers model; None if there is none."""
    values = _dict(module.state.get("_internal_dict")) if isinstance(module, Stub) else {}
    config = {str(k): v for k, v in values.items() if not str(k).startswith("_") and _is_plain(v)}
    return config or None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
