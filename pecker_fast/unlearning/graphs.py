"""CUDA graphs of the gradients of an iteration: forward and backward passes replayed without Python in between.

What is drawn at random enters as tensors, and dropout by its seed: a graph reads both anew at every replay. Optimizers,
the averages of several processes and the mask stay outside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..profiling import Regions

# Runs before the capture: libraries choose their algorithms, torch.compile compiles.
WARMUP = 3

# Computes with the static inputs and returns tensors in dicts, lists and tuples.
Work = Callable[[], Any]


def require_cuda(device: torch.device) -> None:
    """Raises ValueError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs is set, which needs a GPU: the device is {device}")


def capture(work: Work, pool: Any) -> tuple[Callable[[], None], Any]:
    """Captures ``work`` in memory of ``pool``: what replays it, and its results, which every replay overwrites."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARMUP):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog, may go on calling CUDA.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = work()
    return graph.replay, results


@dataclass
class _Held:
    """A captured call: the tensors it reads, what replays it, its results and the gradients it leaves."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    results: Any
    grads: list[Tensor | None]


class GradientCalls:
    """Calls functions that add to the ``.grad`` of a network: as they are, or captured once and replayed.

    Parameters
    ----------
    regions: profiler.
    graphs: whether to capture. Then the network's weights must stay where they are in memory.
    device: where to compute.
    copy: hand out copies of a graph's results, where several calls come before their results are used.

    Raises ValueError for graphs on another device than a GPU.
    """

    def __init__(self, regions: Regions, graphs: bool, device: torch.device, copy: bool) -> None:
        if graphs:
            require_cuda(device)
        self.regions, self.graphs, self.copy = regions, graphs, copy
        self._held: dict[tuple, _Held] = {}
        self._pool: Any = None
        if graphs and device.type == "cuda":
            # One for all: what a graph frees another one uses, and results are never freed.
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        name: str,
        function: Callable[..., tuple[dict[str, Tensor], list[Tensor | None] | None]],
        network: nn.Module,
        seed: int,
        tensors: Sequence[Tensor],
        *static: Any,
        earlier: list[Tensor | None] | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor | None] | None]:
        """``function(*tensors, *static, earlier=...)``, which adds to the gradients of ``network``: its losses, and a
        list of further gradients or None.

        Parameters
        ----------
        name: of the function, for the profiler.
        seed: of torch's default generators, which dropout draws from.
        tensors: what the function reads, beside weights.
        static: hashable; a graph is captured for each.
        earlier: further gradients of calls before, which those of this one are added to.
        """
        if not self.graphs:
            torch.manual_seed(seed)
            return function(*tensors, *static, earlier=earlier)
        params = list(network.parameters())
        key = (name, *static, *((t.shape, t.dtype) for t in tensors))
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = self._capture(function, params, tensors, static)
        with self.regions(f"{name} (graph)"):
            torch._foreach_copy_(held.inputs, list(tensors))
            torch.manual_seed(seed)
            held.replay()
            for param, grad in zip(params, held.grads, strict=True):
                if grad is None:
                    continue
                if param.grad is None:
                    param.grad = grad.clone() if self.copy else grad
                else:
                    param.grad.add_(grad)
        losses, further = held.results
        if further is None:
            return losses, earlier
        if earlier is None:
            return losses, [grad.clone() for grad in further] if self.copy else further
        torch._foreach_add_(earlier, further)
        return losses, earlier

    def _capture(self, function: Callable, params: list[Tensor], tensors: Sequence[Tensor], static: tuple) -> _Held:
        inputs = [t.clone() for t in tensors]

        def work() -> tuple[Any, list[Tensor | None]]:
            # Where there are no gradients yet, those made belong to the graph, and every replay writes them.
            before = [param.grad for param in params]
            _give(params, [None] * len(params))
            try:
                return function(*inputs, *static), [param.grad for param in params]
            finally:
                _give(params, before)

        replay, (results, grads) = capture(work, self._pool)
        return _Held(inputs, replay, results, grads)


def _give(params: list[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
