"""Counts the bytes of tensors that are alive at the same time, for real and for fake tensors."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(TorchDispatchMode):
    """Context that counts the storages of all tensors returned by operators, until they are freed.

    Inside a ``FakeTensorMode`` nothing is computed and no memory is used; the counts are those of the real calls.

    Attributes
    ----------
    current : int
        Bytes that are alive and were allocated inside the context.
    peak : int
        Maximum of ``current`` since the last ``reset``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}

    def reset(self) -> int:
        """Returns the peak and starts a new one at the current count."""
        peak, self.peak = self.peak, self.current
        return peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_) -> None:
            del self._alive[key]
            self.current -= self._sizes.pop(key)

        self._alive[key], self._sizes[key] = weakref.ref(storage, freed), size
        self.current += size
        self.peak = max(self.peak, self.current)

    def count_as(self, tensor: torch.Tensor, size: int) -> None:
        """Counts the storage of ``tensor``, allocated inside the context, as ``size`` bytes from now on."""
        key = tensor.untyped_storage()._cdata
        self.current += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.current)
