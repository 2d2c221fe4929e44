"""Weights out of pickled modules, without running what is pickled.

SiD-LSG's checkpoints are pickled ``nn.Module`` objects, which ``torch.load(weights_only=True)`` refuses. Here a pickle
is read by an unpickler that builds tensors and plain containers and nothing else: an object of another class, and what
a function is said to return, becomes a passive stand-in that keeps arguments and state. Modules are then walked by
their ``_parameters``, ``_buffers`` and ``_modules``.
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

# Rebuilt by functions of ours, from the arguments that torch's take.
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
    """What stands in for an object of a class that is not built: its class's name, arguments, items and state."""

    qualified = ""

    # Not __init__, which some ways of pickling do not call.
    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        self = super().__new__(cls)
        self.args, self.kwargs, self.state, self.items = args, kwargs, {}, {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # Objects with slots give a pair: their dict, and the slots.
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
    """A class of stand-ins for ``module.name``: calling it, as a pickle's reduce does, builds one and runs nothing."""
    return type(name.rpartition(".")[2] or "Stub", (Stub,), {"qualified": f"{module}.{name}"})


class _StorageType:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError("a tensor's storage is none")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor's sizes are no sizes")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _encode(text: Any, encoding: Any) -> bytes:
    # How old protocols write bytes.
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"a text in {encoding!r}, which is not known")
    return text.encode("latin1")


def _rebuild_from_type(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    if function not in (_rebuild_tensor, _rebuild_parameter):
        raise pickle.UnpicklingError("a tensor of a type that is not known")
    return function(*args)


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
    """Builds tensors, numbers, texts and containers; all else becomes stand-ins."""

    def __init__(self, file: Any, storages: Any) -> None:
        super().__init__(file, encoding="latin1")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            # Tensors in a plain pickle are archives within it.
            return _load_archive_bytes
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _stub(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise pickle.UnpicklingError(f"a reference to {str(pid)[:60]}, which is no tensor's storage")
        return self._storages(pid[1].dtype, str(pid[2]), int(pid[4]))


def _load_archive_bytes(data: Any) -> Any:
    # As torch saves a storage within a plain pickle: read by torch's own safe reader.
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a storage's bytes are none")
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # A storage without a type has bytes.
    untyped = found if isinstance(found, torch.UntypedStorage) else found._untyped_storage
    return torch.empty(0, dtype=getattr(found, "dtype", torch.uint8)).set_(untyped)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged (its checksum differs)")
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(names) != 1:
            raise ValueError(f"it is an archive with {len(names)} files data.pkl, expected one")
        root, kept = names[0][: -len("data.pkl")], {}
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("it was written on a machine of another byte order")

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in kept:
                data = archive.read(f"{root}data/{key}")
                kept[key] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
            found = kept[key]
            size = count * torch.empty(0, dtype=dtype).element_size()
            if found.numel() < size:
                raise pickle.UnpicklingError("a storage is shorter than it says")
            return found[:size].view(dtype)

        return _Unpickler(io.BytesIO(archive.read(names[0])), storage).load()


def _no_storage(*_: Any) -> Any:
    raise pickle.UnpicklingError("a reference to a storage outside the file")


def read_pickle(path: str | os.PathLike) -> Any:
    """What is in a pickle or in a file of ``torch.save``: tensors, plain values, containers, and stand-ins (``Stub``)
    for all else. Nothing in it is run, whatever it says. ValueError where it is damaged or there is no such file."""
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
        # Damaged pickles make Python raise almost anything.
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path} cannot be read as a pickle: {said}") from error


def state_of(module: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name of a module's stand-in, or of a mapping of tensors. ValueError for others."""
    if isinstance(module, Mapping):
        return dict(_tensors(module.items()))
    if not isinstance(module, Stub) or "_modules" not in module.state:
        raise ValueError(f"a {type(module).__name__} is no module")
    return dict(_walk(module, "", 0))


def _tensors(items: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in items:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{str(name)[:60]!r} is no tensor")
        yield name, value


def _walk(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, Stub) or depth > MAX_DEPTH:
        raise ValueError(f"{prefix or 'it'} is no module")
    unsaved = module.state.get("_non_persistent_buffers_set", ())
    # Before protocol 4 a set is a call of set().
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
    """The configuration that a pickled diffusers model carries, plain values only; None where there is none."""
    found = _dict(module.state.get("_internal_dict")) if isinstance(module, Stub) else {}
    config = {str(k): v for k, v in found.items() if not str(k).startswith("_") and _is_plain(v)}
    return config or None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
