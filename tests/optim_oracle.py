"""MaskedAdam over many steps as it should be: the float64 oracle with per-entry step counts, EMA and packing."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tests import oracle
from tests.oracle import AdamOptions, AdamState


def flat(tensor: Tensor | None) -> np.ndarray | None:
    """Row-major, as numpy."""
    return None if tensor is None else oracle.to_numpy(tensor.detach().contiguous()).reshape(-1).astype(np.float64)


class OracleOptimizer:
    """Keeps a step count for every entry from the start, and updates the EMA of every entry at every step."""

    def __init__(
        self, params: Sequence[Tensor], options: AdamOptions, *, amsgrad: bool = False, packed: bool = False
    ) -> None:
        self.options, self.packed = options, packed
        self.states = []
        for param in params:
            zeros = np.zeros(param.numel())
            self.states.append(
                AdamState(
                    flat(param).copy(),
                    zeros,
                    np.zeros(param.numel(), int),
                    zeros if options.beta1 else None,
                    zeros if amsgrad else None,
                )
            )
        self.emas = [state.x.copy() for state in self.states]

    def step(self, grads, mask=None, masked_grads=None) -> None:
        """``mask``: a SaliencyMask in the order of the parameters."""
        joint = masked_grads is not None
        executed = any(grad is not None for grad in [*grads, *(masked_grads or [])])
        for i, state in enumerate(self.states):
            grad, forget = flat(grads[i]), flat(masked_grads[i]) if joint else None
            bits = None if mask is None else mask[i].reshape(-1).cpu().numpy()
            if grad is not None or forget is not None:
                if self.packed:
                    self.forget_entries_that_leave(state, bits)
                self.states[i] = oracle.adam_step(state, grad, forget, bits, joint, self.options)
            if executed and self.options.ema_decay is not None:
                self.emas[i] = oracle.ema_step(self.emas[i], self.states[i].x, self.options.ema_decay)
                if self.packed:
                    # The average of an entry outside the mask is the parameter.
                    self.emas[i] = np.where(bits, self.emas[i], self.states[i].x)

    @staticmethod
    def forget_entries_that_leave(state: AdamState, bits: np.ndarray) -> None:
        state.step = np.where(bits, state.step, 0)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if getattr(state, name) is not None:
                setattr(state, name, np.where(bits, getattr(state, name), 0.0))

    def check(self, params: Sequence[Tensor], emas: Sequence[Tensor] | None = None, tolerance: float = 1e-11) -> None:
        for i, (param, state) in enumerate(zip(params, self.states, strict=True)):
            assert np.allclose(flat(param), state.x, rtol=tolerance, atol=tolerance), f"parameter {i}"
        for i, ema in enumerate(emas or []):
            assert np.allclose(flat(ema), self.emas[i], rtol=tolerance, atol=tolerance), f"EMA {i}"


SHAPES = [(3, 4, 5, 6), (33,), (), (0, 2), (40, 17)]


def make_params(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    """Contiguous, channels_last, transposed, 0-dim and empty ones."""
    params = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
    params[0] = params[0].to(memory_format=torch.channels_last)
    params.append(torch.randn(7, 9, dtype=torch.float64).to(dtype).t())
    return [torch.nn.Parameter(p) for p in params]


def make_grads(params: Sequence[Tensor], missing: float = 0.0) -> list[Tensor | None]:
    """Random, in the parameters' memory order or row-major, some None."""
    grads = []
    for param in params:
        grad = torch.randn_like(param)
        grad = grad.contiguous() if np.random.rand() < 0.3 else grad
        grads.append(None if np.random.rand() < missing else grad)
    return grads


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
