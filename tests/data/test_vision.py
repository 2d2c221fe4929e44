"""CIFAR-10, STL-10 and folders, from files of their format with random pixels."""

import hashlib
import os
import pickle
import sys

import numpy as np
import pytest
import torch

from pecker_fast.data import in_memory, load_dataset, load_folder, survey_folder

datasets = pytest.importorskip("torchvision.datasets")
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar10(root, count):
    """Write CIFAR-10's six files with ``count`` random images each; return file to its pixels and labels."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = np.random.randint(256, size=(count, 3072), dtype=np.uint8)
        labels = np.random.permutation(np.arange(count) % 10).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
        parts[name] = data.reshape(count, 3, 32, 32), labels
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    return parts


def hashes_of_cifar10(root):
    """What torchvision's class has to know so that it checks these files like the real ones."""
    folder = root / "cifar-10-batches-py"
    batches = [[name, md5(folder / name)] for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    meta = {**datasets.CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    return {"train_list": batches[:5], "test_list": batches[5:], "meta": meta}


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Six files of 4 images."""
    parts = write_cifar10(tmp_path, 4)
    for name, value in hashes_of_cifar10(tmp_path).items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    return tmp_path, parts


def test_cifar10(cifar10):
    root, parts = cifar10
    names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"], "all": list(parts)}
    for split, files in names.items():
        dataset = load_dataset("cifar10", split, root)
        expected = np.concatenate([parts[name][0] for name in files])
        assert dataset.images.dtype is torch.uint8 and np.array_equal(dataset.images.numpy(), expected)
        assert dataset.labels.tolist() == [label for name in files for label in parts[name][1]]
        assert list(dataset.class_names) == NAMES
    assert dataset.tensor().aminmax().min >= -1 and dataset.tensor().aminmax().max <= 1
    assert load_dataset("cifar10", "test", root, image_size=16).image_shape == (3, 16, 16)


def test_cifar10_damaged_or_missing(cifar10, tmp_path):
    root, _ = cifar10
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"damaged: remove that folder and load once with download=True"):
        load_dataset("cifar10", root=root)
    with pytest.raises(FileNotFoundError, match=r"pass its folder as root \(--data_root\), or download=True"):
        load_dataset("cifar10", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="root is None"):
        load_dataset("cifar10")
    for size, error in ((0, ValueError), (-1, ValueError), (8.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="image_size"):
            load_dataset("cifar10", root=root, image_size=size)


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    parts = {}
    for split, count in (("train", 5), ("test", 3)):
        # Labels count from 1; the file has columns before rows.
        images = np.random.randint(256, size=(count, 3, 96, 96), dtype=np.uint8)
        labels = np.random.randint(1, 11, size=count).astype(np.uint8)
        images.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
        labels.tofile(folder / f"{split}_y.bin")
        parts[split] = images, labels
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(datasets.STL10, attribute)]
        monkeypatch.setattr(datasets.STL10, attribute, [[name, md5(folder / name)] for name in names])
    return tmp_path, parts


def test_stl10(stl10):
    from PIL import Image

    root, parts = stl10
    for split in ("train", "test"):
        images, labels = parts[split]
        dataset = load_dataset("stl10", split, root)
        assert dataset.images.shape == (len(images), 3, 64, 64) and dataset.images.dtype is torch.uint8
        assert dataset.labels.tolist() == (labels.astype(int) - 1).tolist() and list(dataset.class_names) == NAMES
        # Pillow's bilinear filter antialiases; it rounds after each direction.
        for image, resized in zip(images, dataset.images, strict=True):
            expected = np.array(Image.fromarray(image.transpose(1, 2, 0)).resize((64, 64), Image.Resampling.BILINEAR))
            assert np.abs(expected.transpose(2, 0, 1).astype(int) - resized.numpy().astype(int)).max() <= 1
        full = load_dataset("stl10", split, root, image_size=96)
        assert np.array_equal(full.images.numpy(), images)
    assert len(load_dataset("stl10", "all", root, image_size=8)) == 8
    (root / "stl10_binary" / "test_X.bin").unlink()
    with pytest.raises(ValueError, match=r"STL-10 .* incomplete or damaged"):
        load_dataset("stl10", "test", root)


def write_image(path, width, height):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.randint(256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_folder(tmp_path):
    pixels = {}
    for label, name in enumerate(("cat", "dog")):
        for i in range(10):
            pixels[label, i] = write_image(tmp_path / name / f"{i}.png", 6, 6)
    dataset = load_dataset(f"folder:{tmp_path}", "all", image_size=6)
    assert dataset.class_names == ("cat", "dog") and dataset.labels.tolist() == [0] * 10 + [1] * 10
    for index, image in enumerate(pixels.values()):
        expected = torch.from_numpy(image).permute(2, 0, 1).double() / 127.5 - 1
        torch.testing.assert_close(dataset[index][0].double(), expected, rtol=0, atol=1e-6)
    train, test = (load_folder(tmp_path, split, image_size=6) for split in ("train", "test"))
    assert train.labels.bincount().tolist() == [8, 8] and test.labels.bincount().tolist() == [2, 2]
    joined = torch.cat([train.tensor(), test.tensor()]).flatten(1)
    assert sorted(joined.tolist()) == sorted(dataset.tensor().flatten(1).tolist())
    # A DataLoader returns the same images.
    images, labels = next(iter(torch.utils.data.DataLoader(train, batch_size=16)))
    assert torch.equal(images, train.tensor()) and torch.equal(labels, train.labels)


def test_folder_with_splits_and_different_sizes(tmp_path):
    write_image(tmp_path / "train" / "a" / "0.png", 9, 20)
    write_image(tmp_path / "train" / "b" / "0.png", 21, 7)
    write_image(tmp_path / "test" / "a" / "0.jpg", 3, 3)
    for split, count in (("train", 2), ("test", 1)):
        if split == "test":
            write_image(tmp_path / "test" / "b" / "0.png", 8, 8)
            count = 2
        dataset = load_folder(tmp_path, split, image_size=8)
        assert len(dataset) == count and dataset.tensor().shape == (count, 3, 8, 8)
    assert load_folder(tmp_path, "all", image_size=8).labels.tolist() == [0, 1, 0, 1]
    write_image(tmp_path / "test" / "c" / "0.png", 8, 8)
    with pytest.raises(ValueError, match="different class folders"):
        load_folder(tmp_path, "all", image_size=8)


def test_folder_crops_the_centre(tmp_path):
    pixels = write_image(tmp_path / "a" / "0.png", 10, 6)
    image = load_folder(tmp_path, "all", image_size=6)[0][0]
    expected = torch.from_numpy(pixels[:, 2:8]).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


def test_pictures_of_16_bits_are_scaled(tmp_path):
    """Pillow clips grey ones at 255: nearly everything would become white."""
    from PIL import Image

    values = np.array([[0, 3000], [30000, 65535]], dtype=np.uint16)
    (tmp_path / "a").mkdir()
    for name in ("x.png", "x.tiff"):
        Image.fromarray(values).save(tmp_path / "a" / name)
    expected = torch.from_numpy(values.astype(np.float64)) / 32767.5 - 1
    assert abs(expected[0, 1].item() + 0.908) < 1e-3
    for image in load_folder(tmp_path, image_size=2).tensor():
        for channel in image:
            torch.testing.assert_close(channel.double(), expected, rtol=0, atol=0.5 / 127.5 + 1e-6)


def test_pictures_of_other_depths_are_refused(tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    for values, message in (
        (np.full((2, 2), 300_000, np.int32), "integers of 32 bits"),
        (np.full((2, 2), 0.5, np.float32), "floats"),
    ):
        Image.fromarray(values).save(tmp_path / "a" / "x.tiff")
        with pytest.raises(ValueError, match=rf"x\.tiff cannot be read as an image \(its values are {message}"):
            load_folder(tmp_path, image_size=2)[0]


def test_names_of_classes_are_utf8(tmp_path):
    """Reports could not be written."""
    write_image(tmp_path / os.fsdecode(b"caf\xe9") / "0.png", 4, 4)
    with pytest.raises(ValueError, match=r"caf\\udce9, which is not UTF-8: rename it"):
        load_folder(tmp_path, image_size=4)


def test_invalid_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="sub-folder of images for each class"):
        load_dataset(f"folder:{tmp_path}/none", image_size=8)
    with pytest.raises(ValueError, match="no sub-folders"):
        load_folder(tmp_path, image_size=8)
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match="remove empty class folders"):
        load_folder(tmp_path, image_size=8)
    (tmp_path / "a" / "0.png").write_text("no image")
    dataset = load_folder(tmp_path, image_size=8)
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        dataset[0]
    with pytest.raises(ValueError, match="image_size is None"):
        load_dataset(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="root"):
        load_dataset(f"folder:{tmp_path}", root=tmp_path, image_size=8)


def write_grey(path, value, size=8, mode="L"):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size, size), value, dtype=np.uint16 if mode == "I;16" else np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def test_folder_in_grey(tmp_path):
    """A grey picture keeps its values, one in colour gets Pillow's luminance; RGB repeats a grey value."""
    write_grey(tmp_path / "a" / "0.png", 37)
    pixels = write_image(tmp_path / "b" / "0.png", 8, 8)
    grey = load_dataset(f"folder:{tmp_path}", "all", image_size=8, channels=1)
    assert grey.image_shape == (1, 8, 8) and torch.equal(grey[0][0], torch.full((1, 8, 8), 37 / 127.5 - 1))
    luminance = (pixels.astype(float) @ [0.299, 0.587, 0.114]) / 127.5 - 1
    assert np.abs(grey[1][0][0].numpy() - luminance).max() <= 1 / 127.5
    colour = load_folder(tmp_path, image_size=8)
    assert torch.equal(colour[0][0], torch.full((3, 8, 8), 37 / 127.5 - 1))
    with pytest.raises(ValueError, match="channels is 2"):
        load_folder(tmp_path, image_size=8, channels=2)


def test_folder_in_memory(tmp_path):
    for label, side in (("a", 8), ("b", 13)):
        for i in range(3):
            write_image(tmp_path / label / f"{i}.png", side, side + i)
    read = load_folder(tmp_path, image_size=8)
    stored = in_memory(read)
    assert stored.images.dtype is torch.uint8 and torch.equal(stored.tensor(), read.tensor())
    assert torch.equal(stored.labels, read.labels) and stored.class_names == read.class_names
    assert in_memory(read, limit=6 * 3 * 64 - 1) is read and in_memory(read, limit=6 * 3 * 64) is not read
    assert in_memory(stored) is stored
    # One picture that cannot be read is found here, and not while a network trains.
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "b" / "1.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
        in_memory(load_folder(tmp_path, image_size=8))


def test_survey_of_a_folder(tmp_path):
    import unicodedata

    decomposed = unicodedata.normalize("NFD", "café")
    write_image(tmp_path / decomposed / "0.png", 9, 20)
    write_grey(tmp_path / "Ω" / "0.png", 3, 12)
    write_grey(tmp_path / "Ω" / "1.png", 3, 11, "LA")
    write_grey(tmp_path / "Ω" / "2.png", 3000, 10, "I;16")
    survey = survey_folder(tmp_path)
    # In Unicode's composed form, as somebody types it.
    assert survey.class_names == ("café", "Ω") == load_folder(tmp_path, image_size=8).class_names
    assert (survey.colour, survey.grey, survey.shortest) == (1, 3, 9)
    assert survey.shortest_file == survey.colour_file == str(tmp_path / decomposed / "0.png")
    assert survey.grey_file == str(tmp_path / "Ω" / "0.png")
    (tmp_path / "Ω" / "3.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"3\.jpg cannot be read as an image"):
        survey_folder(tmp_path)


def test_surveys_that_are_refused(tmp_path):
    write_image(tmp_path / "one" / "cat" / "0.png", 8, 8)
    with pytest.raises(ValueError, match="one class folder, 'cat', expected at least two"):
        survey_folder(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        survey_folder(tmp_path / "none")
    for name in ("caf\u00e9", "cafe\u0301"):
        write_image(tmp_path / "twice" / name / "0.png", 8, 8)
    if len(list((tmp_path / "twice").iterdir())) == 2:
        with pytest.raises(ValueError, match="two class folders whose names look alike"):
            survey_folder(tmp_path / "twice")
    for part, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "c")):
        write_image(tmp_path / "parts" / part / name / "0.png", 8, 8)
    with pytest.raises(ValueError, match="different class folders"):
        survey_folder(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"expected one of digits.* \(folder:.*/parts for that folder\)"):
        load_dataset(str(tmp_path / "parts"), image_size=8)


def test_error_without_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in ("cifar10", "stl10"):
        with pytest.raises(ImportError, match=r"pip install 'pecker-fast\[train\]'"):
            load_dataset(name, root=tmp_path)


def test_huge_pictures_are_refused_in_one_line(tmp_path, monkeypatch):
    """Pillow refuses them with an error of its own, when the header is read."""
    from PIL import Image

    for name in ("a", "b"):
        write_image(tmp_path / name / "0.png", 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    for read in (lambda: survey_folder(tmp_path), lambda: load_folder(tmp_path, image_size=8)[0]):
        with pytest.raises(ValueError, match=r"0\.png cannot be read as an image .*: remove or replace it"):
            read()
