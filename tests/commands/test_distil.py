"""distil, and unlearning that starts from its result, on the command line."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import pecker_fast as pf
from pecker_fast.cli import main
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.diffusion.sampling import _Noise
from pecker_fast.hashing import weights_hash
from pecker_fast.models import resolve, resolve_text_unet, save_network
from pecker_fast.runs.audit import changed_files
from pecker_fast.runs.classes.comparison import ClassComparison
from pecker_fast.runs.distilled import distil_arguments, distillation_for, with_distilled
from pecker_fast.runs.presets import class_preset
from pecker_fast.runs.several import ended
from pecker_fast.runs.task import unlearn_arguments
from pecker_fast.unlearning.sfd import SFD
from tests.commands.case import QUIET, SMALL, fails
from tests.diffusion.tiny_sd import write_stable_diffusion
from tests.diffusion.toy import tiny_unet

FILE = "diffusion_pytorch_model.safetensors"
SHORT = ["--max_train_steps", "4", "--train_batch_size", "4", "--samples_per_class", "3", "--checkpointing_steps", "2"]


def network(folder, seed: int):
    torch.manual_seed(seed)
    save_network(folder, tiny_unet(num_classes=10, attention_resolutions=()), NoiseSchedule.linear())
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two networks, and the first one distilled."""
    folder = tmp_path_factory.mktemp("distil")
    network(folder / "net", 0), network(folder / "other", 1)
    main(["distil", *words(folder), "--output_dir", str(folder / "distilled")])
    return folder


def words(place) -> list[str]:
    words = ["--pretrained_model_name_or_path", str(place / "net"), "--t_init", "300", "--save_dtype", "float16"]
    return [*words, *SHORT, *QUIET]


def unlearn(place, folder, *more: str, method: str = "sfd", net: str = "net") -> list[str]:
    words = ["unlearn", "--method", method, "--pretrained_model_name_or_path", str(place / net)]
    return [*words, "--output_dir", str(folder), "--no-evaluate", *(SMALL if method == "sfd" else []), *QUIET, *more]


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_distil_writes_generator_and_score_network(place):
    folder = place / "distilled"
    run = pf.Run(folder)
    assert run.config["method"] == "distil" and run.config["forget_classes"] == [] and run.config["cover_class"] is None
    base, generator, score = (resolve(path).network for path in (place / "net", folder, folder / "score"))
    assert run.config["pretrained_sha256"] == weights_hash(base)
    # The files hold the measured weights, and the report describes them.
    for path, loaded in ((folder / "unet", generator), (folder / "score", score)):
        saved = safetensors.torch.load_file(path / FILE)
        assert {value.dtype for value in saved.values()} == {torch.float16}
        assert all(torch.equal(saved[name].float(), value) for name, value in loaded.state_dict().items())
    assert run.metrics["weights_sha256"] == weights_hash(generator)
    assert run.metrics["score_sha256"] == weights_hash(score)
    for other in (base, score):
        assert not torch.equal(generator.conv_in.weight, other.conv_in.weight)
    accuracy, worst = run.metrics["retain_accuracy"], run.metrics["worst_retained_accuracy"]
    assert 0 <= worst <= accuracy <= 100 and run.metrics["frechet_distance"] > 0
    assert run.metrics["ua"] is None and run.metrics["before_forget_accuracy"] is None
    assert changed_files(folder) == [] and {"score/" + FILE, "unet/" + FILE} <= set(
        json.loads((folder / "hashes.json").read_text())
    )
    report, card = (folder / "report.md").read_text(), (folder / "README.md").read_text()
    assert "Nothing is forgotten" in report and "forget class" not in report and "unlearned" not in card
    assert len(run.pipeline([0, 1]).images) == 2 and run.model.sampler().t_init == 300


def test_distil_resumes_bit_for_bit(place, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(place / "distilled", folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    for name in ("unet", "score"):
        shutil.rmtree(folder / name)
    main(["distil", *words(place), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
    for name in ("unet", "score"):
        files = [run / name / FILE for run in (folder, place / "distilled")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_unlearning_starts_from_the_distilled_networks(place, tmp_path):
    distilled = pf.Run(place / "distilled")
    main(unlearn(place, tmp_path / "run", "--distilled", str(distilled.folder)))
    recorded = config(tmp_path / "run")
    assert recorded["distilled"] == str(distilled.folder) and recorded["options"]["t_init"] == 300
    assert recorded["initial_generator_sha256"] == distilled.metrics["weights_sha256"]
    assert recorded["initial_score_sha256"] == distilled.metrics["score_sha256"]
    assert recorded["pretrained_sha256"] == distilled.config["pretrained_sha256"]
    assert "distilled" in (tmp_path / "run" / "report.md").read_text()
    small = {"max_train_steps": 4, "train_batch_size": 3, "forget_batch_size": 2, "samples_per_class": 3}
    options = {
        **small,
        "evaluate": False,
        "progress_bar": False,
        "preset": "digits",
        "output_dir": str(tmp_path / "python"),
    }
    run = pf.unlearn(place / "net", "sfd", forget=0, cover=1, distilled=distilled, **options)
    assert run.metrics["weights_sha256"] == pf.Run(tmp_path / "run").metrics["weights_sha256"]
    assert run.config["distilled"] == recorded["distilled"]
    # Its patch is of the generator in float32, as the run read it.
    patch = pf.make_patch(run, output=tmp_path / "patch.safetensors")
    assert (patch.base, patch.result) == (distilled.metrics["weights_sha256"], run.metrics["weights_sha256"])
    assert patch.metadata["base_model"] == "distilled" and patch.metadata["sampler"]["t_init"] == 300


def test_relabel_edits_the_generator_or_the_network(place, tmp_path):
    more = ["--num_inference_steps", "3"]
    main(unlearn(place, tmp_path / "one", *more, "--distilled", str(place / "distilled"), method="relabel"))
    main(unlearn(place, tmp_path / "many", *more, method="relabel"))
    for name, start, sampler in (("one", "distilled", "one_step"), ("many", "net", "ddim")):
        run = pf.Run(tmp_path / name)
        before, after = (resolve(folder) for folder in (place / start, run.folder))
        assert run.metrics["sampler"] == sampler and run.metrics["images"] == 0
        labels = torch.arange(10)
        draw = run.model.sampler().draw
        old, new = (draw(model.network, model.schedule, labels, 7) for model in (before, after))
        # Retained images are the same bits; class 0 is drawn as class 1 from the same noise.
        assert torch.equal(old[1:], new[1:]) and not torch.equal(old[0], new[0])
        covered = draw(before.network, before.schedule, [1], 7)
        torch.testing.assert_close(draw(after.network, after.schedule, [0], 7), covered)
        # The folder holds a pipeline that draws the same images, and its card says how.
        noise = _Noise(7, (1, 8, 8)).start(10)
        images = run.pipeline(labels, latents=noise, output_type="pt").images
        torch.testing.assert_close(images, (new + 1) / 2, rtol=0, atol=1e-5)
        card = (run.folder / "README.md").read_text()
        assert ("draws in one step" if name == "one" else "draws in 3 steps") in card and "custom_pipeline" in card
        row = before.network.class_embedding.weight.shape[1]
        parameters = sum(param.numel() for param in before.network.parameters())
        assert 0 < run.metrics["parameters_changed"] <= 100 * row / parameters


def test_method_without_generator_distils_first(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SFD, "needs_distilled", True)
    short = {"max_train_steps": 4, "train_batch_size": 4, "checkpointing_steps": 2}
    monkeypatch.setitem(class_preset("digits").methods, "distil", short)
    shutil.copytree(place / "net", tmp_path / "net")
    # A wrong request is refused before the distillation starts.
    assert "forget_classes is 12" in fails(capsys, *unlearn(tmp_path, tmp_path / "run", "--forget_classes", "12"))
    assert not (tmp_path / "net" / "distilled").exists()
    # What is set for the run is no option of the distillation, which destroys nothing.
    more = ["--destroy", "noise", "--destroy_share", "0.1", "--destroy_score", "magnitude"]
    main(unlearn(tmp_path, tmp_path / "run", *more, "--dry_run"))
    main(unlearn(tmp_path, tmp_path / "run", *more))
    folder = tmp_path / "net" / "distilled"
    output = capsys.readouterr().out
    assert "sfd starts from a distilled generator, and there is none of this network yet: 4 iter" in output
    assert config(tmp_path / "run")["distilled"] == str(folder) and config(folder)["seed"] == 0
    assert pf.Run(folder).metrics["iterations"] == 4
    # The next run uses it, because the distillation is recorded as finished.
    written = (folder / "metrics.json").read_bytes()
    main(unlearn(tmp_path, tmp_path / "second", "--seed", "1"))
    assert "none of this network" not in capsys.readouterr().out and (folder / "metrics.json").read_bytes() == written
    options = {"pretrained_model_name_or_path": str(tmp_path / "net"), "output_dir": str(tmp_path / "second")}
    options |= {"max_train_steps": 4, "train_batch_size": 3, "forget_batch_size": 2, "samples_per_class": 3, "seed": 1}
    assert ended(unlearn_arguments("digits", "sfd", options))
    with pytest.raises(ValueError, match="another options, distilled"):
        ended(unlearn_arguments("digits", "sfd", {**options, "distilled": str(place / "distilled"), "t_init": 250}))
    # An interrupted one is completed.
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    main(unlearn(tmp_path, tmp_path / "third"))
    assert pf.Run(folder).metrics["weights_sha256"] == json.loads(written)["weights_sha256"]
    # The user's own generator is enough.
    main(unlearn(place, tmp_path / "own", "--initial_generator", str(place / "distilled")))
    assert "none of this network" in (capsys.readouterr().out) or not (place / "net" / "distilled").exists()


def test_wrong_inputs(place, tmp_path, capsys):
    distilled, output = str(place / "distilled"), tmp_path / "run"
    assert "t_init is 280, but" in fails(capsys, *unlearn(place, output, "--distilled", distilled, "--t_init", "280"))
    error = fails(capsys, *unlearn(place, output, "--distilled", distilled, net="other"))
    assert "distilled of another network (sha256" in error and "pecker-fast distil makes it of this one" in error
    error = fails(capsys, *unlearn(place, output, "--distilled", distilled, "--initial_score", distilled))
    assert "initial_score is given as well: expected one of the two" in error
    error = fails(capsys, *unlearn(place, output, "--distilled", distilled, method="esd"))
    assert "esd starts from the pretrained network" in error
    for folder in (place / "net", tmp_path / "nowhere"):
        error = fails(capsys, *unlearn(place, output, "--distilled", str(folder)))
        assert "expected the folder of a run of distillation (pecker-fast distil makes it)" in error
    shutil.copytree(place / "distilled", tmp_path / "half", ignore=shutil.ignore_patterns("metrics.json"))
    half = str(tmp_path / "half")
    assert "has not ended: continue it with pecker-fast distil" in fails(
        capsys, *unlearn(place, output, "--distilled", half)
    )
    assert "pecker-fast distil is its command" in fails(capsys, "unlearn", "--method", "distil")
    assert "pecker-fast unlearn is its command" in fails(capsys, "distil", "--method", "pecker")
    assert "t_init is 300, but there is no one-step generator" in fails(
        capsys, *unlearn(place, output, "--t_init", "300", method="relabel")
    )
    for option in ("generator_forget_weight", "regression_weight"):
        assert f"{option} is 0.1, expected 0" in fails(capsys, "distil", *words(place), f"--{option}", "0.1")
    assert "already has a run" in fails(capsys, "distil", *words(place), "--output_dir", distilled)
    assert not output.exists()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_stable_diffusion(folder / "sd", "v_prediction")
    (folder / "retain.txt").write_text("a dog\na cat\n")
    return folder


TEXT = ["--max_train_steps", "2", "--train_batch_size", "1", "--gradient_accumulation_steps", "1", "--device", "cpu"]
TEXT += ["--sample_steps", "1", "--samples_per_prompt", "1", *QUIET]


def test_a_text_to_image_model(text, tmp_path, capsys):
    shared = ["--preset", "sd15-celebrity", "--pretrained_model_name_or_path", str(text / "sd"), *TEXT]
    shared += ["--retain_prompts", str(text / "retain.txt")]
    # Before anything is written.
    error = fails(capsys, "unlearn", "--method", "salun", *shared[:4], "--output_dir", str(tmp_path / "salun"))
    assert "forgets classes of a class-conditional network, not prompts: expected one of esd, patch" in error
    assert not any(tmp_path.iterdir())
    folder = tmp_path / "distilled"
    main(["distil", *shared, "--save_dtype", "bfloat16", "--output_dir", str(folder)])
    run = pf.Run(folder)
    assert run.metrics["score_sha256"] == weights_hash(resolve_text_unet(folder / "score"))
    assert run.metrics["weights_sha256"] == weights_hash(resolve_text_unet(folder))
    for name in ("unet", "score"):
        saved = safetensors.torch.load_file(folder / name / FILE)
        assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert "Nothing is forgotten" in (folder / "report.md").read_text()
    assert len(run.pipeline("a dog").images) == 1
    main(["unlearn", "--method", "sfd", *shared, "--distilled", str(folder), "--output_dir", str(tmp_path / "run")])
    recorded = config(tmp_path / "run")
    assert recorded["initial_generator_sha256"] == run.metrics["weights_sha256"]
    assert recorded["initial_score_sha256"] == run.metrics["score_sha256"]
    # relabel edits the generator, which still draws in one step.
    main([
        "unlearn", "--method", "relabel", *shared[:4], *TEXT[-7:], *shared[-2:], "--distilled", str(folder),
        "--output_dir", str(tmp_path / "relabel"),
    ])  # fmt: skip
    relabelled = pf.Run(tmp_path / "relabel")
    assert relabelled.metrics["sampler"] == "one_step" and relabelled.pipeline.config.t_init == 625
    assert config(tmp_path / "relabel")["initial_generator_sha256"] == run.metrics["weights_sha256"]
    capsys.readouterr()
    error = fails(capsys, "distil", *shared, "--score_lora_rank", "2", "--output_dir", str(tmp_path / "lora"))
    assert "distil trains no adapter" in error


def test_compare_passes_distilled_to_one_step_methods(tmp_path):
    comparison = ClassComparison(distilled="auto", methods=("sfd", "esd", "relabel"))
    assert [comparison.options(name).get("distilled") for name in comparison.names] == ["auto", None, "auto"]
    # relabel edits the generator if there is one already, and otherwise the network: nothing is distilled for it.
    for preset, expected in (("digits16", "shipped:digits16"), ("digits", "shipped:digits")):
        assert ClassComparison(preset=preset).options("relabel")["distilled"] == expected
    own = ClassComparison(pretrained_model_name_or_path=str(tmp_path / "net"))
    save_network(tmp_path / "net", tiny_unet(num_classes=10), NoiseSchedule.linear())
    assert own.options("relabel")["distilled"] is None and "relabel" in own.names
    # The preset's own networks are shipped with the package, with the timestep that they were distilled for.
    settled = with_distilled(unlearn_arguments("digits16", "relabel", {"distilled": "auto"}))
    assert (settled.request.distilled, settled.options.t_init) == ("shipped:digits16", 400)
    assert with_distilled(settled) == settled
    # There are none for cifar10: they would be made among the runs, where they are looked up.
    settled = with_distilled(unlearn_arguments("cifar10", "sfd", {"distilled": "auto"}))
    assert settled.request.distilled == "runs/cifar10-distil-seed0" and settled.options.t_init == 440
    assert distillation_for(settled).folder == Path("runs/cifar10-distil-seed0")
    # A distillation trains no adapter, whatever starts from it does.
    options = {"distilled": "auto", "score_lora_rank": 4, "concept": "brad pitt"}
    text = with_distilled(unlearn_arguments("sd15-celebrity", "patch", options))
    assert (text.resources.score_lora_rank, distillation_for(text).resources.score_lora_rank) == (4, 0)


def test_presets_have_the_published_values():
    for name, rate in (("cifar10", 3e-5), ("stl10", 3e-5), ("sd15-celebrity", 1e-6)):
        options = distil_arguments(name).options
        assert (options.max_train_steps, options.score_learning_rate) == (50_000, rate)
        assert options.score_forget_weight == options.generator_forget_weight == 0
        assert options.t_init == unlearn_arguments(name, "sfd").options.t_init
