"""LabelledImages: storage, selection, and splits."""

import pytest
import torch

from pecker_fast.data import LabelledImages, LazyImages


def make(n=60, classes=4, dtype=torch.float32):
    if dtype is torch.uint8:
        images = torch.randint(256, (n, 3, 5, 5), dtype=torch.uint8)
    else:
        images = torch.rand(n, 3, 5, 5) * 2 - 1
    labels = torch.arange(n) % classes
    return LabelledImages(images, labels[torch.randperm(n)], tuple("abcdefgh"[:classes]))


def lazy(dataset):
    pairs = list(zip(dataset.tensor(), dataset.labels.tolist(), strict=True))
    return LabelledImages(LazyImages(pairs, dataset.image_shape), dataset.labels, dataset.class_names)


def test_every_storage_gives_the_same_images():
    bytes_ = make(dtype=torch.uint8)
    floats = LabelledImages(bytes_.tensor(), bytes_.labels, bytes_.class_names)
    indices = torch.randint(60, (17,))
    for dataset in (bytes_, floats, lazy(bytes_)):
        assert len(dataset) == 60 and dataset.image_shape == (3, 5, 5) and dataset.num_classes == 4
        batch = dataset.batch(indices)
        assert batch.dtype is torch.float32
        torch.testing.assert_close(batch, bytes_.images[indices].double().div(127.5).sub(1).float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(dataset.tensor(), floats.tensor(), rtol=0, atol=0)
        image, label = dataset[-1]
        assert torch.equal(image, floats.images[-1]) and label == int(floats.labels[-1])
        assert dataset.batch(indices[:0]).shape == (0, 3, 5, 5)
        part = dataset.of_classes([3, 1]).split(0.5, seed=2)[1]
        expected = floats.of_classes([3, 1]).split(0.5, seed=2)[1]
        assert torch.equal(part.tensor(), expected.tensor()) and torch.equal(part.labels, expected.labels)
    assert floats.tensor() is floats.images
    assert sum(1 for _ in floats) == 60


def test_of_classes_keeps_order_labels_and_names():
    dataset = make()
    selection = dataset.of_classes([2, 0, 2])
    indices = [i for i, label in enumerate(dataset.labels.tolist()) if label in (0, 2)]
    assert torch.equal(selection.images, dataset.images[indices])
    assert torch.equal(selection.labels, dataset.labels[indices])
    assert selection.class_names == dataset.class_names
    for keep in ([], [4], [-1]):
        with pytest.raises(ValueError, match="keep"):
            dataset.of_classes(keep)
    for keep in (1, "a", [1.0], [True]):
        with pytest.raises(TypeError, match="keep"):
            dataset.of_classes(keep)


def test_split_is_stratified_disjoint_and_deterministic():
    labels = torch.tensor([0] * 10 + [1] * 25 + [2] * 7)[torch.randperm(42)]
    images = (torch.arange(42).float() / 42).view(42, 1, 1, 1)
    dataset = LabelledImages(images, labels, ("a", "b", "c"))
    first, second = dataset.split(0.8, seed=5)
    assert first.labels.bincount().tolist() == [8, 20, 6]
    assert second.labels.bincount().tolist() == [2, 5, 1]
    assert sorted(torch.cat([first.images, second.images]).flatten().tolist()) == images.flatten().tolist()
    assert torch.equal(dataset.split(0.8, seed=5)[0].images, first.images)
    assert not torch.equal(dataset.split(0.8, seed=6)[0].images, first.images)
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            dataset.split(share)


def test_invalid_inputs():
    images, labels, names = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]), ("a", "b")
    LabelledImages(images, labels, names)
    cases = [
        (TypeError, "images", (images.double(), labels, names)),
        (TypeError, "images", (images.to(torch.uint8)[:, 0], labels, names)),
        (TypeError, "images", ([0, 0, 0, 0], labels, names)),
        (ValueError, "images", (images[:, 0], labels, names)),
        (ValueError, r"images has values from 0.0 to 1.5", (images.index_fill(0, torch.tensor(0), 1.5), labels, names)),
        (ValueError, "images", (images * float("nan"), labels, names)),
        (TypeError, "labels", (images, labels.int(), names)),
        (ValueError, "labels", (images, labels[:, None], names)),
        (ValueError, "one for each of 4", (images, labels[:3], names)),
        (ValueError, "0 to 0", (images, labels, names[:1])),
        (ValueError, "labels", (images, labels - 1, names)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            LabelledImages(*arguments)
    with pytest.raises(IndexError):
        LabelledImages(images, labels, names)[4]
    wrong = LabelledImages(LazyImages([(torch.zeros(1, 3, 3), 0)] * 4, (1, 2, 2)), labels, names)
    with pytest.raises(ValueError, match="shape"):
        wrong[0]
