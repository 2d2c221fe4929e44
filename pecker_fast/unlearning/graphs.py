"""CUDA graphs of an iteration's gradients: forward and backward passes replayed without Python in between.

Random numbers enter as tensors and dropout by its seed: a graph reads both anew at every replay. Optimizers, averaging
over processes and the mask stay outside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..profiling import Regions

# Runs before the capture: libraries choose their algorithms, torch.compile compiles.
WARMUP = 3

# Computes with static inputs and returns tensors in dicts, lists and tuples.
Work: TypeAlias = Callable[[], Any]

# Losses by name, and a second gradient of each parameter or None.
Gradients: TypeAlias = tuple[dict[str, Tensor], list[Tensor] | None]


def require_cuda(device: torch.device) -> None:
    """ValueError for a device without CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs is set, which needs a GPU: the device is {device}")


def capture(work: Work, pool: Any) -> tuple[Callable[[], None], Any]:
    """Capture ``work`` in memory of ``pool``.

    Returns
    -------
    replay : callable
        Runs the graph.
    results : object
        What ``work`` returned; every replay overwrites it.
    """
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(WARMUP):
            work()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog, may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = work()
    return graph.replay, results


@dataclass
class _Captured:
    """A captured call: the tensors it reads, its replay, its results and the gradients it leaves."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    results: Any
    grads: list[Tensor | None]


class GradientCalls:
    """Calls functions that add to the ``.grad`` of a network: directly, or captured once and replayed.

    Parameters
    ----------
    regions : Regions
        Profiler.
    graphs : bool
        Whether to capture. The network's weights must then stay where they are in memory.
    device : torch.device
        Where to compute.
    copy : bool
        Whether to return copies of a graph's results: needed if several calls come before their results are used.

    Raises
    ------
    ValueError
        If graphs are to be captured on a device that is not a GPU.
    """

    def __init__(self, regions: Regions, graphs: bool, device: torch.device, copy: bool) -> None:
        if graphs:
            require_cuda(device)
        self.regions, self.graphs, self.copy = regions, graphs, copy
        self._captured: dict[tuple, _Captured] = {}
        self._pool: Any = None
        if graphs and device.type == "cuda":
            # One pool: graphs reuse each other's freed memory, and results are never freed.
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        name: str,
        function: Callable[..., Gradients],
        network: nn.Module,
        seed: int,
        tensors: Sequence[Tensor],
        *static: Any,
        forget_grads: list[Tensor] | None = None,
    ) -> Gradients:
        """Call ``function(*tensors, *static, forget_grads=...)``, which adds to the gradients of ``network``.

        Parameters
        ----------
        name : str
            The function's name for the profiler.
        function : callable
            Returns its losses, and ``forget_grads`` with its own forget gradients added if it has any.
        network : nn.Module
            The network whose ``.grad`` the function adds to.
        seed : int
            Seed of torch's default generators, which dropout draws from.
        tensors : sequence of Tensor
            What the function reads beside weights.
        *static : hashable
            Further arguments; a graph is captured for each combination.
        forget_grads : list of Tensor, optional
            Forget gradients of earlier calls, to be added to.

        Returns
        -------
        losses : dict of str to Tensor
            The function's losses.
        forget_grads : list of Tensor or None
            The sum of the forget gradients so far.
        """
        if not self.graphs:
            torch.manual_seed(seed)
            return function(*tensors, *static, forget_grads=forget_grads)
        params = list(network.parameters())
        key = (name, *static, *((t.shape, t.dtype) for t in tensors))
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(function, params, tensors, static)
        with self.regions(f"{name} (graph)"):
            torch._foreach_copy_(captured.inputs, list(tensors))
            torch.manual_seed(seed)
            captured.replay()
            for param, grad in zip(params, captured.grads, strict=True):
                if grad is None:
                    continue
                if param.grad is None:
                    param.grad = grad.clone() if self.copy else grad
                else:
                    param.grad.add_(grad)
        losses, own_grads = captured.results
        if own_grads is None:
            return losses, forget_grads
        if forget_grads is None:
            return losses, [grad.clone() for grad in own_grads] if self.copy else own_grads
        torch._foreach_add_(forget_grads, own_grads)
        return losses, forget_grads

    def _capture(
        self, function: Callable[..., Gradients], params: list[Tensor], tensors: Sequence[Tensor], static: tuple
    ) -> _Captured:
        inputs = [t.clone() for t in tensors]

        def work() -> tuple[Gradients, list[Tensor | None]]:
            # Without gradients to add to, the function makes new ones: they belong to the graph, and every replay
            # writes them.
            grads = [param.grad for param in params]
            _set_grads(params, [None] * len(params))
            try:
                return function(*inputs, *static), [param.grad for param in params]
            finally:
                _set_grads(params, grads)

        replay, (results, grads) = capture(work, self._pool)
        return _Captured(inputs, replay, results, grads)


def _set_grads(params: list[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
