"""The wrapper that torch puts around ``step``."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """``Optimizer.profile_hook_step``, bypassed when it has nothing to do.

    It records each step for the profiler, running or not, which takes a fifth of a small step's time.
    """
    recorded = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.autograd._profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return recorded(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    # torch wraps functions without this attribute.
    wrapper.hooked = True  # type: ignore[attr-defined]
    return wrapper
