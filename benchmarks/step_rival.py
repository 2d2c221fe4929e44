"""The rival of ``train_step``: an iteration as the papers describe it.

Plain PyTorch: float32, NCHW, separate calls for retained and forgotten samples, gradients summed in ``.grad``,
``clip_grad_value_``, ``torch.optim.Adam``, an average in a Python loop, the mask as a product. It has the weights and
random numbers of the package's trainer, so that losses can be compared; dropout draws others.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.unlearning.streams import Streams

from .selections import torch_kthvalue
from .step_problem import METHODS, SEED, Problem


class Rival:
    """Iterations of SFD, or of PECKER by multiplying with a mask of ones and zeros.

    Parameters
    ----------
    problem : Problem
        Networks and batch.
    name : str
        Of METHODS.
    **changes
        Changes to the options of the method.
    """

    def __init__(self, problem: Problem, name: str, **changes: Any) -> None:
        self.problem, self.options = problem, problem.options(name, **changes)
        self.masked = METHODS[name][0] == "pecker"
        self.phi = problem.teacher
        self.psi = copy.deepcopy(problem.teacher).requires_grad_(True)
        self.theta = copy.deepcopy(problem.teacher).requires_grad_(True)
        o = self.options
        adam = {"betas": (o.adam_beta1, o.adam_beta2), "eps": o.adam_epsilon}
        self.psi_optimizer = torch.optim.Adam(self.psi.parameters(), lr=o.score_learning_rate, **adam)
        self.theta_optimizer = torch.optim.Adam(self.theta.parameters(), lr=o.generator_learning_rate, **adam)
        self.average = {name: p.detach().clone() for name, p in self.theta.named_parameters()}
        alphas = problem.schedule.alphas_cumprod
        self.a, self.b = alphas.sqrt(), (1 - alphas).sqrt()
        self.number = 0
        config = problem.teacher.config
        self.shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        self.mask: list[Tensor] | None = None
        if self.masked:
            self.pool = self._pool()

    # ---- equations

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.a[t].view(-1, 1, 1, 1), self.b[t].view(-1, 1, 1, 1)

    def _x0(self, network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        a, b = self._level(t)
        return (x_t - b * network(x_t, t, class_labels=labels).sample) / a

    def _noised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        a, b = self._level(t)
        return a * x + b * eps

    def _generate(self, z: Tensor, labels: Tensor) -> Tensor:
        t = torch.full((len(z),), self.options.t_init, device=z.device)
        return self._x0(self.theta, self._level(t)[1] * z, t, labels)

    def _distance(self, x: Tensor, eps: Tensor, t: Tensor, labels: Tensor, teacher_labels: Tensor) -> Tensor:
        x_t = self._noised(x, eps, t)
        real, fake = self._x0(self.phi, x_t, t, teacher_labels), self._x0(self.psi, x_t, t, labels)
        with torch.no_grad():
            weight = (real - x).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)
        loss = (real - fake) * ((real - x) - self.options.alpha * (real - fake)) / weight
        return loss.sum(dim=(1, 2, 3)).mean()

    # ---- an iteration

    def __call__(self) -> dict[str, Tensor]:
        """Run the next iteration; returns its losses."""
        o, device, losses = self.options, self.problem.device, {}
        streams = Streams(device, SEED, "forget", self.number, 0)
        labels = torch.tensor(self.problem.request.retained_classes, device=device)
        n, m = o.train_batch_size, o.forget_samples
        retained = streams.choose("retain labels", n, labels)
        parts = {
            "retain": (slice(n), retained, retained, o.score_retain_weight, o.generator_retain_weight),
            "forget": (
                slice(n, None),
                torch.zeros(m, dtype=torch.int64, device=device),
                torch.ones(m, dtype=torch.int64, device=device),
                o.score_forget_weight,
                o.generator_forget_weight,
            ),
        }

        def noise_of(purpose: str) -> tuple[Tensor, Tensor, Tensor]:
            z, eps = (streams.normal(f"{purpose} {name}", n + m, self.shape) for name in ("z", "eps"))
            return z, eps, streams.timesteps(f"{purpose} t", n + m, o.t_min, o.t_max)

        self.psi.train().requires_grad_(True)
        self.theta.eval()
        self.psi_optimizer.zero_grad()
        noise = noise_of("score")
        for part, (rows, own, _, weight, _) in parts.items():
            z, eps, t = (tensor[rows] for tensor in noise)
            with torch.no_grad():
                x = self._generate(z, own)
            predicted = self.psi(self._noised(x, eps, t), t, class_labels=own).sample
            loss = (eps - predicted).square().sum(dim=(1, 2, 3)).mean()
            (weight * loss).backward()
            losses[f"loss_score_{part}"] = loss.detach()
        self._step(self.psi, self.psi_optimizer)

        if self.masked:
            self._refresh()
        self.psi.eval().requires_grad_(False)
        self.theta.train()
        self.theta_optimizer.zero_grad()
        noise, forget_grads = noise_of("generator"), None
        for part in ("forget", "retain"):
            rows, own, covers, _, weight = parts[part]
            z, eps, t = (tensor[rows] for tensor in noise)
            loss = self._distance(self._generate(z, own), eps, t, own, covers)
            (weight * loss).backward()
            losses["loss_distill" if part == "retain" else "loss_forget"] = loss.detach()
            if part == "forget" and self.masked:
                forget_grads = [p.grad * ones for p, ones in zip(self.theta.parameters(), self.mask, strict=True)]
                self.theta_optimizer.zero_grad()
        if forget_grads is not None:
            for param, grad in zip(self.theta.parameters(), forget_grads, strict=True):
                param.grad.add_(grad)
        self._step(self.theta, self.theta_optimizer)
        with torch.no_grad():
            for name, param in self.theta.named_parameters():
                self.average[name].mul_(o.ema_decay).add_(param, alpha=1 - o.ema_decay)
        self.number += 1
        return losses

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_value_(network.parameters(), self.options.max_grad_value)
        optimizer.step()

    # ---- the mask

    @torch.no_grad()
    def _pool(self) -> tuple[Tensor, Tensor]:
        streams = Streams(self.problem.device, SEED, "saliency pool")
        count = self.options.saliency_batch_size
        labels = torch.zeros(count, dtype=torch.int64, device=self.problem.device)
        self.theta.eval()
        return self._generate(streams.normal("z", count, self.shape), labels), labels

    def _refresh(self) -> None:
        every = self.options.mask_refresh_steps
        if self.mask is not None and not (every and self.number % every == 0):
            return
        streams = Streams(self.problem.device, SEED, "saliency", self.number)
        images, labels = self.pool
        eps = streams.normal("eps", len(images), self.shape)
        t = streams.timesteps("t", len(images), 0, len(self.a) - 1)
        self.theta.eval()
        self.theta_optimizer.zero_grad()
        predicted = self.theta(self._noised(images, eps, t), t, class_labels=labels).sample
        (eps - predicted).square().sum(dim=(1, 2, 3)).mean().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.theta.parameters()]
        self.mask = [salient.float() for salient in torch_kthvalue(grads, self.options.density)]
