"""The classifier of photographs: training, files, and use as a judge."""

import pytest
import torch
import torchvision

from pecker_fast.cli import main
from pecker_fast.data import LabelledImages
from pecker_fast.metrics import Judge, ResNetClassifier, train_resnet
from tests.commands.case import fails, image_folder

SMALL = {"layers": (1, 1, 1, 1), "resize": 32, "progress": False, "batch_size": 8}


def coloured(count: int, seed: int) -> LabelledImages:
    """Two classes: mostly red and mostly blue."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.randn(count, 3, 16, 16, generator=generator)
    images[labels == 0, 0] += 0.6
    images[labels == 1, 2] += 0.6
    return LabelledImages(images.clamp(-1, 1), labels, ("red", "blue"))


def test_training_learns_and_is_deterministic():
    train, test = coloured(48, 0), coloured(20, 1)
    model, accuracies = train_resnet(train, test, epochs=3, **SMALL)
    assert len(accuracies) == 2 and min(accuracies) > 0.9
    assert not model.training and model.config["image_size"] == 16
    again, _ = train_resnet(train, test, epochs=3, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_training_from_imagenet_weights(tmp_path):
    body = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    torch.save(body.state_dict(), tmp_path / "resnet.pth")
    options = {**SMALL, "imagenet_weights": tmp_path / "resnet.pth", "epochs": 1}
    model, _ = train_resnet(coloured(8, 0), coloured(4, 1), **options)
    # Adam changes an entry by at most its rate in one step.
    moved = (model.body.conv1.weight - body.conv1.weight).abs().max()
    assert 0 < moved <= 1.1e-5
    for content in (b"", b"nonsense" * 9):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(ValueError, match="not a ResNet-34's"):
            train_resnet(coloured(8, 0), coloured(4, 1), **{**options, "imagenet_weights": tmp_path / "bad.pth"})
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="not a ResNet-34's"):
        train_resnet(coloured(8, 0), coloured(4, 1), **{**options, "imagenet_weights": tmp_path / "bad.pth"})
    with pytest.raises(ValueError, match="no such file"):
        train_resnet(coloured(8, 0), coloured(4, 1), **{**options, "imagenet_weights": tmp_path / "nowhere"})


def test_judge_from_a_file(tmp_path):
    model = ResNetClassifier(2, image_size=16, resize=32, layers=(1, 1, 1, 1)).eval()
    judge = Judge(model, ("a", "b"), name="photographs", accuracy=0.5)
    judge.save(tmp_path / "judge.safetensors")
    again = Judge.load(tmp_path / "judge.safetensors")
    images = torch.rand(70, 3, 16, 16) * 2 - 1
    for one, two in zip(judge(images), again(images), strict=True):
        assert torch.equal(one, two)
    assert again.feature_extractor == "photographs-512" and again(images)[1].shape == (70, 512)


def test_invalid_arguments():
    train, test = coloured(8, 0), coloured(4, 1)
    for options, message in (
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"resize": 4}, "resize is 4"),
    ):
        with pytest.raises(ValueError, match=message):
            train_resnet(train, test, **{**SMALL, **options})
    grey = LabelledImages(torch.zeros(4, 1, 16, 16), torch.arange(4) % 2, ("red", "blue"))
    with pytest.raises(ValueError, match="channels is 1"):
        train_resnet(grey, grey, **SMALL)


def test_command_line(capsys, tmp_path):
    data = image_folder(tmp_path / "data", classes=2, each=6)
    target = tmp_path / "judge.safetensors"
    words = ["train-classifier", "--preset-name", "cifar10", "--dataset-name", f"folder:{data}", "--no-progress-bar"]
    main([*words, "--epochs", "1", "--resize", "32", "--batch-size", "4", "--output", str(target)])
    output = capsys.readouterr().out
    assert "class0" in output and str(target) in output
    judge = Judge.load(target)
    assert judge.class_names == ("class0", "class1") and judge.recipe["imagenet"] is False
    assert judge.recipe["train_images"] + judge.recipe["test_images"] == 12
    assert "epochs" in fails(capsys, *words, "--epochs", "0", "--output", str(target))
    assert "no folder" in fails(capsys, *words, "--output", str(tmp_path / "no" / "judge.safetensors"))
    assert "data_root" in fails(capsys, "train-classifier")
    assert "resnet34-b627a593" in fails(capsys, *words, "--imagenet-weights", str(tmp_path / "nowhere"))
