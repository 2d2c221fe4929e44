"""Small networks, and the tolerance of float32 results."""

import numpy as np
import torch
from torch import Tensor, nn

from pecker_fast.diffusion import UNetConfig, build_unet

EPS32 = float(np.finfo(np.float32).eps)


def assert_close(actual: Tensor, expected, scale=None, factor: float = 64) -> None:
    """Assert |actual - expected| <= factor * 2^-23 * scale.

    scale is the magnitude of the summed terms, for each entry or for all, or by default that of the largest result.
    """
    assert actual.dtype == torch.float32
    actual = actual.detach().double().cpu().numpy()
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max() if scale is None else scale
    error, allowed = np.abs(actual - expected), factor * EPS32 * np.asarray(scale)
    assert np.all(error <= allowed), f"errors {error}, allowed {allowed}"


class AffineNetwork(nn.Module):
    """eps = w x + v_c + s t, whose gradient is simple. It is called like a UNet2DModel and records its calls."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(()))
        self.class_embedding = nn.Embedding(classes, 1)
        self.s = 1e-3
        self.calls = []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.calls.append((sample, timestep, class_labels))
        view = (-1, *[1] * (sample.ndim - 1))
        offset = self.class_embedding(class_labels).view(view) + self.s * timestep.view(view)
        return (self.w * sample + offset,)

    def parts(self, labels) -> tuple[float, np.ndarray]:
        """w and v_c in float64, v_c of shape (B, 1, 1, 1)."""
        return self.w.item(), self.class_embedding.weight.detach().double().numpy()[labels].reshape(-1, 1, 1, 1)


def double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def tiny_config(**changes) -> UNetConfig:
    options = {
        "sample_size": 8,
        "num_classes": 3,
        "in_channels": 1,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "attention_resolutions": (4,),
        "norm_num_groups": 2,
    }
    return UNetConfig(**{**options, **changes})


def tiny_unet(**changes):
    """A U-Net of a few thousand weights in eval mode."""
    return build_unet(tiny_config(**changes)).eval()
