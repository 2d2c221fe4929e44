"""A network with a closed form, and a judge that classifies by the mean of an image."""

import numpy as np
import torch
from torch import Tensor, nn

from pecker_fast.diffusion import NoiseSchedule, Sampler
from pecker_fast.robustness import Examiner
from pecker_fast.unlearning import ForgetRequest
from tests.diffusion.toy import AffineNetwork

T_INIT = 25
SHAPE = (1, 4, 4)


class Affine(AffineNetwork):
    """AffineNetwork with the configuration that samplers read. It records no calls, so that it can be copied."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.config = {"in_channels": 1, "sample_size": 4}

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.calls.clear()
        return output


def affine(w: float = 0.0, values: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Affine:
    """G(z, c) = (b z (1 - w b) - b v_c) / a, with s = 0."""
    network = Affine(len(values)).eval()
    network.s = 0.0
    with torch.no_grad():
        network.w.fill_(w)
        network.class_embedding.weight.copy_(torch.tensor(values)[:, None])
    return network


class MeanModel(nn.Module):
    """Logits of three classes, with peaks at mean -0.7, 0 and 0.7."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1, keepdim=True)
        return -20 * (mean - torch.tensor([[-0.7, 0.0, 0.7]])).square()


class MeanJudge:
    """The part of a Judge that probes use."""

    num_classes = 3

    def __init__(self) -> None:
        self.model = MeanModel()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(images).softmax(1), images.flatten(1)[:, :2]


def examiner(t_init: int | None = T_INIT, **changes) -> Examiner:
    """Class 0 of three is forgotten, with class 1 as cover; T = 50."""
    sampler = Sampler.one_step_or_ddim(t_init, 5, batch_size=7)
    options = {"num_inference_steps": 5, "seed": 3, "forget_samples": 12, "retain_samples": 6, **changes}
    return Examiner(MeanJudge(), ForgetRequest(3, (0,), 1), NoiseSchedule.linear(50), sampler, **options)


def generated(network: Affine, z: Tensor, labels: Tensor) -> np.ndarray:
    """G(z, c) in float64."""
    schedule = NoiseSchedule.linear(50)
    alpha = np.cumprod(1 - np.linspace(1e-4, 2e-2, 50))[T_INIT]
    assert np.isclose(schedule.signal(T_INIT).item() ** 2, alpha)
    a, b = np.sqrt(alpha), np.sqrt(1 - alpha)
    w, v = network.parts(labels)
    x = b * z.double().numpy()
    return (x - b * (w * x + v)) / a
