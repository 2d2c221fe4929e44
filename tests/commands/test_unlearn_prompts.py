"""``pecker-fast unlearn`` on a small Stable Diffusion, from the command line."""

import json
import shutil

import pytest
import torch

from pecker_fast import SaliencyMask
from pecker_fast.cli import main
from pecker_fast.hashing import weights_hash
from pecker_fast.models import StableDiffusion, resolve_text
from pecker_fast.runs.audit import changed_files
from pecker_fast.runs.presets import method_options, prompt_preset
from pecker_fast.runs.prompts.request import PromptRequestArguments, resolve_prompts
from pecker_fast.unlearning import method_class
from tests.diffusion.tiny_sd import write_stable_diffusion
from tests.inputs import same_bits

SMALL = ["--max_train_steps", "4", "--no-progress_bar", "--device", "cpu"]
SMALL += ["--checkpointing_steps", "2", "--validation_steps", "2", "--logging_steps", "1", "--sample_steps", "2"]
SMALL += ["--samples_per_prompt", "1", "--gradient_accumulation_steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Attention on the way down and in the middle.
    blocks = {"up_block_types": ("UpBlock2D", "UpBlock2D")}
    return write_stable_diffusion(tmp_path_factory.mktemp("sd") / "model", "v_prediction", **blocks)


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "retain.txt").write_text("a dog\na cat\na tree\n")
    (folder / "forget.txt").write_text("a photo of {concept}\n{concept} smiles\n")
    return folder


def command(model, lists, folder, *more: str, preset: str = "sd15-celebrity", method: str = "pecker") -> list[str]:
    words = ["unlearn", "--preset", preset, "--method", method, "--pretrained_model_name_or_path", str(model)]
    words += ["--output_dir", str(folder), "--retain_prompts", str(lists / "retain.txt"), *SMALL]
    words += ["--saliency_batches", "2"] if method not in ("sfd", "patch") else []
    return [*words, *more]


def weights(folder) -> list[torch.Tensor]:
    return list(StableDiffusion(folder).load_unet().parameters())


@pytest.fixture(scope="module")
def run(model, lists, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "celebrity"
    main(
        command(
            model,
            lists,
            folder,
            "--forget_prompts",
            str(lists / "forget.txt"),
            "--concept",
            "Brad Pitt",
            "--cover",
            "a middle aged man",
            "--max_train_steps",
            "4",
        )
    )
    return folder


def test_run_writes_pipeline_pictures_and_report(run, model):
    from diffusers import DiffusionPipeline

    config = json.loads((run / "config.json").read_text())
    assert config["concept"] == "Brad Pitt" and config["cover"] == "a middle aged man" and config["task"] == "celebrity"
    assert config["prompts"]["forget"] == ["a photo of Brad Pitt", "Brad Pitt smiles"]
    assert config["prompts"]["cover"] == ["a photo of a middle aged man", "a middle aged man smiles"]
    metrics = json.loads((run / "metrics.json").read_text())
    # Four iterations of two micro-batches of two.
    assert metrics["parameters_trained"] == 100
    assert metrics["images"] == 16 and metrics["iterations"] == 4 and metrics["sampler"] == "one_step"
    for name in ("before", "after", "before_after", "step-000002", "step-000004"):
        assert (run / "samples" / f"{name}.png").is_file(), name
    assert "Brad Pitt" in (run / "report.md").read_text()
    card = (run / "README.md").read_text()
    assert "text-to-image" in card and "Brad Pitt" in card and "prompts.safetensors" not in card
    # Paths of this machine mean nothing to the card's readers.
    assert f"U-Net of {model.name} after" in card and str(model) not in card + (run / "report.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(run, custom_pipeline=str(run), trust_remote_code=True)
    assert pipe.config.t_init == 625 and len(pipe("a dog").images) == 1
    moved = [not torch.equal(a, b) for a, b in zip(weights(run), weights(model), strict=True)]
    assert sum(moved) > len(moved) / 2
    log = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4] and log[-1]["mask_density"] == pytest.approx(0.5, abs=0.01)


def drift_of(changed, start) -> tuple[float, float]:
    """Relative 2-norm of the difference in float64, and the share of entries that differ."""
    a, b = (torch.cat([p.detach().double().flatten() for p in params]) for params in (changed, start))
    return ((a - b).norm() / b.norm()).item(), (a != b).double().mean().item()


def test_run_writes_drift_and_mask(run, model, capsys):
    metrics, drift = (json.loads((run / f"{name}.json").read_text()) for name in ("metrics", "drift"))
    # Not from the teacher, which is rounded to bfloat16.
    norm, changed = drift_of(weights(run), weights(model))
    assert 0 < norm < 1e-3 and changed > 0.5
    assert drift["total"]["drift"] == metrics["drift_norm"] == pytest.approx(norm, rel=1e-9)
    assert metrics["parameters_changed"] == 100 * drift["total"]["changed"] == pytest.approx(100 * changed, rel=1e-12)
    assert set(drift["modules"]) >= {"conv_in", "mid_block", "down_blocks.0", "up_blocks.1"}
    unet = StableDiffusion(run).load_unet()
    assert metrics["weights_sha256"] == weights_hash(unet)
    mask = SaliencyMask.load(run / "mask.safetensors")
    assert mask.names == tuple(name for name, _ in unet.named_parameters())
    log = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert mask.density == pytest.approx(log[-1]["mask_density"]) == pytest.approx(drift["total"]["salient"])
    assert {"drift.json", "mask.safetensors", "model_index.json"} <= set(json.loads((run / "hashes.json").read_text()))
    card = (run / "README.md").read_bytes()
    main(["report", str(run)])
    assert "changed since" not in capsys.readouterr().out and (run / "README.md").read_bytes() == card
    report = (run / "report.md").read_text()
    for text in (
        f"{norm:.3g}",
        "salient, last mask",
        "“a photo of a middle aged man”",
        "transformer_blocks.0.attn2.to_k",
    ):
        assert text in report, text
    assert "no mask" not in report.lower() and "drift.json is missing" not in report


def test_evaluate_accepts_a_prompt_run(run, tmp_path, capsys):
    """``evaluate`` recognises the kind of run, and updates its figures, report and hashes."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    assert "have not been measured" in (folder / "report.md").read_text()
    for name, lines in {"eval": "one\ntwo\n", "near": "a coat\n"}.items():
        (tmp_path / f"{name}.txt").write_text(lines)
    options = ["--task", "nudity", "--no-nudenet", "--prompts", str(tmp_path / "eval.txt"), "--images-per-prompt", "1"]
    options += ["--near", str(tmp_path / "near.txt"), "--near-images-per-prompt", "1", "--no-progress-bar"]
    main(["evaluate", str(folder), *options])
    assert "no detector is given" in capsys.readouterr().err
    before, metrics = (json.loads((place / "metrics.json").read_text()) for place in (run, folder))
    assert {key: metrics[key] for key in before} == before and metrics["measured_images"] == 2
    assert changed_files(folder) == []
    assert "have not been measured" not in (folder / "report.md").read_text()
    protocol = metrics["protocol"]["concept"]
    assert protocol["samples"]["sampler"] == "one_step" and "measured_images" in protocol["measured"]
    # Measured again, the new figures replace the old ones; also those of versions that did not list them.
    del metrics["protocol"]["concept"]["measured"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    main(["evaluate-concept", str(folder), *options, "--images-per-prompt", "2"])
    assert json.loads((folder / "metrics.json").read_text())["measured_images"] == 4


def test_resumed_run_has_the_same_bits(run, model, lists, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    shutil.rmtree(folder / "unet")
    # The embeddings exist, so the text encoder is not called again.
    monkeypatch.setattr(StableDiffusion, "encode", lambda *_: pytest.fail("prompts were encoded again"))
    more = ["--forget_prompts", str(lists / "forget.txt"), "--concept", "Brad Pitt", "--cover", "a middle aged man"]
    main(command(model, lists, folder, *more, "--resume_from_checkpoint", "latest"))
    assert all(same_bits(a, b) for a, b in zip(weights(run), weights(folder), strict=True))
    # Another request is another run.
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        main(command(model, lists, folder, *more[:-1], "a man", "--resume_from_checkpoint", "latest"))


@pytest.mark.parametrize("method", ["sfd", "pecker+"])
def test_nudity_and_low_precision(model, lists, tmp_path, method):
    from diffusers import DiffusionPipeline

    folder = tmp_path / "run"
    start = tmp_path / "unet"
    shutil.copytree(model / "unet", start)
    more = ["--weights_dtype", "bfloat16", "--resolution", "32", "--max_train_steps", "1", "--train_batch_size", "1"]
    more += ["--initial_generator", str(start), "--ema_decay", "0.5", "--nonfinite", "zero"]
    main(command(model, lists, folder, *more, preset="sd15-nudity", method=method))
    config = json.loads((folder / "config.json").read_text())
    assert config["concept"] is None and config["options"]["negative_roles"] == [True, True, True]
    assert config["prompts"]["negative"].startswith("nude") and len(config["prompts"]["forget"]) == 12 * 27 * 2
    assert config["initial_generator_sha256"] == config["pretrained_sha256"]
    drift = json.loads((folder / "drift.json").read_text())["total"]
    assert drift["drift"] == pytest.approx(drift_of(weights(folder), weights(model))[0], rel=1e-9)
    assert (folder / "mask.safetensors").is_file() == (method == "pecker+") == ("salient" in drift)
    assert all(
        text in forgotten
        for forgotten, text in zip(config["prompts"]["forget"], config["prompts"]["cover"], strict=True)
    )
    assert next(iter(weights(folder))).dtype == torch.float32
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert pipe("a dog", output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_sharing_weights_changes_nothing(model, run, lists, tmp_path, capsys):
    options = ["--concept", "Brad Pitt", "--initial_generator", str(run), "--saliency_chunks", "2"]
    options += ["--density", "0.1", "--score_density", "0.1", "--weights_dtype", "bfloat16", "--master_weights"]
    small = ["--share_weights", "--saliency_parts", "3"]
    folders = {}
    for name, more in (("separate", []), ("shared", small)):
        main([*command(model, lists, tmp_path / name, method="patch"), *options, "--max_train_steps", "2", *more])
        folders[name] = tmp_path / name
    one, two = folders.values()
    assert all(same_bits(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    masks = [SaliencyMask.load(folder / "mask.safetensors") for folder in (one, two)]
    assert torch.equal(masks[0].words, masks[1].words) and masks[0].threshold == masks[1].threshold
    logs = [[json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()] for folder in (one, two)]
    assert [{**line, "seconds": 0} for line in logs[0]] == [{**line, "seconds": 0} for line in logs[1]]
    pictures = [folder / "samples" / "before_after.png" for folder in (one, two)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    # Goes on from the other's checkpoint: how weights are kept is no part of what a run is.
    shutil.copytree(two / "checkpoints", tmp_path / "again" / "checkpoints")
    words = [*command(model, lists, tmp_path / "again", method="patch"), *options, "--max_train_steps", "2"]
    main([*words, "--resume_from_checkpoint", "checkpoint-2"])
    assert all(same_bits(a, b) for a, b in zip(weights(one), weights(tmp_path / "again"), strict=True))
    capsys.readouterr()
    main([*command(model, lists, tmp_path / "none", method="patch"), *options, *small, "--dry_run"])
    output = capsys.readouterr().out
    assert "packed gradients and entries" in output and "score network's saliency gradient" in output


def test_dry_run_estimates_memory(model, lists, tmp_path, capsys):
    main(command(model, lists, tmp_path / "none", "--gradient_accumulation_steps", "1", "--dry_run"))
    output = capsys.readouterr().out
    assert "most at a time" in output and str(model) in output and not (tmp_path / "none").exists()


def test_names_on_the_hub(model, monkeypatch):
    import huggingface_hub

    downloads = []

    def fetch(name, allow_patterns, revision=None):
        downloads.append((name, allow_patterns, revision))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    result = resolve_text("someone/tiny-sd")
    assert result.parts.folder == model and result.source == "hub:someone/tiny-sd"
    # Its configuration is fetched first, then its weights only, from the same commit.
    (first, configs, none), (second, files, commit) = downloads
    assert first == second == "someone/tiny-sd" and none is None and commit == model.name
    assert not any("safetensors" in name for name in configs) and all(name.endswith(".safetensors") for name in files)

    def missing(name, **options):
        raise OSError("not in the cache\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ValueError, match=r"'someone/other'.*no such model.*not in the cache$"):
        resolve_text("someone/other")
    for name, message in (
        (None, "is not given"),
        ("/no/such/folder", "no such folder"),
        ("a/b.ckpt", "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_text(name)


def test_published_constants():
    for preset, negative in (("sd15-celebrity", (False, False, True)), ("sd15-nudity", (True, True, True))):
        options = method_options(preset, method_class("pecker"))
        assert options.train_batch_size * options.gradient_accumulation_steps == 8
        assert options.max_train_steps * 8 == 100_000 and options.negative_roles == negative
        assert (options.t_init, options.t_min, options.t_max, options.alpha) == (625, 20, 979, 1.0)
        assert options.guidance_scales == (4.5, 4.5, 4.5) and options.condition_dropout == 0.1
        assert (options.score_learning_rate, options.generator_learning_rate) == (3e-6, 1e-6)
        assert options.ema_decay is None and (options.adam_beta1, options.adam_beta2) == (0.0, 0.999)
        assert options.score_forget_weight == options.generator_forget_weight == 1.0
    assert method_options("sd15-nudity", method_class("sfd")).max_train_steps * 8 == 300_000
    assert prompt_preset("sd15-celebrity").cover == "a middle aged man"


def resolved(lists, preset: str = "sd15-celebrity", **options):
    args = PromptRequestArguments(**{"retain_prompts": str(lists / "retain.txt"), **options})
    return resolve_prompts(args, prompt_preset(preset), 0)


def test_prompts_of_requests(lists, tmp_path):
    default = resolved(lists)
    assert len(default.request.forget) >= 50 and all("brad pitt" in p for p in default.request.forget)
    assert all("a middle aged man" in p and "brad" not in p for p in default.request.cover)
    assert default.forgotten == 4 and len(default.pictured) == 7 and default.request.negative is None
    other = resolved(lists, concept="angelina jolie")
    assert other.cover == "a middle aged woman" and other.request.cover[0].endswith("a middle aged woman")
    own, cover = tmp_path / "own.txt", tmp_path / "cover.txt"
    own.write_text("my secret\nanother one\n")
    cover.write_text("a box\na bag\n")
    result = resolved(lists, forget_prompts=str(own), cover_prompts=str(cover), negative_prompt="secret")
    assert result.request.forget == ("my secret", "another one") and result.request.cover == ("a box", "a bag")
    assert result.concept is None and result.request.negative == "secret"
    few = resolved(lists, max_retain_prompts=2)
    assert len(few.request.retain) == 2 and few == resolved(lists, max_retain_prompts=2)
    samples = tmp_path / "samples.txt"
    samples.write_text("a hat\n{concept} in the rain\n")
    result = resolved(lists, sample_prompts=str(samples))
    assert result.pictured == ("brad pitt in the rain", "a hat") and result.forgotten == 1
    assert set(result.pictured) <= set(result.request.prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concept": "somebody nobody knows"}, "cover is not given"),
        ({"cover_prompts": "x"}, "cover_prompts is given without"),
        ({"retain_prompts": "/no/such/file"}, "no prompt file"),
        ({"max_retain_prompts": 0}, "max_retain_prompts is 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
    ],
)
def test_wrong_requests(lists, options, message):
    with pytest.raises(ValueError, match=message):
        resolved(lists, **options)


def test_retained_prompts_must_not_be_forgotten(lists, tmp_path):
    both = tmp_path / "both.txt"
    both.write_text("a dog named brad pitt\na cat\n")
    forget = tmp_path / "forget.txt"
    forget.write_text("a dog named brad pitt\n")
    with pytest.raises(ValueError, match="are both to keep and to forget"):
        resolved(lists, retain_prompts=str(both), forget_prompts=str(forget), concept="brad pitt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pretrained_model_name_or_path", "/no/such"], "no such folder"),
        (["--master_weights"], "master_weights is set"),
        (["--t_init", "1000"], "t_init is 1000"),
        (["--resolution", "30"], "resolution is 30"),
        (["--initial_score", "/no/such"], "initial_score is '/no/such'"),
    ],
)
def test_wrong_arguments_end_with_one_line(model, lists, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(command(model, lists, tmp_path / "run", *words))
    assert stop.value.code == 2 and message in capsys.readouterr().err
