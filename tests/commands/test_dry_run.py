"""A dry run refuses what the run would refuse, and writes nothing."""

import json

import pytest

from pecker_fast.cli import main
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.models import save_network
from tests.commands.case import QUIET, SMALL, fails
from tests.diffusion.toy import tiny_unet


def refusals() -> list[tuple[str, str]]:
    return [
        ("unlearn --forget_classes 0 0", "forget_classes is [0, 0], expected each class once"),
        ("unlearn --forget_classes 12", "forget_classes is 12, expected from 0 to 9"),
        ("unlearn --cover_class 11", "cover_class is 11, expected from 0 to 9"),
        ("unlearn --cover_class 0", "cover_class is 0, a class to forget"),
        ("unlearn --seed -1", "seed is -1, expected at least 0"),
        ("unlearn --pretrained_model_name_or_path NOWHERE", "NOWHERE': there is no such file or folder"),
        ("unlearn --initial_generator NOWHERE", "initial_generator is 'NOWHERE': there is no such"),
        ("unlearn --method sfd --distilled NOWHERE", "distilled is 'NOWHERE', expected the folder of a run"),
        ("unlearn --initial_score TINY", "initial_score is a network of another architecture"),
        ("unlearn --judge NOWHERE", "NOWHERE is not a file; expected a judge"),
        (
            "unlearn --pretrained_model_name_or_path TINY",
            "digits has the 10 classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, the pretrained network 3 classes",
        ),
        ("unlearn --dataset_name folder:NOWHERE", "NOWHERE"),
        ("unlearn --saliency_samples data --forget_data NOWHERE", "NOWHERE"),
        ("unlearn --forget_data NOWHERE", "forget_data is 'NOWHERE', but pecker does not use it here: expected --sali"),
        ("unlearn --method sfd --forget_data NOWHERE", "sfd does not use it here: expected --method salun, or no for"),
        ("unlearn --saliency_samples data", "there are no images of what is to be forgotten"),
        ("unlearn --method patch --destroy noise --destroy_share 0.7", "destroy_share is 0.7, but the mask has 0.1 of"),
        ("unlearn --destroy_strength 1", "destroy_strength is 1.0, but destroy is None, so that nothing is destroyed"),
        ("unlearn --method patch --destroy_within all", "destroy_within is 'all', but destroy is None"),
        ("unlearn --preset sd15-nudity --destroy_share 0.2", "destroy_share is 0.2, but destroy is None"),
        ("unlearn --samples_per_class 0", "samples_per_class is 0, expected at least 1"),
        ("unlearn --output_dir=", "output_dir is empty, expected the name of a folder"),
        ("unlearn --device gpu", "device is 'gpu', expected cpu, cuda, or a GPU by its number such as cuda:1"),
        ("unlearn --t_init 1000", "t_init is 1000"),
        ("unlearn --logging_steps 0", "logging_steps is 0"),
        ("unlearn --report_to wandb", "report_to is 'wandb', which is not installed"),
        ("unlearn --resume_from_checkpoint checkpoint-3", "resume_from_checkpoint is 'checkpoint-3', no such folder"),
        ("unlearn --output_dir FILE", "is a file, expected a folder"),
        ("unlearn --output_dir RUN", "already has a run"),
        ("unlearn --output_dir RUN --resume_from_checkpoint latest --density 0.1", "density is 0.5 there and 0.1 here"),
        ("unlearn --preset cifar10 --forget_classes 0 10", "forget_classes is 10, expected from 0 to 9"),
        ("unlearn --preset sd15-celebrity --pretrained_model_name_or_path NOWHERE", "NOWHERE"),
        ("unlearn --preset sd15-celebrity --method selective_amnesia", "fisher is not given"),
        ("unlearn --preset sd15-celebrity --initial_generator NOWHERE", "initial_generator is 'NOWHERE'"),
        ("unlearn --preset sd15-celebrity --seed -1", "seed is -1"),
        ("fisher --fisher NOWHERE", "this command makes the file"),
        ("distil --pretrained_model_name_or_path NOWHERE", "NOWHERE': there is no such file or folder"),
        ("distil --judge NOWHERE", "NOWHERE is not a file"),
        ("pretrain --num_classes 4", "9, the U-Net (sample_size, in_channels, num_classes) 4 classes: expected"),
        ("pretrain --judge NOWHERE", "NOWHERE is not a file"),
        ("pretrain --seed -1", "seed is -1"),
        ("pretrain --output_dir RUN", "already has a run"),
    ]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dry")
    save_network(folder / "tiny", tiny_unet(), NoiseSchedule.linear())
    (folder / "file").write_text("mine")
    main(["unlearn", "--output_dir", str(folder / "run"), *SMALL, *QUIET, "--no-evaluate"])
    names = {"NOWHERE": "nowhere", "TINY": "tiny", "FILE": "file", "RUN": "run"}
    return {word: str(folder / name) for word, name in names.items()}


@pytest.mark.parametrize(("words", "message"), refusals())
def test_refused(capsys, tmp_path, monkeypatch, places, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pecker_fast.training.tracking.find_spec", lambda name: None)
    for word, path in places.items():
        words, message = words.replace(word, path), message.replace(word, path)
    capsys.readouterr()
    small = SMALL[:6] if words.startswith("unlearn --output_dir RUN") else []
    assert message in fails(capsys, *words.split(), *small, "--dry_run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("unlearn", ""),
        ("unlearn --method patch", ""),
        (
            "unlearn --preset cifar10",
            "a run also needs pretrained_model_name_or_path: the preset cifar10 comes without",
        ),
        ("unlearn --preset cifar10 --method salun", "a run also needs pretrained_model_name_or_path"),
        ("unlearn --preset sd15-celebrity --method esd", "a run also needs pretrained_model_name_or_path"),
        pytest.param(
            "unlearn --preset sd15-celebrity --initial_generator owner/model/unet.safetensors",
            "a run also needs pretrained_model_name_or_path",
            marks=pytest.mark.slow,
        ),
        ("distil", ""),
        ("distil --preset mnist --pretrained_model_name_or_path TINY --no-evaluate", ""),
        ("pretrain", ""),
        ("pretrain --preset cifar10", "a run also needs data_root, the folder with the files of cifar10"),
    ],
)
def test_accepted(capsys, tmp_path, monkeypatch, places, words, note):
    """What the run lacks is named on stderr; stdout has the configuration alone."""
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    main([*words.replace("TINY", places["TINY"]).split(), "--dry_run"])
    captured = capsys.readouterr()
    assert json.loads(captured.out.partition("\nmemory")[0])["seed"] == 0
    assert captured.err.count("\n") == bool(note) and note in captured.err
    assert list(tmp_path.iterdir()) == []
