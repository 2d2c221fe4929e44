"""FID and its relatives: as torch-fidelity called by hand, and without the traps of the public code."""

import pytest
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from pecker_fast.metrics.image_quality import INCEPTION_FILE, Uint8Images, image_quality, to_uint8


class Tiny(FeatureExtractorBase):
    """A fixed random layer: what a registered extractor looks like."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        self.layer = torch.nn.Linear(3 * 8 * 8, 12)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(12, 3 * 8 * 8, generator=generator) / 14)
            self.layer.bias.zero_()

    @staticmethod
    def get_provided_features_list():
        return ("12",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "12"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    def forward(self, images):
        return (torch.relu(self.layer(images.flatten(1).float() / 127.5 - 1)),)


class Channels(Tiny):
    """The mean of each channel, in the order in which they come."""

    def forward(self, images):
        means = images.float().mean((2, 3))
        return (torch.cat([means, torch.zeros(len(images), 9)], 1),)


torch_fidelity.register_feature_extractor("test-tiny", Tiny)
torch_fidelity.register_feature_extractor("test-channels", Channels)


def images(count: int, seed: int, spread: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(count, 3, 8, 8, generator=generator)).clamp(-1, 1)


def measure(generated: torch.Tensor, real: torch.Tensor, extractor: str = "test-tiny") -> dict:
    return image_quality(Uint8Images(to_uint8(generated)), Uint8Images(to_uint8(real)), feature_extractor=extractor)


def test_equal_to_torch_fidelity_called_by_hand():
    generated, real = images(40, 1), images(60, 2, 0.7)
    found = measure(generated, real)
    by_hand = torch_fidelity.calculate_metrics(
        input1=Uint8Images(to_uint8(generated)),
        input2=Uint8Images(to_uint8(real)),
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=40,
        feature_extractor="test-tiny",
        samples_shuffle=True,
        cache=False,
        verbose=False,
    )
    for ours, theirs in (
        ("extractor_frechet_distance", "frechet_inception_distance"),
        ("extractor_kernel_distance", "kernel_inception_distance_mean"),
        ("extractor_precision", "precision"),
        ("extractor_recall", "recall"),
    ):
        assert found[ours] == pytest.approx(by_hand[theirs], rel=1e-6), ours
    protocol = found["protocol"]
    assert (protocol["input1"], protocol["generated_images"], protocol["real_images"]) == ("generated", 40, 60)
    assert protocol["prc_neighborhood"] == 3 and protocol["torch_fidelity"]
    # Another extractor's numbers do not go by the names of Inception's.
    assert not {"fid", "is", "kid", "precision", "recall"} & set(found)


def test_generated_come_first():
    # All alike, and amid the real ones: precise, and far from covering them.
    generated, real = 0.05 * images(50, 3), images(50, 4)
    found = measure(generated, real)
    assert found["extractor_precision"] > 0.9 and found["extractor_recall"] < 0.2


def test_the_order_of_images_does_not_matter():
    first, second = images(30, 5, 0.2), images(30, 6, 0.9)
    ordered = torch.cat([first, second])
    mixed = ordered[torch.randperm(60)]
    real = images(60, 7)
    a, b = measure(ordered, real), measure(mixed, real)
    for name in ("extractor_frechet_distance", "extractor_precision", "extractor_recall"):
        assert a[name] == pytest.approx(b[name], rel=1e-6), name
    assert a["protocol"]["samples_shuffle"] is True


def test_pixels_keep_their_scale_and_channels_their_order():
    dim = torch.full((1, 3, 8, 8), -0.5)
    dim[0, 0] = 0.0
    pixels = to_uint8(dim)
    # Not stretched to 0 and 255 image by image.
    assert pixels[0, 0].unique().tolist() == [128] and pixels[0, 1].unique().tolist() == [64]
    grey = to_uint8(torch.zeros(2, 1, 8, 8))
    assert grey.shape == (2, 3, 8, 8) and grey.unique().tolist() == [128]
    assert to_uint8(torch.tensor([-2.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)).unique().tolist() == [0, 255]
    red, blue = -torch.ones(20, 3, 8, 8), -torch.ones(20, 3, 8, 8)
    red[:, 0], blue[:, 2] = 1.0, 1.0
    jitter = 0.1 * images(20, 8).abs()
    same = measure(red - jitter, red - jitter, "test-channels")["extractor_frechet_distance"]
    swapped = measure(red - jitter, blue - jitter, "test-channels")["extractor_frechet_distance"]
    assert same == pytest.approx(0, abs=1e-3) and swapped > 1e4


def test_wrong_inputs(tmp_path):
    few, real = Uint8Images(to_uint8(images(3, 0))), Uint8Images(to_uint8(images(9, 0)))
    with pytest.raises(ValueError, match="generated has 3 images"):
        image_quality(few, real)
    with pytest.raises(ValueError, match=INCEPTION_FILE):
        image_quality(real, real)
    with pytest.raises(ValueError, match="no such file"):
        image_quality(real, real, weights=tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="shape"):
        to_uint8(torch.zeros(1, 2, 4, 4))
    with pytest.raises(TypeError, match="floating"):
        to_uint8(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
