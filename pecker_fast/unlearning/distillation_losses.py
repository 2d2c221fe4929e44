"""The losses of score forgetting distillation and their gradients, on one micro-batch.

Notation and equations as in ``distillation``, which decides when they are computed, and with which numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import OneStepGenerator, prediction_loss, regression_loss, score_distillation_loss
from .gradients import add_gradients
from .guidance import Batch, Guidance
from .options import ScoreForgettingOptions
from .setting import Setting


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Within it, gradients of the network's input are computed and gradients of its weights are not."""
    params = trainable(network)
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that require gradients."""
    return [param for param in network.parameters() if param.requires_grad]


class DistillationLosses:
    """The losses of psi and theta as functions of a micro-batch.

    Parameters
    ----------
    setting : Setting
        Of the method.
    options : ScoreForgettingOptions
        Of the method.
    score, generator : nn.Module
        psi and theta, to which gradients are added.
    one_step : OneStepGenerator
        How theta draws.
    guidance : Guidance
        How psi and the teacher predict.
    redraws : bool
        Whether theta shares memory with psi or the teacher: then it computes its images once without a graph, for
        theirs, and again for its own backward pass.
    """

    def __init__(
        self,
        setting: Setting,
        options: ScoreForgettingOptions,
        score: nn.Module,
        generator: nn.Module,
        one_step: OneStepGenerator,
        guidance: Guidance,
        redraws: bool = False,
    ) -> None:
        self.setting, self.options = setting, options
        self.score, self.generator = score, generator
        self.one_step, self.guidance, self.redraws = one_step, guidance, redraws

    def score_gradient(
        self,
        z: Tensor,
        eps: Tensor,
        t: Tensor,
        labels: Tensor,
        teacher_labels: Tensor,
        *others: Any,
        forget_grads: None = None,
    ) -> tuple[dict[str, Tensor], None]:
        """Add a micro-batch's gradient to psi's; returns the losses, and no forget gradients.

        ``others`` is what guidance draws, if anything, and the number of retained samples.
        """
        *dropped, r = others
        o, compute, schedule = self.options, self.setting.compute, self.setting.problem.schedule
        losses, batch = {}, Batch.of(labels, teacher_labels, r)
        with compute.regions("sampling"), torch.no_grad(), compute.autocast():
            self.generator.eval()
            x0 = self.one_step(self.generator, z, labels)
        with compute.regions("score step"):
            x_t = schedule.add_noise(x0, eps, t)
            self.score.train()
            with compute.autocast():
                prediction = self.guidance.learning(self.score, x_t, t, batch, *dropped)
            target = schedule.target(x0, eps, t)
            total: Tensor | float = 0.0
            if r > 0:
                losses["loss_score_retain"] = prediction_loss(target[:r], prediction[:r])
                total = total + o.score_retain_weight * losses["loss_score_retain"]
            if r < len(labels):
                losses["loss_score_forget"] = prediction_loss(target[r:], prediction[r:])
                total = total + o.score_forget_weight * losses["loss_score_forget"]
            (total / o.gradient_accumulation_steps).backward()
        return {name: loss.detach() for name, loss in losses.items()}, None

    def generator_gradient(
        self,
        z: Tensor,
        eps: Tensor,
        t: Tensor,
        labels: Tensor,
        teacher_labels: Tensor,
        r: int,
        separate: bool,
        forget_grads: list[Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor] | None]:
        """Add a micro-batch's gradients to theta's and, with ``separate``, to ``forget_grads``; returns the losses and
        ``forget_grads``. The first ``r`` samples are retained ones."""
        o, compute, batch = self.options, self.setting.compute, Batch.of(labels, teacher_labels, r)
        # Two calls for two gradients of the weights: then each needs one backward pass over its own samples.
        pieces = [slice(r), slice(r, None)] if separate and r > 0 else [slice(None)]
        with compute.regions("generator forward"):
            if self.redraws:
                devices = [compute.device] if compute.device.type == "cuda" else []
                # Dropout draws the same numbers when theta computes again.
                with torch.no_grad(), torch.random.fork_rng(devices):
                    samples = self._samples(z, labels, pieces)
            else:
                samples = self._samples(z, labels, pieces)
        leaf = torch.cat([x.detach() for x in samples]).requires_grad_()
        # Frozen until the backward pass is over, which recomputes activations with gradient checkpointing.
        with compute.regions("teacher and score network"), _frozen(self.score):
            loss, losses = self._generator_loss(leaf, z, eps, t, batch)
            (grad,) = torch.autograd.grad(loss / o.gradient_accumulation_steps, leaf)
        with compute.regions("generator backward"):
            if self.redraws:
                samples = self._samples(z, labels, pieces)
            if separate:
                params = list(self.generator.parameters())
                forget_grads = add_gradients(samples.pop(), params, forget_grads, grad[pieces.pop()])
            for x, piece in zip(samples, pieces, strict=True):
                x.backward(grad[piece])
        return {name: value.detach() for name, value in losses.items()}, forget_grads

    def _samples(self, z: Tensor, labels: Tensor, pieces: list[slice]) -> list[Tensor]:
        """theta's images of each piece, in training."""
        with self.setting.compute.autocast():
            self.generator.train()
            return [self.one_step(self.generator, z[piece], labels[piece]) for piece in pieces]

    def _generator_loss(
        self, x: Tensor, z: Tensor, eps: Tensor, t: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_theta as a function of the images ``x`` of ``batch``, and its terms."""
        o, compute, schedule = self.options, self.setting.compute, self.setting.problem.schedule
        r, losses = batch.retained, {}
        cover = None
        if r < len(x) and o.regression_weight:
            # Before psi's graph exists, which keeps theta out of shared memory.
            self.generator.eval()
            with torch.no_grad(), compute.autocast():
                cover = self.one_step(self.generator, z[r:], batch.teacher_labels[r:])
            # Restore train mode: checkpointing may recompute x.
            self.generator.train()
        self.score.eval()
        x_t = schedule.add_noise(x, eps, t)
        with compute.autocast():
            x0_teacher = schedule.predict_x0(x_t, self.guidance.teacher(x_t, t, batch), t)
            x0_score = schedule.predict_x0(x_t, self.guidance.score(self.score, x_t, t, batch), t)
        total: Tensor | float = 0.0
        if r > 0:
            losses["loss_distill"] = score_distillation_loss(x[:r], x0_teacher[:r], x0_score[:r], o.alpha)
            total = total + o.generator_retain_weight * losses["loss_distill"]
        if r < len(x):
            losses["loss_forget"] = score_distillation_loss(x[r:], x0_teacher[r:], x0_score[r:], o.alpha)
            total = total + o.generator_forget_weight * losses["loss_forget"]
            if cover is not None:
                losses["loss_regression"] = regression_loss(x[r:], cover)
                total = total + o.regression_weight * losses["loss_regression"]
        return total, losses
