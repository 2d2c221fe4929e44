"""FID and related figures against direct calls of torch-fidelity, and errors of public code that must not occur."""

import sys

import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from pecker_fast.data.vision import load_folder
from pecker_fast.hashing import file_sha256
from pecker_fast.metrics import load_judge
from pecker_fast.metrics.extractors import SPATIAL, SpatialInception, register_judge
from pecker_fast.metrics.features import frechet_distance
from pecker_fast.metrics.image_quality import (
    INCEPTION_FILE,
    Uint8Images,
    check_inception_weights,
    image_quality,
    to_uint8,
)
from tests.metrics.inception import random_inception
from tests.models.test_ancestors import Touch


class Tiny(FeatureExtractorBase):
    """A registered extractor with a fixed random layer."""

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
    """The mean of each channel, in order."""

    def forward(self, images):
        means = images.float().mean((2, 3))
        return (torch.cat([means, torch.zeros(len(images), 9)], 1),)


class Sides(Tiny):
    """Logits of two classes, bright and dark."""

    def forward(self, images):
        means = images.float().mean((1, 2, 3)) / 127.5 - 1
        return (torch.stack([means, -means], 1) * 50,)


torch_fidelity.register_feature_extractor("test-tiny", Tiny)
torch_fidelity.register_feature_extractor("test-channels", Channels)
torch_fidelity.register_feature_extractor("test-sides", Sides)


def images(count: int, seed: int, spread: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(count, 3, 8, 8, generator=generator)).clamp(-1, 1)


def measure(generated: torch.Tensor, real: torch.Tensor, extractor: str = "test-tiny") -> dict:
    return image_quality(Uint8Images(to_uint8(generated)), Uint8Images(to_uint8(real)), feature_extractor=extractor)


def test_equal_to_a_direct_call_of_torch_fidelity():
    generated, real = images(40, 1), images(60, 2, 0.7)
    result = measure(generated, real)
    direct = torch_fidelity.calculate_metrics(
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
        assert result[ours] == pytest.approx(direct[theirs], rel=1e-6), ours
    protocol = result["protocol"]
    assert (protocol["input1"], protocol["generated_images"], protocol["real_images"]) == ("generated", 40, 60)
    assert protocol["prc_neighborhood"] == 3 and protocol["torch_fidelity"]
    # Figures of another extractor do not have the names of Inception's.
    assert not {"fid", "is", "kid", "precision", "recall"} & set(result)


def test_the_spread_of_the_kernel_distance_is_that_of_parts():
    """Subsets that are all of the images would have the same distance each."""
    generated, real = images(40, 1), images(44, 2, 0.7)
    result = measure(generated, real)
    direct = torch_fidelity.calculate_metrics(
        input1=Uint8Images(to_uint8(generated)),
        input2=Uint8Images(to_uint8(real)),
        cuda=False,
        kid=True,
        kid_subset_size=22,
        feature_extractor="test-tiny",
        samples_shuffle=True,
        cache=False,
        verbose=False,
    )
    spread = direct["kernel_inception_distance_std"]
    assert result["extractor_kernel_distance_std"] == pytest.approx(spread, rel=1e-6)
    assert result["protocol"]["kid_std_subset_size"] == 22 and spread > 1e-3 * direct["kernel_inception_distance_mean"]
    few = measure(generated, images(90, 2, 0.7))
    assert "kid_std_subset_size" not in few["protocol"] and few["protocol"]["kid_subset_size"] == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "damaged"),
        (None, "code in it is not run"),
        ({"a": 1}, "not a tensor"),
        ({"Conv2d_1a_3x3.conv.weight": torch.ones(2)}, "another network"),
    ],
)
def test_files_without_the_weights_of_inception(tmp_path, content, message):
    """torch-fidelity itself would run code in the file, or print all of it."""
    path, trap = tmp_path / "w.pth", tmp_path / "trap"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(Touch(trap) if content is None else content, path)
    with pytest.raises(ValueError, match=message) as error:
        check_inception_weights(path)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400 and not trap.exists()
    assert "weights-inception-2015-12-05-6726825d.pth" in str(error.value)


def test_other_weights_of_inception_are_unverified(tmp_path, capsys, monkeypatch):
    path = random_inception(tmp_path)
    assert check_inception_weights(path) == path
    assert "are unverified" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules[image_quality.__module__], "INCEPTION_SHA256", file_sha256(path))
    check_inception_weights(path)
    assert capsys.readouterr().err == ""


def test_generated_images_are_the_first_input():
    # Similar images in the middle of the real ones: high precision, low recall.
    generated, real = 0.05 * images(50, 3), images(50, 4)
    result = measure(generated, real)
    assert result["extractor_precision"] > 0.9 and result["extractor_recall"] < 0.2


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
    # Images are not normalised one by one to 0 and 255.
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


def test_photographs_keep_their_order_of_channels(tmp_path):
    """Red stays the first channel from the file to torch-fidelity's input."""
    for name, colour in (("a", (250, 100, 0)), ("b", (0, 0, 200))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / name / "x.png")
    photographs = load_folder(tmp_path, image_size=8)
    pixels = Uint8Images(lambda i: to_uint8(photographs.batch(torch.tensor([i])))[0], 2)
    assert [pixels[i].flatten(1).unique(dim=1).flatten().tolist() for i in range(2)] == [[250, 100, 0], [0, 0, 200]]


def test_parts_of_the_inception_score_have_all_classes(monkeypatch, tmp_path):
    """The Inception score of two distinct classes is 2; with one class in each part it would be 1."""
    weights = tmp_path / "w"
    weights.write_bytes(b"")
    # The package's attribute of the module's name is the function.
    module = sys.modules[image_quality.__module__]
    monkeypatch.setattr(module, "INCEPTION", "test-sides")
    monkeypatch.setattr(module, "_check_unknown_inception", lambda path: None)
    monkeypatch.setattr(module, "SCORE_PART", 50)
    monkeypatch.setattr("pecker_fast.metrics.extractors.SPATIAL", "test-sides")
    ordered = torch.cat([torch.full((50, 3, 8, 8), value) for value in (-0.9, 0.9)])
    dataset = Uint8Images(to_uint8(ordered))
    result = image_quality(dataset, dataset, feature_extractor="test-sides", weights=weights)
    assert result["protocol"]["isc_splits"] == 2
    assert 1.8 < result["is"] <= 2 + 1e-6


def test_features_are_cached_by_content(monkeypatch, tmp_path):
    weights = tmp_path / "w"
    weights.write_bytes(b"1")
    module = sys.modules[image_quality.__module__]
    monkeypatch.setattr(module, "INCEPTION", "test-tiny")
    monkeypatch.setattr(module, "_check_unknown_inception", lambda path: None)
    monkeypatch.setattr("pecker_fast.metrics.extractors.SPATIAL", "test-tiny")
    calls, forward = [], Tiny.forward

    def counted(self, x):
        calls.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Tiny, "forward", counted)

    def cached_quality(generated, real, everything=None):
        calls.clear()
        pair = (Uint8Images(to_uint8(x)) for x in (generated, real))
        whole = None if everything is None else Uint8Images(to_uint8(everything))
        cache = tmp_path / "features"
        return image_quality(*pair, feature_extractor="test-tiny", weights=weights, cache=cache, everything=whole)

    generated, other, real = images(20, 1), images(20, 2), images(30, 3)
    first = cached_quality(generated, real)
    assert sum(calls) == 50
    assert cached_quality(generated, real) == first and not calls
    # Other images or weights are not in the cache.
    second = cached_quality(other, real)
    assert sum(calls) == 20 and second["fid"] != first["fid"]
    # The u-FID is the FID of all images; the retained ones are measured as before.
    whole = torch.cat([other, images(6, 4)])
    third = cached_quality(other, real, whole)
    assert sum(calls) == 26 and "u_fid" not in second and third["fid"] == second["fid"]
    assert third["u_fid"] == pytest.approx(cached_quality(whole, real)["fid"]) != third["fid"]
    weights.write_bytes(b"2")
    again = cached_quality(generated, real)
    assert sum(calls) == 50
    assert again.pop("protocol") != first["protocol"] and again == {k: v for k, v in first.items() if k != "protocol"}


def test_features_of_the_judge(capfd):
    judge = load_judge()
    name = register_judge(judge)
    assert name == judge.feature_extractor == register_judge(judge)
    generated, real = torch.rand(20, 1, 8, 8) * 2 - 1, torch.rand(30, 1, 8, 8) * 2 - 1
    result = measure(generated, real, name)
    # Images after rounding to eight bits.
    features = [judge(to_uint8(x)[:, :1].float() / 127.5 - 1)[1] for x in (generated, real)]
    expected = frechet_distance(*features)
    # torch-fidelity has float32 means.
    assert result["extractor_frechet_distance"] == pytest.approx(expected, rel=1e-4)
    # It would print them as Fréchet Inception Distance.
    shown = (Uint8Images(to_uint8(x)) for x in (generated, real))
    assert image_quality(*shown, feature_extractor=name, verbose=True)["extractor_recall"] == result["extractor_recall"]
    assert "nception" not in "".join(capfd.readouterr())
    with pytest.raises(ValueError, match="name of another extractor"):
        register_judge(type("J", (), {"feature_extractor": "inception-v3-compat"}))


def test_spatial_features_against_the_layer(tmp_path):
    path = random_inception(tmp_path)
    extractor = SpatialInception(SPATIAL, ["2023"], feature_extractor_weights_path=str(path))
    pixels = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    (features,) = extractor(pixels)
    assert features.shape == (3, 2023) and features.dtype is torch.float32
    # Step by step: resizing, scaling, the preceding blocks, then convolution, normalisation and ReLU.
    net = extractor.inception
    x = net_input(pixels)
    for part in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
                 "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):  # fmt: skip
        x = getattr(net, part)(x)
    branch = net.Mixed_6d.branch1x1
    x = torch.relu(branch.bn(branch.conv(x)))
    assert x.shape == (3, 192, 17, 17)
    assert torch.allclose(features, x[:, :7].reshape(3, -1), rtol=1e-4, atol=1e-4)
    assert (features > 0.05).float().mean() > 0.2
    # Images have different features, and no state remains from an earlier call.
    assert (features[0] - features[1]).abs().max() > 1e-3 and extractor._output is None
    assert torch.allclose(extractor(pixels[1:2])[0], features[1:2], rtol=1e-4, atol=1e-4)


def net_input(pixels):
    """Bilinear interpolation of TensorFlow 1: output pixel i is at i * size / 299 of the source."""
    size = pixels.shape[-1]
    position = torch.arange(299) * (size / 299)
    low = position.floor().long()
    high, share = (low + 1).clamp(max=size - 1), position - low
    x = pixels.float()
    x = x[:, :, low] * (1 - share).view(-1, 1) + x[:, :, high] * share.view(-1, 1)
    x = x[..., low] * (1 - share) + x[..., high] * share
    return (x - 128) / 128


def test_invalid_inputs(tmp_path):
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
