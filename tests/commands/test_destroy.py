"""unlearn --destroy on the command line: its help, its dry run, a run and its report, and a resumed run."""

import json
import shutil

import pytest
import torch

from pecker_fast.cli import main
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.models import save_network
from pecker_fast.records import read_lines
from pecker_fast.report.words import destroyed
from tests.commands.case import QUIET, SMALL, fails
from tests.diffusion.toy import tiny_unet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DESTROY = ["--destroy", "noise", "--destroy_share", "0.05", "--destroy_strength", "2.0"]


@pytest.fixture
def words(tmp_path):
    torch.manual_seed(0)
    save_network(tmp_path / "net", tiny_unet(num_classes=10, attention_resolutions=()), NoiseSchedule.linear())
    net = ["--pretrained_model_name_or_path", str(tmp_path / "net"), "--no-evaluate", *SMALL, *QUIET]
    start = ["--initial_generator", str(tmp_path / "net"), "--initial_score", str(tmp_path / "net")]
    return ["unlearn", "--method", "patch", *net, *start, "--saliency_chunks", "2", "--checkpointing_steps", "2"]


def test_run_resumes_bit_for_bit_and_says_what_it_destroyed(words, tmp_path):
    whole, again, plain = (tmp_path / name for name in ("whole", "again", "plain"))
    main([*words, *DESTROY, "--logging_steps", "1", "--output_dir", str(whole)])
    options = json.loads((whole / "config.json").read_text())["options"]
    assert (options["destroy"], options["destroy_share"], options["destroy_within"]) == ("noise", 0.05, "mask")
    for name in ("report.md", "README.md"):
        text = (whole / name).read_text()
        assert "5.0% of the generator's weights, named by the score ratio, are destroyed (noise, strength 2)" in text
    lines = read_lines(whole / "train.jsonl")
    assert [line["destroyed"] for line in lines] == [pytest.approx(0.05, abs=1e-3)] * 4
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "checkpoint-4")
    main([*words, *DESTROY, "--output_dir", str(again), "--resume_from_checkpoint", "latest"])
    assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    main([*words, "--output_dir", str(plain)])
    assert (plain / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()
    assert "destroyed" not in (plain / "report.md").read_text().partition("Configuration")[0]


def test_help_and_dry_run(words, capsys):
    main([*words, *DESTROY, "--dry_run"])
    assert json.loads(capsys.readouterr().out)["options"]["destroy_strength"] == 2.0
    with pytest.raises(SystemExit):
        main(["unlearn", "--method", "sfd", "--help_all"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("destroy", "destroy_share", "destroy_strength", "destroy_score", "destroy_within", "destroy_dense"):
        assert f"--{name} " in text.replace("│", " ") or f"--{name}," in text, name


def test_wrong_input_is_one_line_and_leaves_nothing(words, capsys, tmp_path):
    out = ["--output_dir", str(tmp_path / "run")]
    for wrong, message in (
        (["--destroy", "forget"], "destroy"),
        (["--destroy", "shrink", "--destroy_strength", "2"], "destroy_strength is 2.0, expected a number above 0"),
        (["--destroy", "noise", "--destroy_share", "0.5"], "destroy_share is 0.5, but the mask has 0.1"),
        (["--destroy", "noise", "--destroy_share", "-1"], "destroy_share is -1.0"),
        # Unused options are refused although they are set to their defaults.
        (["--destroy_share", "0.1"], "destroy_share is 0.1, but destroy is None, so that nothing is destroyed"),
        (["--destroy", "None", "--no-destroy_dense"], "destroy_dense is False, but destroy is None"),
    ):
        assert message in fails(capsys, *words, *wrong, *out)
    assert not (tmp_path / "run").exists()


def test_sentences():
    options = {"destroy": "reset", "destroy_share": 0.2, "destroy_strength": 1.0, "destroy_score": "random"}
    options |= {"destroy_within": "all", "destroy_dense": False}
    assert destroyed({"options": {"destroy": None}}) == destroyed({}) == destroyed({"options": {}}) == ""
    words = "20.0% of the generator's weights, named by the score random"
    assert destroyed({"method": "sfd", "options": options}).endswith(f"{words}, are destroyed (reset, strength 1).")
    assert "whether or not they are in the mask" in destroyed({"method": "patch", "options": options})
    dense = destroyed({"method": "sfd", "options": {**options, "destroy_dense": True}})
    assert dense.startswith(" Before that, noise is added to all weights, as large together as destroying 20.0%")
