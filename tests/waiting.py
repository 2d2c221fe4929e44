"""A stand-in for a GPU that reports every wait."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pecker_fast.ops import dispatch

aten = torch.ops.aten

# Their results, or the sizes of them, come back to the host.
WAITING = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
COPIES = {aten._to_copy, aten.copy_}


class NoWaiting(TorchDispatchMode):
    """Raises AssertionError at an operation that waits for a GPU: these cannot be captured in a CUDA graph either."""

    entered = 0

    def __enter__(self):
        NoWaiting.entered += 1
        return super().__enter__()

    def __exit__(self, *error):
        NoWaiting.entered -= 1
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        packet = func.overloadpacket
        if on_gpu and packet in WAITING:
            raise AssertionError(f"{func} waits for the device")
        if on_gpu and packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            raise AssertionError(f"{func} without output_size waits for the device")
        if on_gpu and packet in (aten.index, aten.index_put_) and any(t.dtype == torch.bool for t in tensors[1:]):
            raise AssertionError(f"{func} by a mask waits for the device")
        result = func(*args, **kwargs)
        if packet in COPIES:
            target, source = (args[0], args[1]) if packet is aten.copy_ else (result, args[0])
            if target.device.type != source.device.type:
                waits = not (kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2]))
                assert not waits, f"{func} from {source.device} to {target.device} waits for the device"
        return result


@contextmanager
def no_gpu_to_wait_for(monkeypatch):
    """Within this context ``device="cuda"`` makes tensors without memory, on which the CUDA back end's operators run by
    their fakes. What waits for the device raises once ``NoWaiting()`` is entered."""
    original = dispatch.why_not
    monkeypatch.setattr(
        dispatch, "why_not", lambda backend, *rest: None if backend == "cuda" else original(backend, *rest)
    )
    # Tensors without memory have no values to compare. First steps may look whether two masks are the same.
    compare = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compare(a, b) if NoWaiting.entered else a.shape == b.shape)
    with FakeTensorMode():
        yield
