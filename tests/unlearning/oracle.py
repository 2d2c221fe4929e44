"""The equations of the method in float64, written from their definitions, without any code of the package."""

import copy

import torch
from torch import Tensor, nn

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.diffusion.unet import NUM_CLASSES
from pecker_fast.unlearning import ForgetRequest, Setting
from tests.diffusion.toy import AffineNetwork
from tests.unlearning.settings import setting_of

SHAPE = (2, 3, 3)


class Affine(AffineNetwork):
    """eps = w x + v_c + s t + u tanh(x), with a dropout that reveals the mode in which the network is called."""

    def __init__(self, classes: int = 4, dropout: float = 0.0) -> None:
        super().__init__(classes)
        self.u = nn.Parameter(torch.randn(()))
        self.drop = nn.Dropout(dropout)
        self.config = {"in_channels": SHAPE[0], "sample_size": SHAPE[1]}
        self.modes = []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.modes.append(self.training)
        (linear,) = super().forward(sample, timestep, class_labels)
        return (self.drop(linear + self.u * torch.tanh(sample)),)


class UNet2DModel(Affine):
    """Affine under the class name that identifies a class-conditional U-Net; its last label is "no condition"."""

    def __init__(self, classes: int = 4, dropout: float = 0.0, null: bool = True) -> None:
        super().__init__(classes + null, dropout)
        self.config |= {"class_embed_type": None, "num_class_embeds": classes + null, NUM_CLASSES: classes}


def make_setting(forget=(0,), cover: int | None = 1, classes: int = 4, dropout: float = 0.0, **options) -> Setting:
    request = ForgetRequest(classes, tuple(forget), cover)
    return setting_of(teacher=Affine(classes, dropout), schedule=NoiseSchedule.linear(), request=request, **options)


class Oracle:
    """A network in float64: leaf parameters w, u and v, and eps as a function of x."""

    def __init__(self, network: nn.Module) -> None:
        network = copy.deepcopy(network)
        self.w, self.u, self.v = (
            p.detach().double().requires_grad_() for p in (network.w, network.u, network.class_embedding.weight)
        )
        self.s = network.s

    def eps(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        view = (-1, 1, 1, 1)
        return self.w * x + self.v[labels].view(view) + self.s * t.double().view(view) + self.u * torch.tanh(x)

    def grads(self, loss: Tensor) -> dict[str, Tensor]:
        results = torch.autograd.grad(loss, (self.w, self.u, self.v), retain_graph=True, allow_unused=True)
        leaves = (self.w, self.u, self.v)
        results = [torch.zeros_like(p) if g is None else g for g, p in zip(results, leaves, strict=True)]
        return dict(zip(("w", "u", "class_embedding.weight"), results, strict=True))


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """a_t and b_t of DDPM's linear schedule, (B, 1, 1, 1)."""
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    alphas = torch.cumprod(1 - betas, 0)[t].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


def one_step(network: Oracle, z: Tensor, t_init: int, labels: Tensor) -> Tensor:
    t = torch.full((len(z),), t_init)
    a, b = levels(t)
    x = b * z.double()
    return (x - b * network.eps(x, t, labels)) / a


def x0(network: Oracle, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    a, b = levels(t)
    return (x_t - b * network.eps(x_t, t, labels)) / a


def noised(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    a, b = levels(t)
    return a * x + b * eps.double()


def score_loss(score: Oracle, x: Tensor, eps: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """E sum ||eps - eps_psi(x_t)||^2."""
    error = eps.double() - score.eps(noised(x, eps, t), t, labels)
    return error.square().sum((1, 2, 3)).mean()


def generator_loss(
    teacher: Oracle, score: Oracle, x: Tensor, eps: Tensor, t: Tensor, labels, teacher_labels, alpha: float
) -> Tensor:
    """(1 - alpha) ||d||^2 + d (x0_psi - x), over omega: METHOD's second form, the package computes the first."""
    x_t = noised(x, eps, t)
    phi, psi = x0(teacher, x_t, t, teacher_labels), x0(score, x_t, t, labels)
    d = phi - psi
    omega = (phi - x).abs().mean((1, 2, 3), keepdim=True).detach().clamp(min=1e-5)
    return (((1 - alpha) * d * d + d * (psi - x)) / omega).sum((1, 2, 3)).mean()
