"""One's own images from a folder to a report: what commands know from earlier ones, names of classes, refusals."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pecker_fast as pf
from pecker_fast.cli import main
from pecker_fast.metrics import Judge
from pecker_fast.models import resolve
from tests.commands.case import ROOT, fails

EXAMPLE = ROOT / "examples" / "own_images"
NAMES = ("café", "cat", "кошка")
COLOURS = ((200, 60, 20), (20, 180, 60), (40, 40, 220))
# Each command of the example does as little as it can.
TRAIN = ["--max_train_steps", "2", "--samples_per_class", "3", "--no-progress_bar"]
SHORT = {
    "train-classifier": ["--epochs", "4", "--batch_size", "16", "--no-progress_bar"],
    "pretrain": [*TRAIN, "--train_batch_size", "4", "--validation_steps", "2"],
    "distil": [*TRAIN, "--train_batch_size", "4"],
    "unlearn": [*TRAIN, "--train_batch_size", "3", "--forget_batch_size", "2", "--saliency_chunks", "2"],
    "evaluate": ["--samples_per_class", "3", "--no-progress_bar"],
    "robustness": [
        *("--relearn_images", "2", "--relearn_steps", "1", "--attacks", "regression", "--forget_samples", "4"),
        *("--retain_samples", "2", "--num_inference_steps", "2", "--no-progress_bar"),
    ],
    "sample": ["--images_per_class", "2"],
}


def write_pictures(folder: Path, names=NAMES, each: int = 8, size: int = 8, grey: bool = False) -> str:
    """Pictures of one colour with noise for each class. Returns the name of the data set."""
    draw = np.random.default_rng(0)
    for name, colour in zip(names, COLOURS, strict=False):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.clip(np.array(colour) + draw.integers(-15, 16, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels[..., 0] if grey else pixels).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder with "pictures", "grey" and "runs", in which the example has run."""
    folder = tmp_path_factory.mktemp("own")
    write_pictures(folder / "pictures")
    example = runpy.run_path(str(EXAMPLE / "run_all.py"))
    example["main"](str(folder / "runs"), str(folder / "pictures"), SHORT)
    return folder


def config(place: Path, name: str) -> dict:
    return json.loads((place / "runs" / name / "config.json").read_text())


def test_commands_know_what_earlier_ones_were_told(place):
    data, judge = f"folder:{place / 'pictures'}", str(place / "runs" / "judge.safetensors")
    network = config(place, "network")
    assert (network["unet"]["sample_size"], network["unet"]["in_channels"], network["unet"]["num_classes"]) == (8, 3, 3)
    for name in ("network", "distilled", "patch"):
        known = config(place, name)
        assert (known["preset"], known["dataset_name"], known["judge"]) == ("images", data, judge), name
        if name != "network":
            assert known["class_names"] == list(NAMES), name
    patch = config(place, "patch")
    assert patch["pretrained_model_name_or_path"] == str(place / "runs" / "network")
    assert (patch["forget_classes"], patch["cover_class"]) == ([1], 0)


def test_damaged_record(place, tmp_path, capsys):
    """A value of another type in config.json of the pretraining is refused by name."""
    shutil.copytree(place / "runs" / "network" / "unet", tmp_path / "net" / "unet")
    start = ["unlearn", "--pretrained_model_name_or_path", str(tmp_path / "net"), "--forget_classes", "cat"]
    for name, value in (("judge", 5), ("dataset_name", ["x"]), ("class_names", "cat")):
        record = {**config(place, "network"), name: value}
        (tmp_path / "net" / "config.json").write_text(json.dumps(record))
        assert f"config.json is damaged: {name} is " in refused(capsys, tmp_path, *start)


def test_measured_by_the_judge_of_the_pictures(place):
    run = pf.Run(place / "runs" / "patch")
    assert run.metrics["protocol"]["judge"]["name"] == run.metrics["protocol"]["feature_extractor"].rsplit("-", 1)[0]
    assert run.metrics["protocol"]["judge"]["recipe"]["train_images"] == 18
    rows = {row["class"]: row["role"] for row in run.metrics["by_class"]["classes"]}
    assert rows == {"café": "cover", "cat": "forgotten", "кошка": "retained"}
    pretrained = json.loads((place / "runs" / "network" / "metrics.json").read_text())
    assert {"accuracy", "frechet_distance"} <= pretrained.keys()
    assert (run.folder / "robustness.json").is_file() and (run.folder / "evaluation.json").is_file()
    assert "кошка" in run.report.read_text(encoding="utf-8")
    assert "forgotten class 1 (“cat”)" in (run.folder / "robustness.md").read_text(encoding="utf-8")
    card = (run.folder / "README.md").read_text(encoding="utf-8")
    # Labels that the network has.
    assert "unlearned classes: 1 (“cat”)" in card and "class_labels=[0, 2]" in card


def test_names_are_beside_the_networks(place):
    for name in ("network/unet", "distilled", "distilled/score", "patch"):
        assert tuple(resolve(place / "runs" / name).network.config["_class_names"]) == NAMES, name
    index = json.loads((place / "runs" / "patch" / "model_index.json").read_text())
    assert index["id2label"] == {"0": "café", "1": "cat", "2": "кошка"}
    pipeline = pf.Run(place / "runs" / "patch").pipeline
    import torch

    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    named = pipeline(class_labels=["кошка", 1], latents=noise, output_type="pt").images
    assert torch.equal(named, pipeline(class_labels=[2, 1], latents=noise, output_type="pt").images)
    with pytest.raises(ValueError, match="'dog', expected one of café, cat, кошка"):
        pipeline(class_labels="dog")


def test_from_python_by_name_or_number(place, tmp_path):
    options = {"max_train_steps": 1, "train_batch_size": 3, "forget_batch_size": 2, "samples_per_class": 2}
    options |= {"progress_bar": False, "device": "cpu"}
    run = pf.unlearn(
        place / "runs" / "network", "sfd", forget="кошка", cover="cat", output_dir=str(tmp_path), **options
    )
    assert (run.config["forget_classes"], run.config["cover_class"], run.config["preset"]) == ([2], 1, "images")
    pictures = f"folder:{place / 'pictures'}"
    assert run.config["dataset_name"] == pictures and run.metrics["protocol"]["reference"]["dataset"] == pictures
    with pytest.raises(ValueError, match="forget_classes is 'dog', expected one of the classes café, cat, кошка"):
        pf.unlearn(place / "runs" / "network", "sfd", forget=["dog"], output_dir=str(tmp_path / "no"))
    with pytest.raises(ValueError, match="forget_classes is empty, expected some of café, cat, кошка"):
        pf.unlearn(place / "runs" / "network", "sfd", preset="images", output_dir=str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_a_many_step_network_has_names_too(place, tmp_path):
    run = pf.unlearn(
        place / "runs" / "network",
        "relabel",
        forget="cat",
        distilled=None,
        output_dir=str(tmp_path),
        samples_per_class=2,
    )
    assert run.pipeline.config.id2label["2"] == "кошка" and run.config["cover_class"] is None
    assert len(run.pipeline(class_labels=["кошка", 0], num_inference_steps=1).images) == 2
    with pytest.raises(ValueError, match="'dog', expected one of café, cat, кошка"):
        run.pipeline(class_labels=["dog", "cat"])


def refused(capsys, place: Path, *words: str) -> str:
    """The line that a command ends with, which leaves the folder as it was."""
    before = sorted(place.rglob("*"))
    line = fails(capsys, *words)
    assert sorted(place.rglob("*")) == before
    return line


def test_refusals(place, tmp_path, capsys, monkeypatch):
    """What does not fit is refused in one line that names both sides, before anything is written."""
    monkeypatch.chdir(tmp_path)
    judge, network = str(place / "runs" / "judge.safetensors"), str(place / "runs" / "network")
    names, same = "café, cat, кошка", f"folder:{place / 'pictures'}"
    other = write_pictures(tmp_path / "other", ("bird", "cat"))
    grey = write_pictures(tmp_path / "grey", grey=True)
    large = write_pictures(tmp_path / "large", size=16)

    def pretrain(data, *words):
        return refused(capsys, tmp_path, "pretrain", "--preset", "images", "--dataset_name", data, *words)

    line = pretrain(other, "--judge", judge)
    assert f"judge {judge} knows the 3 classes {names}, {other} has the 2 classes bird, cat: train one for" in line
    line = pretrain(grey, "--judge", judge)
    assert f"for RGB images of 8 x 8 pixels, {grey} is used with grey images of 8 x 8 pixels: train" in line
    line = pretrain(large, "--judge", judge)
    assert "RGB images of 16 x 16 pixels" in line and "--sample_size 16 --in_channels 3" in line
    line = pretrain(same, "--num_classes", "4")
    assert f"{same} has the 3 classes {names}, the U-Net (sample_size, in_channels, num_classes) 4 classes" in line
    line = refused(capsys, tmp_path, "evaluate", network, "--dataset_name", other)
    assert f"{other} has the 2 classes bird, cat, the network the 3 classes {names}: expected the images that" in line
    start = ["unlearn", "--pretrained_model_name_or_path", network, "--forget_classes", "cat", "--output_dir", "x"]
    line = refused(capsys, tmp_path, *start, "--method", "retrain", "--dataset_name", other)
    assert f"{other} has the 2 classes bird, cat, the pretrained network the 3 classes {names}: expected" in line
    # The same names in another order are other classes.
    line = refused(capsys, tmp_path, *start, "--method", "sfd", "--class_names", "cat", "café", "кошка")
    assert f"{same} has the 3 classes {names}, the pretrained network the 3 classes cat, café, кошка: expected" in line
    turned = Judge.load(judge)
    turned.class_names = turned.class_names[::-1]
    turned.save(tmp_path / "turned.safetensors")
    line = refused(capsys, tmp_path, *start, "--method", "sfd", "--judge", "turned.safetensors")
    assert (
        f"judge turned.safetensors knows the 3 classes кошка, cat, café, {same} has" in line and "another order" in line
    )
    line = refused(capsys, tmp_path, *start, "--method", "sfd", "--class_names", "a", "cat")
    assert "class_names is a, cat, 2 names, but the network has 3 classes" in line
    line = refused(capsys, tmp_path, "unlearn", "--pretrained_model_name_or_path", network, "--forget_classes", "dog")
    assert f"forget_classes is 'dog', expected one of the classes {names}, or a number from 0" in line
    # Before a folder is known.
    assert "dataset_name is not given" in refused(capsys, tmp_path, "pretrain", "--preset", "images")
    assert "is not a folder" in pretrain("folder:nowhere")


def test_pictures_that_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def train(data, *words):
        command = ["train-classifier", "--preset", "images", "--dataset_name", data, "--output", "judge.safetensors"]
        return refused(capsys, tmp_path, *command, *words)

    few = write_pictures(tmp_path / "few", each=2)
    assert f"{few} has 0 images of the class 'café' to test with, expected at least 1 of every class" in train(few)
    one = write_pictures(tmp_path / "one", ("cat",))
    assert "has one class folder, 'cat', expected at least two" in train(one)
    data = write_pictures(tmp_path / "data")
    assert "resize is 64, but the small network for 8 pixels has no such option (--network resnet34 has)" in train(
        data, "--resize", "64"
    )
    # Its header is right.
    path = tmp_path / "data" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    assert f"{path} cannot be read as an image" in train(data)
    path.write_text("no image")
    assert f"{path} cannot be read as an image" in train(data)
    assert "the classifier of digits has one recipe" in refused(
        capsys, tmp_path, "train-classifier", "--preset", "digits", "--epochs", "3"
    )


def test_example_makes_pictures(tmp_path, capsys):
    pytest.importorskip("skimage")
    runpy.run_path(str(EXAMPLE / "make_pictures.py"))["main"](str(tmp_path / "pictures"), 2, 12)
    files = sorted(path.relative_to(tmp_path / "pictures") for path in tmp_path.rglob("*.png"))
    assert len(files) == 12 and {"cat", "café"} <= {path.parts[0] for path in files}
    for path in files:
        with Image.open(tmp_path / "pictures" / path) as image:
            assert image.size == (12, 12) and image.mode == "RGB" and np.array(image).std() > 5
    main(["pretrain", "--preset", "images", "--dataset_name", f"folder:{tmp_path / 'pictures'}", "--dry_run"])
    assert '"sample_size": 12' in capsys.readouterr().out
