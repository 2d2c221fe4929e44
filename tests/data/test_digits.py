"""The digits, and loading data sets by name."""

import sys

import numpy as np
import pytest
import torch

from pecker_fast.data import DATASETS, load_dataset, load_digits_images

pytest.importorskip("sklearn")


def test_all_digits_against_scikit_learn():
    from sklearn.datasets import load_digits

    dataset, data = load_digits_images("all"), load_digits()
    assert dataset.images.shape == (1797, 1, 8, 8) and dataset.images.dtype is torch.float32
    # Eighths are exact in float32.
    assert np.array_equal((dataset.images[:, 0].numpy() + 1) * 8, data.images)
    assert dataset.labels.tolist() == data.target.tolist()
    assert dataset.class_names == tuple("0123456789")
    assert dataset.images.min() == -1 and dataset.images.max() == 1


def test_splits():
    whole, train, test = (load_digits_images(split) for split in ("all", "train", "test"))
    for label, count in enumerate(whole.labels.bincount().tolist()):
        assert (train.labels == label).sum() == round(0.8 * count)
    rows = torch.cat([train.images, test.images]).flatten(1)
    assert sorted(rows.tolist()) == sorted(whole.images.flatten(1).tolist())
    assert torch.equal(load_digits_images("test").images, test.images)
    assert not torch.equal(load_digits_images("test", seed=1).images, test.images)
    with pytest.raises(ValueError, match="expected one of train, test, all"):
        load_digits_images("validation")


def test_larger_digits_are_the_same_images_interpolated():
    small, large = load_digits_images("test"), load_digits_images("test", image_size=16)
    assert large.images.shape == (len(small), 1, 16, 16) and torch.equal(large.labels, small.labels)
    assert torch.equal(large.images, load_dataset("digits", "test", image_size=16).images)
    # Keys' cubic kernel with a = -0.75 at quarters of a pixel: four nearest pixels, edges repeated, one axis at a time.
    a, t = -0.75, np.array([1.25, 0.25, 0.75, 1.75])
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    kernel = np.where(t <= 1, near, far)
    axis = np.zeros((16, 8))
    for i in range(16):
        # Even rows are a quarter before pixel i / 2, odd ones a quarter after it.
        pixels = range(i // 2 + 1, i // 2 - 3, -1) if i % 2 == 0 else range(i // 2 - 1, i // 2 + 3)
        for pixel, weight in zip(pixels, kernel, strict=True):
            axis[i, min(max(pixel, 0), 7)] += weight
    expected = np.clip(axis @ small.images[:, 0].double().numpy() @ axis.T, -1, 1)
    assert np.abs(large.images[:, 0].numpy() - expected).max() < 1e-5


def test_error_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'pecker-fast\[train\]'"):
        load_digits_images()


def test_by_name():
    dataset = load_dataset("digits", "test", image_size=8)
    assert torch.equal(dataset.images, load_digits_images("test").images)
    for name in ("svhn", "folder:", "", None, "Digits", "folder"):
        with pytest.raises(ValueError, match=", ".join(DATASETS)):
            load_dataset(name)
    for options, error, message in (
        ({"split": "dev"}, ValueError, "split"),
        ({"image_size": 7}, ValueError, "image_size is 7"),
        ({"image_size": 8.0}, TypeError, "image_size is 8.0"),
        ({"root": "/data"}, ValueError, "root"),
    ):
        with pytest.raises(error, match=message):
            load_dataset("digits", **options)
