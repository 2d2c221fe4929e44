"""ESD on prompts: loss and gradient against float64, which parameters move, a run on the command line."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from pecker_fast.cli import main
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.unlearning import PromptRequest, Setting, method_class
from pecker_fast.unlearning.streams import Streams
from pecker_fast.unlearning.trained import is_trained
from tests.diffusion.tiny_sd import tiny_text_network, write_stable_diffusion
from tests.inputs import same_bits
from tests.unlearning.oracle import SHAPE, Oracle
from tests.unlearning.settings import setting_of
from tests.unlearning.test_equations import assert_grads, record_steps
from tests.unlearning.test_prompts import REQUEST, Prompted, prompt_setting

PUBLISHED = {"eval_sampler": "ddim", "num_inference_steps": 2, "eval_guidance_scale": 7.5}


def make(setting, **options):
    kind = method_class("esd")
    return kind(setting, kind.Options(**{**PUBLISHED, "max_train_steps": 3, "negative_guidance": 1.0, **options}))


@pytest.mark.parametrize("kind", ["current", "teacher"])
def test_loss_and_gradient(kind):
    setting = prompt_setting(seed=3)
    method = make(
        setting, trained="all", train_batch_size=4, trajectory_steps=8, trajectory_network=kind, negative_guidance=1.5
    )
    phase = method.phases[0]
    phase.start(None)
    steps: list = []
    record_steps(phase.optimizer, steps)
    with torch.no_grad():
        for param in method.network.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    network, teacher = Oracle(method.network), Oracle(setting.problem.teacher)
    alphas = setting.problem.schedule._exact
    losses = phase.step(2)
    streams = Streams(torch.device("cpu"), 3, "forget", 2)
    conditions = setting.problem.request.conditions("cpu")
    pairs = streams.choose("forget labels", 4, torch.stack([conditions.forgotten, conditions.covers], 1))
    until, within = streams.timesteps("step", 4, 0, 7), streams.timesteps("t", 4, 0, 124)
    walker, drawn = network if kind == "current" else teacher, []
    for z, last, label in zip(streams.normal("z", 4, SHAPE), until, pairs[:, 0], strict=True):
        x, null = z.double()[None], torch.tensor([0])
        for step in range(7, int(last), -1):
            # Stable Diffusion's DDIM is a timestep late.
            t, following = torch.tensor([step * 125 + 1]), torch.tensor([step * 125 - 124])
            none = walker.eps(x, t, null)
            eps = none + 3.0 * (walker.eps(x, t, label[None]) - none)
            x0 = (x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
            x = alphas[following].sqrt() * x0 + (1 - alphas[following]).sqrt() * eps
        drawn.append(x[0].detach())
    x_t, t = torch.stack(drawn), until * 125 + within
    none, conditional = teacher.eps(x_t, t, torch.zeros_like(t)), teacher.eps(x_t, t, pairs[:, 0])
    target = (none - 1.5 * (conditional - none)).detach()
    loss = (network.eps(x_t, t, pairs[:, 0]) - target).square().mean()
    assert losses["loss_forget"].item() == pytest.approx(loss.item(), rel=1e-3)
    assert_grads(steps[0]["grads"], network.grads(loss))


def tiny_setting(**options) -> Setting:
    request = PromptRequest(**REQUEST)
    network = tiny_text_network(len(request.prompts))
    return setting_of(teacher=network, schedule=network.schedule, request=request, **options)


@pytest.mark.parametrize("kind", ["x", "x-strict", "u", "all"])
def test_trained_parameters(kind):
    setting = tiny_setting()
    method = make(setting, trained=kind, trajectory_steps=2)
    before = {name: param.detach().clone() for name, param in method.network.named_parameters()}
    phase = method.phases[0]
    phase.start(None)
    for iteration in range(3):
        phase.step(iteration)
    unet, cross, outside = method.network.unet, set(), set()
    for module in unet.modules():
        if hasattr(module, "attn2"):
            parts = (module.attn2.to_k, module.attn2.to_v) if kind == "x-strict" else (module.attn2,)
            cross |= {id(p) for part in parts for p in part.parameters()}
    for part in (unet.time_embedding, unet.conv_norm_out, unet.conv_out):
        outside |= {id(p) for p in part.parameters()}
    assert cross and outside
    for name, param in method.network.named_parameters():
        inside = id(param) in cross
        member = inside if kind.startswith("x") else (kind == "all" or id(param) not in cross | outside)
        assert param.requires_grad == member and same_bits(param.detach(), before[name]) == (not member), name
    assert same_bits(next(setting.problem.teacher.parameters()), next(iter(before.values())))


def test_names_of_class_networks_are_not_those_of_text():
    assert is_trained("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", "x", text=True)
    assert not is_trained("down_blocks.0.resnets.0.time_emb_proj.weight", "x", text=True)
    assert is_trained("down_blocks.0.resnets.0.time_emb_proj.weight", "u", text=True)
    assert not is_trained("class_embedding.weight", "x-strict")


def test_refusals():
    with pytest.raises(ValueError, match="prompts have the empty one"):
        make(tiny_setting(), empty_prompt="cover")
    with pytest.raises(ValueError, match=r"trained is 'y', expected one of x, x-strict, u, all"):
        make(tiny_setting(), trained="y")
    with pytest.raises(ValueError, match="forgets classes"):
        kind = method_class("salun")
        kind(tiny_setting(), kind.Options())
    with pytest.raises(ValueError, match="no such parameters"):
        network = Prompted(classes=8)
        request = PromptRequest(**REQUEST, negative="bad")
        make(setting_of(teacher=network, schedule=NoiseSchedule.linear(), request=request), trained="x")


def test_a_run(tmp_path, capsys):
    from diffusers import StableDiffusionPipeline

    base = write_stable_diffusion(tmp_path / "base")
    (tmp_path / "retain.txt").write_text("a dog\na cat\n")
    arguments = [
        "unlearn", "--preset", "sd15-celebrity", "--method", "esd", "--pretrained_model_name_or_path", str(base),
        "--retain_prompts", str(tmp_path / "retain.txt"), "--max_train_steps", "3", "--trajectory_steps", "3",
        "--num_inference_steps", "2", "--sample_steps", "2", "--samples_per_prompt", "1", "--teacher_dtype", "float32",
        "--no-progress_bar",
    ]  # fmt: skip
    main([*arguments, "--output_dir", str(tmp_path / "run")])
    capsys.readouterr()
    run = tmp_path / "run"
    config, metrics = (json.loads((run / name).read_text()) for name in ("config.json", "metrics.json"))
    published = {"trained": "x", "negative_guidance": 1.0, "learning_rate": 1e-5, "trajectory_guidance_scale": 3.0}
    assert published.items() <= config["options"].items() and config["options"]["train_batch_size"] == 1
    assert metrics["sampler"] == "ddim" and metrics["iterations"] == 3
    pipe = StableDiffusionPipeline.from_pretrained(run, safety_checker=None)
    old = safetensors.torch.load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {name for name, value in pipe.unet.state_dict().items() if not torch.equal(value, old[name])}
    assert changed and all(".attn2." in name for name in changed)
    drift = json.loads((run / "drift.json").read_text())
    still = {name for name, change in drift["layers"].items() if change["changed"] == 0}
    assert still and not any(".attn2." in name for name in still) and not (run / "mask.safetensors").exists()
    assert {name for name, change in drift["layers"].items() if change["changed"]} == {
        n.rpartition(".")[0] for n in changed
    }
    card = (run / "README.md").read_text()
    assert "StableDiffusionPipeline" in card and "one step" not in card and "{" not in card
    # Resumed from a checkpoint, it ends with the same bits.
    main([*arguments, "--output_dir", str(tmp_path / "cut"), "--checkpointing_steps", "2"])
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-3")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["checkpoint-2"]
    main([*arguments, "--output_dir", str(tmp_path / "cut"), "--checkpointing_steps", "2",
          "--resume_from_checkpoint", "latest"])  # fmt: skip
    files = [folder / "unet" / "diffusion_pytorch_model.safetensors" for folder in (run, tmp_path / "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    capsys.readouterr()
    nudity = ["unlearn", "--preset", "sd15-nudity", "--method", "esd", "--dry_run"]
    main(nudity)
    printed = capsys.readouterr().out
    assert '"trained": "u"' in printed
    assert printed.endswith("memory: estimated only for score forgetting without an adapter\n")
