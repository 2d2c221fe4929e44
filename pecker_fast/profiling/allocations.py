"""Bytes of tensors that live at the same time, counted as they are made: of real tensors and of fake ones."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(TorchDispatchMode):
    """Within it, storages of the tensors that operators return are counted until they are freed.

    Under a ``FakeTensorMode`` that is entered before, nothing is computed and no memory is taken: the counts are those
    that the same calls would come to.

    Attributes
    ----------
    current: bytes alive that were made within.
    peak: the most at a time since the last ``reset``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}

    def reset(self) -> int:
        """Returns the peak and begins a new one at what is alive."""
        found, self.peak = self.peak, self.current
        return found

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
        """From here on the storage of ``tensor``, which was made within, counts as ``size`` bytes."""
        key = tensor.untyped_storage()._cdata
        self.current += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.current)
