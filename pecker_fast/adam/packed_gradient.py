"""Gradients of which only the salient entries are stored."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..flat import row_major

aten = torch.ops.aten

# In-place operations on single entries that torch does not tag as such.
_ENTRYWISE = {"copy_", "zero_", "fill_", "_amp_foreach_non_finite_check_and_unscale_"}


class PackedGradient(Tensor):
    """A gradient that is zero outside a mask. Only the salient entries take memory.

    It has the shape, dtype and device of its parameter. In-place operations that treat each entry by itself (scaling,
    adding, clamping, zeroing), vector norms and ``clone`` work on the stored entries, so that accumulation,
    ``torch.nn.utils.clip_grad_norm_``, GradScaler and ``zero_grad`` work as they do on dense gradients; entries outside
    the mask stay zero. Every other operation gets a dense copy and returns a dense result; views are such copies too.

    Parameters
    ----------
    param : Tensor
        The parameter, or anything of its shape, strides, dtype and device.
    entries : Tensor
        [count]: the values of the salient entries, in row-major order. Shared.
    words : Tensor
        int32: the mask of the parameter, see ``SaliencyMask.tensor_words``.

    Notes
    -----
    ``to_dense()`` gives a dense copy.
    """

    entries: Tensor
    words: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, param: Tensor, entries: Tensor, words: Tensor) -> "PackedGradient":
        return Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )

    def __init__(self, param: Tensor, entries: Tensor, words: Tensor) -> None:
        self.entries, self.words = entries, words

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedGradient({self.entries.numel()} of {self.numel()} entries, shape {tuple(self.shape)})"

    def to_dense(self) -> Tensor:  # type: ignore[override]
        """A dense copy, row-major."""
        return ops.unpack(self.entries, self.words, self.numel()).view(self.shape)

    def pack(self, values: Tensor) -> Tensor:
        """The salient entries of ``values``, which can be expanded to the gradient's shape."""
        if isinstance(values, PackedGradient):
            if values.words is self.words or torch.equal(values.words, self.words):
                return values.entries
            values = values.to_dense()
        return ops.pack(row_major(values.expand(self.shape)), self.words, self.entries.numel())

    def with_entries(self, entries: Tensor) -> "PackedGradient":
        """A gradient of the same parameter and mask."""
        return PackedGradient(self, entries, self.words)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        same_shape = func is aten.view.default and tuple(args[1]) == tuple(args[0].shape)
        if same_shape or func in (aten.detach.default, aten.alias.default):
            return args[0].with_entries(args[0].entries)
        if func is aten.clone.default:
            return args[0].with_entries(args[0].entries.clone())
        if func is aten.linalg_vector_norm.default and _is_whole_norm(*args[1:]):
            return func(_with_an_entry(args[0]), *args[1:], **kwargs)
        if func is aten._foreach_norm.Scalar and _is_whole_norm(*args[1:2]):
            return func([_with_an_entry(grad) for grad in args[0]], *args[1:], **kwargs)
        written = _written(func, args, kwargs)
        if not any(isinstance(value, PackedGradient) for value in written):
            return func(*map(_dense, args), **{key: _dense(value) for key, value in kwargs.items()})
        name = func.overloadpacket.__name__
        if not name.endswith("_") or not (
            torch.Tag.pointwise in func.tags or name.startswith("_foreach_") or name in _ENTRYWISE
        ):
            raise NotImplementedError(
                f"{func} cannot write to a packed gradient: work on grad.to_dense(), or remove the packing "
                "(handle.remove())"
            )
        target = args[0]
        func(*(_packed(target, value) for value in args), **{k: _packed(target, v) for k, v in kwargs.items()})
        return target if func._schema.returns else None


def _is_whole_norm(order: float = 2, dims: Any = None, keepdim: bool = False, *_: Any) -> bool:
    """Whether a norm is over all entries and not changed by zeros."""
    return order > 0 and not dims and not keepdim


def _with_an_entry(grad: Tensor) -> Tensor:
    """The stored entries, or a single zero if there are none: the maximum of no entries is undefined."""
    if not isinstance(grad, PackedGradient):
        return grad
    return grad.entries if grad.entries.numel() else grad.entries.new_zeros(1)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that an operation writes to."""
    tensors: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            tensors += value if isinstance(value, (list, tuple)) else [value]
    return tensors


def _dense(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_dense(item) for item in value]
    return value.to_dense() if isinstance(value, PackedGradient) else value


def _packed(target: Any, value: Any) -> Any:
    """``value`` in the form for an operation on the entries of ``target``; both may be lists of equal length."""
    if isinstance(target, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(target):
            return value
        return [_packed(one, item) for one, item in zip(target, value, strict=True)]
    if not isinstance(target, PackedGradient):
        return _dense(value)
    if not isinstance(value, Tensor) or (value.dim() == 0 and not isinstance(value, PackedGradient)):
        return value
    return target.pack(value)
