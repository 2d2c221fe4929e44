"""resolve: every kind of source gives the same network and schedule, and records its origin."""

import copy
import json
import shutil

import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule, Sampler, build_unet
from pecker_fast.diffusion.pipeline import OneStepPipeline
from pecker_fast.hashing import weights_hash
from pecker_fast.models import (
    LoadedStableDiffusion,
    StableDiffusion,
    conditioning_of,
    find_weight_files,
    load_network,
    recorded_options,
    resolve,
    resolve_config,
    resolve_text,
    resolve_text_unet,
    save_network,
    save_one_step_pipeline,
    save_text_pipeline,
    schedule_from_config,
    shipped_network,
)
from pecker_fast.models.schedules import config_of
from tests.diffusion.tiny_sd import SIZE, tiny_scheduler, write_stable_diffusion
from tests.diffusion.tiny_sd import tiny_unet as tiny_text_unet
from tests.diffusion.toy import tiny_config, tiny_unet

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 1.5e-2)
OWN_SAMPLER = {"eval_sampler": "ddpm", "num_inference_steps": 7, "eval_guidance_scale": 2.0, "clip_sample": False}


def same(model, unet, schedule=SCHEDULE) -> bool:
    network = model.network
    assert not network.training and {p.dtype for p in network.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in network.parameters())
    assert network is not unet and network.config["_num_classes"] == unet.config["_num_classes"]
    # The file has float32 betas.
    torch.testing.assert_close(model.schedule.alphas_cumprod, schedule.alphas_cumprod, rtol=2e-7, atol=0)
    return weights_hash(network) == weights_hash(unet)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(3)
    return write_stable_diffusion(tmp_path_factory.mktemp("sd") / "base", "v_prediction")


@pytest.fixture(scope="module")
def pipe(base):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


def test_folders_of_networks_pipelines_and_runs(tmp_path):
    unet = tiny_unet(null_label=True)
    save_network(tmp_path / "network", unet, SCHEDULE)
    save_one_step_pipeline(tmp_path / "pipeline", unet, SCHEDULE, 250)
    save_network(tmp_path / "run" / "unet", unet, SCHEDULE)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"seed": 1, "options": OWN_SAMPLER}))
    metadata = {"network": None, "pipeline": 250, "pipeline/unet": 250, "run": OWN_SAMPLER, "run/unet": OWN_SAMPLER}
    for name, expected in metadata.items():
        model = resolve(tmp_path / name)
        assert same(model, unet) and model.source == str(tmp_path / name)
        assert (model.metadata.get("t_init") if expected in (None, 250) else model.metadata) == expected
        assert recorded_options(tmp_path / name) == model.metadata
        (files,) = find_weight_files(tmp_path / name)
        assert files.weights.keys() == unet.state_dict().keys() and resolve_config(tmp_path / name)["sample_size"] == 8
        assert files.files == (files.folder / "diffusion_pytorch_model.safetensors",)
        assert conditioning_of(str(tmp_path / name)) == "classes"
    shipped = resolve(None, shipped="digits")
    assert shipped.source == "shipped:digits" and shipped.metadata == {} and conditioning_of(None) == "classes"
    assert weights_hash(shipped.network) == weights_hash(load_network(shipped_network("digits"))[0])


def test_networks_and_pipelines_in_memory(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = build_unet(tiny_config(null_label=True)).requires_grad_(False)
    before = copy.deepcopy(unet.state_dict())
    scheduler = SCHEDULE.to_scheduler(DDPMScheduler)
    for model, options, t_init in (
        (unet, {"scheduler": SCHEDULE}, None),
        (unet, {"scheduler": scheduler}, None),
        (torch.nn.DataParallel(unet), {"scheduler": scheduler}, None),
        (DDPMPipeline(unet, scheduler), {}, None),
        (OneStepPipeline(unet, scheduler, 250), {}, 250),
    ):
        resolved = resolve(model, **options)
        assert same(resolved, unet) and resolved.metadata.get("t_init") == t_init
        kind = "UNet2DModel" if isinstance(model, torch.nn.Module) else type(model).__name__
        assert resolved.source == f"memory:{kind}" and conditioning_of(model) == "classes"
        with torch.no_grad():
            next(resolved.network.parameters()).add_(1)
        # The user's network is unchanged.
        assert unet.training and all(torch.equal(before[name], value) for name, value in unet.state_dict().items())
    half = resolve(copy.deepcopy(unet).half(), scheduler=scheduler).network
    assert half.dtype == torch.float32
    for a, b in zip(half.parameters(), unet.parameters(), strict=True):
        assert torch.equal(a, b.half().float())
    with pytest.raises(ValueError, match="pretrained_model_name_or_path is a UNet2DModel: its schedule is not given"):
        resolve(unet)
    with pytest.raises(ValueError, match=r"initial_score is a UNet2DConditionModel: .*expected a UNet2DModel"):
        resolve(tiny_text_unet(), scheduler=scheduler, name="initial_score")
    with pytest.raises(ValueError, match="is a int: it has no U-Net"):
        resolve(3)
    assert resolve(unet, scheduler=tiny_scheduler("v_prediction")).schedule.prediction_type == "v_prediction"


def test_sampler_of_a_model(tmp_path):
    unet = tiny_unet(null_label=True)
    save_network(tmp_path / "unet", unet, SCHEDULE)

    def model(options):
        (tmp_path / "config.json").write_text(json.dumps({"options": options}))
        return resolve(tmp_path)

    plain, one_step, many = model({}), model({"t_init": 250}), model(OWN_SAMPLER)
    ddim = Sampler("ddim", num_inference_steps=50)
    assert plain.sampler() == ddim and plain.sampler(num_inference_steps=5).num_inference_steps == 5
    assert plain.sampler(t_init=3) == Sampler("one_step", t_init=3)
    assert one_step.sampler() == Sampler("one_step", t_init=250)
    assert one_step.sampler("ddim") == ddim and one_step.sampler(t_init=3).t_init == 3
    own = Sampler("ddpm", num_inference_steps=7, guidance_scale=2.0, clip_sample=False, batch_size=2)
    assert many.sampler(batch_size=2) == own
    assert many.sampler(num_inference_steps=4, batch_size=2).num_inference_steps == 4
    # A sampler chosen by name does not take the run's options.
    assert many.sampler("ddpm") == Sampler("ddpm", num_inference_steps=50)
    with pytest.raises(ValueError, match="t_init is not given, and the network's metadata does not have it"):
        many.sampler("one_step")
    with pytest.raises(ValueError, match="t_init is 1000"):
        plain.sampler(t_init=1000)
    with pytest.raises(ValueError, match="num_inference_steps is 1001"):
        plain.sampler(num_inference_steps=1001)


def test_schedule_from_config():
    from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    expected = NoiseSchedule.from_scheduler(DDPMScheduler(**betas))
    for kind in (DDIMScheduler, DDPMScheduler, PNDMScheduler):
        assert torch.equal(schedule_from_config(config_of(kind(**betas)))._exact, expected._exact)
    trained = {"_class_name": "DDPMScheduler", "trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}
    assert schedule_from_config(trained).num_train_timesteps == 3


def test_stable_diffusion_in_memory_equals_the_folder(base, pipe, tmp_path):
    folder, memory = resolve_text(base), resolve_text(pipe)
    assert folder.source == str(base) and memory.source == "memory:StableDiffusionPipeline"
    assert isinstance(folder.parts, StableDiffusion) and isinstance(memory.parts, LoadedStableDiffusion)
    assert folder.t_init is memory.t_init is None and conditioning_of(base) == conditioning_of(pipe) == "prompts"
    before = {name: weights_hash(getattr(pipe, name)) for name in ("unet", "vae", "text_encoder")}
    one, two = folder.parts, memory.parts
    assert torch.equal(one.schedule._exact, two.schedule._exact)
    assert one.schedule.prediction_type == two.schedule.prediction_type == "v_prediction"
    assert one.vae_scale_factor == two.vae_scale_factor and one.latent_size(32) == two.latent_size(32)
    assert two.config("unet")["_class_name"] == "UNet2DConditionModel" and "hidden_size" in two.config("text_encoder")
    prompts = ["", "a dog", "a man"]
    (a, _), (b, _) = one.encode(prompts), two.encode(prompts)
    assert torch.equal(a.embeddings, b.embeddings)
    latents = torch.randn(2, 4, SIZE, SIZE)
    assert torch.equal(one.decode(latents), two.decode(latents))
    for x, y in ((folder.load_unet(), memory.load_unet()), (one.load_vae(), two.load_vae())):
        assert weights_hash(x) == weights_hash(y) and not y.training
    assert all(p.requires_grad for p in memory.load_unet().parameters())
    sampler = Sampler("ddim", num_inference_steps=3, guidance_scale=2.0)
    networks = [model.parts.network(embeddings) for model, embeddings in ((folder, a), (memory, b))]
    samples = [sampler.draw(network, one.schedule, [1, 2], 5) for network in networks]
    assert torch.equal(*samples)
    # Trained and saved, it is a pipeline like the folder's, and the user's pipeline is unchanged.
    unet = memory.load_unet()
    with torch.no_grad():
        unet.conv_in.bias.add_(1)
    for t_init in (None, 625):
        target = tmp_path / str(t_init)
        save_text_pipeline(target, unet, two, t_init)
        again = resolve_text(target)
        assert weights_hash(again.load_unet()) == weights_hash(unet) and again.t_init == t_init
        assert torch.equal(again.parts.schedule._exact, one.schedule._exact)
        assert torch.equal(again.parts.encode(prompts)[0].embeddings, a.embeddings)
    assert before == {name: weights_hash(getattr(pipe, name)) for name in before}


def test_hashes_of_text_encoders(base, pipe, tmp_path):
    one, again = LoadedStableDiffusion(pipe), StableDiffusion(shutil.copytree(base, tmp_path / "copy"))
    assert StableDiffusion(base).text_encoder_hashes() == again.text_encoder_hashes()
    before = one.text_encoder_hashes()
    assert before == one.text_encoder_hashes() and len(before) == 1
    other = copy.copy(pipe)
    other.text_encoder = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        next(other.text_encoder.parameters()).add_(1)
    assert LoadedStableDiffusion(other).text_encoder_hashes() != before


def test_unets_alone(base, pipe, tmp_path):
    unet = pipe.unet
    unet.save_pretrained(tmp_path / "alone")
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "alone", tmp_path / "run" / "unet")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"options": {"t_init": 625}}))
    for source in (base, base / "unet", tmp_path / "alone", tmp_path / "run", unet, pipe):
        resolved = resolve_text_unet(source)
        assert resolved is not unet and weights_hash(resolved) == weights_hash(unet) and not resolved.training
    for source, t_init in ((tmp_path / "alone", None), (tmp_path / "run", 625), (unet, None)):
        for other in (base, pipe):
            model = resolve_text(source, base=other)
            assert weights_hash(model.load_unet()) == weights_hash(unet) and model.t_init == t_init
    assert resolve_text(tmp_path / "run", base=base).parts.folder == base
    assert resolve_text(str(tmp_path / "alone"), base=str(base)).source == str(tmp_path / "alone")
    assert resolve_config(base)["cross_attention_dim"] == resolve_config(base / "unet")["cross_attention_dim"]
    with pytest.raises(ValueError, match=r"initial_score is '.*nowhere': .*not the folder of a U-Net"):
        resolve_text_unet(tmp_path / "nowhere", name="initial_score")
    with pytest.raises(ValueError, match=r"model is '.*nowhere': .*there is no config\.json"):
        resolve_text(tmp_path / "nowhere", base=base, name="model")
    with pytest.raises(ValueError, match=r"base is '.*alone': .*it has no .*vae"):
        resolve_text(tmp_path / "alone", base=tmp_path / "alone")
    with pytest.raises(ValueError, match=r"expected a UNet2DConditionModel"):
        resolve_text_unet(tiny_unet())


def test_sources_that_cannot_be_copied_or_read(base, pipe, tmp_path):
    adapted = copy.deepcopy(pipe.unet)
    adapted._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="has adapters"):
        resolve_text_unet(adapted)
    with pytest.raises(ValueError, match="is offloaded"):
        resolve(tiny_unet().to("meta"), scheduler=SCHEDULE)
    partial = copy.copy(pipe)
    partial.vae = None
    with pytest.raises(ValueError, match="a StableDiffusionPipeline is not a Stable Diffusion: it has no vae"):
        resolve_text(partial)
    with pytest.raises(ValueError, match=r"like is '.*', not the folder of a U-Net or of a pipeline"):
        resolve_config(tmp_path, name="like")
    with pytest.raises(ValueError, match=r"base is '.*': there is no network \(config\.json and diffusion_pytorch"):
        find_weight_files(tmp_path, name="base")
    for resolving in (resolve, resolve_text, conditioning_of):
        with pytest.raises(ValueError, match=r"model is '.*nowhere': there is no such f"):
            resolving(tmp_path / "nowhere", name="model")
    with pytest.raises(ValueError, match="is not given, and no network of this preset"):
        resolve(None)
    with pytest.raises(ValueError, match="checkpoint_state is 'ema'"):
        resolve(tiny_unet(), scheduler=SCHEDULE, state="ema")
    with pytest.raises(ValueError, match="it is a AutoencoderKL, expected one of UNet2DModel"):
        conditioning_of(base / "vae")


def test_names_on_the_hub(base, tmp_path, monkeypatch):
    """Configurations are fetched and checked before the weights, and the pipeline's metadata is read."""
    import huggingface_hub

    unet, calls = tiny_unet(), []
    save_one_step_pipeline(tmp_path / "digits", unet, SCHEDULE, 250)
    save_text_pipeline(tmp_path / "sd", StableDiffusion(base).load_unet(), StableDiffusion(base), 625)

    def fetch(name, allow_patterns, revision=None):
        calls.append((name, any("safetensors" in pattern for pattern in allow_patterns), revision))
        return str(tmp_path / name.rpartition("/")[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = resolve("someone/digits")
    assert same(model, unet) and model.source == "hub:someone/digits" and model.sampler().t_init == 250
    assert calls == [("someone/digits", False, None), ("someone/digits", True, "digits")]
    calls.clear()
    text = resolve_text("someone/sd")
    assert text.source == "hub:someone/sd" and text.t_init == 625 and text.parts.folder == tmp_path / "sd"
    assert calls == [("someone/sd", False, None), ("someone/sd", True, "sd")]
    calls.clear()
    assert conditioning_of("someone/digits") == "classes" and conditioning_of("someone/sd") == "prompts"
    assert not any(weights for _, weights, _ in calls)
    calls.clear()
    with pytest.raises(ValueError, match="has a UNet2DConditionModel"):
        resolve("someone/sd")
    with pytest.raises(ValueError, match="is not the folder of a Stable Diffusion: it has no vae, text_encoder"):
        resolve_text("someone/digits")
    assert not any(weights for _, weights, _ in calls)
    calls.clear()
    for path in ("some/file.safetensors", "some/ckpt.pth", "a/b/c"):
        with pytest.raises(ValueError, match="there is no such"):
            resolve(path)
    assert not calls
