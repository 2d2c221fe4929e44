"""The U-Net's configuration, its classes, and its files, which diffusers must be able to read."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from pecker_fast.diffusion import (
    NoiseSchedule,
    UNetConfig,
    build_unet,
    check_class_conditional,
    fresh_unet,
    guidance_scale,
    null_label,
    num_classes,
    pretrained_sampler,
    register_classes,
    register_sampling,
)
from pecker_fast.models import load_network, resolve, save_network

from .toy import tiny_config, tiny_unet

SCHEDULE = NoiseSchedule.linear(50, 1e-3, 0.1)


@pytest.mark.parametrize("levels", [(8,), (4, 8), (2, 4, 6)])
@pytest.mark.parametrize("attention", [(), (8,)])
def test_build(levels, attention):
    unet = build_unet(tiny_config(block_out_channels=levels, attention_resolutions=attention, in_channels=3))
    assert unet.training
    out = unet(torch.randn(2, 3, 8, 8), torch.tensor([3, 9]), class_labels=torch.tensor([0, 2])).sample
    assert out.shape == (2, 3, 8, 8)
    blocks = [hasattr(block, "attentions") for block in unet.down_blocks]
    assert blocks == [bool(attention)] + [False] * (len(levels) - 1)
    assert [hasattr(block, "attentions") for block in unet.up_blocks] == blocks[::-1]


def test_options_reach_the_network():
    unet = build_unet(tiny_config(dropout=0.25, mid_attention=False, attention_head_dim=4, num_classes=5))
    rates = {module.p for name, module in unet.named_modules() if "resnets" in name and hasattr(module, "p")}
    assert rates == {0.25}
    assert unet.mid_block.attentions[0] is None
    assert unet.down_blocks[1].attentions[0].heads == 2
    assert tiny_unet().down_blocks[1].attentions[0].heads == 1
    groups = {module.num_groups for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)}
    assert groups == {2}
    assert unet.class_embedding.num_embeddings == 5


@pytest.mark.parametrize("null", [False, True])
def test_classes(null):
    unet = tiny_unet(null_label=null)
    for network in (unet, copy.deepcopy(unet)):
        check_class_conditional(network)
        assert num_classes(network) == 3
        assert null_label(network) == (3 if null else None)
        assert network.class_embedding.num_embeddings == 3 + null


def test_how_a_network_is_sampled(tmp_path):
    unet = tiny_unet(null_label=True)
    usual = pretrained_sampler(SCHEDULE, unet)
    assert (usual.guidance_scale, usual.num_inference_steps) == (None, 50) and guidance_scale(unet) == 1
    register_sampling(unet, 2, 25)
    save_network(tmp_path / "unet", unet, SCHEDULE)
    for network in (unet, fresh_unet(unet), load_network(tmp_path / "unet")[0]):
        sampler = pretrained_sampler(SCHEDULE, network)
        assert (sampler.guidance_scale, sampler.num_inference_steps) == (2, 25)
    model = resolve(str(tmp_path / "unet"))
    assert (model.sampler().guidance_scale, model.sampler("ddim").num_inference_steps) == (2, 25)
    assert model.sampler(num_inference_steps=7).num_inference_steps == 7
    with pytest.raises(ValueError, match='guidance_scale is 2, but the network has no label for "no condition"'):
        register_sampling(tiny_unet(), 2)
    with pytest.raises(ValueError, match="guidance_scale is -1"):
        register_sampling(unet, -1)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        register_sampling(unet, num_inference_steps=0)
    for name, value in (("_guidance_scale", "2"), ("_num_inference_steps", 2.5)):
        unet = tiny_unet(null_label=True)
        unet.register_to_config(**{name: value})
        with pytest.raises(TypeError, match=f"{name} is {value!r}, expected"):
            pretrained_sampler(SCHEDULE, unet)


def test_classes_of_a_network_of_diffusers(tmp_path):
    from diffusers import UNet2DModel

    def make(**options):
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        return UNet2DModel(8, block_out_channels=(4,), norm_num_groups=2, attention_head_dim=4, **blocks, **options)

    unet = make(num_class_embeds=11)
    assert num_classes(unet) == 11 and null_label(unet) is None
    register_classes(unet, 10)
    assert num_classes(unet) == 10 and null_label(unet) == 10
    with pytest.raises(ValueError, match="num_classes is 9, expected from 10 to 11"):
        register_classes(unet, 9)
    for options in ({}, {"class_embed_type": "timestep"}):
        with pytest.raises(ValueError, match="no embedding of class labels"):
            check_class_conditional(make(**options))
    with pytest.raises(ValueError, match="unet is a Linear"):
        num_classes(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no embedding of class labels"):
        save_network(tmp_path / "net", make(), SCHEDULE)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("null", [False, True])
def test_round_trip(tmp_path, null):
    unet = tiny_unet(null_label=null)
    wrapper = torch.nn.Module()
    wrapper.module = unet
    save_network(tmp_path / "runs" / "net", wrapper, SCHEDULE)
    assert os.listdir(tmp_path / "runs") == ["net"]
    loaded, schedule = load_network(tmp_path / "runs" / "net")
    assert num_classes(loaded) == 3 and null_label(loaded) == (3 if null else None)
    assert not loaded.training
    assert loaded.state_dict().keys() == unet.state_dict().keys()
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(schedule.alphas_cumprod, SCHEDULE.alphas_cumprod)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    assert torch.equal(loaded(x, 7, labels).sample, unet(x, 7, labels).sample)
    # Save the loaded network into the same folder.
    (tmp_path / "runs" / "net" / "note.txt").write_text("mine")
    with torch.no_grad():
        loaded.conv_in.weight.add_(1)
    save_network(tmp_path / "runs" / "net", loaded, schedule)
    again, _ = load_network(tmp_path / "runs" / "net")
    assert torch.equal(again.conv_in.weight, unet.conv_in.weight + 1)
    assert num_classes(again) == 3 and null_label(again) == (3 if null else None)
    assert sorted(os.listdir(tmp_path / "runs" / "net")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "note.txt",
        "scheduler",
    ]
    assert os.listdir(tmp_path / "runs") == ["net"]


def test_diffusers_reads_a_saved_network(tmp_path):
    from diffusers import DDPMScheduler, UNet2DModel

    unet = tiny_unet(null_label=True)
    schedule = NoiseSchedule(torch.linspace(0.99, 0.05, 20, dtype=torch.float64))
    save_network(tmp_path, unet, schedule)
    stock = UNet2DModel.from_pretrained(tmp_path, local_files_only=True, low_cpu_mem_usage=False)
    # diffusers warns of unused options.
    _, unused, _ = UNet2DModel.extract_init_dict(UNet2DModel.load_config(tmp_path, local_files_only=True))
    assert not unused
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    assert torch.equal(stock(x, 7, labels).sample, unet(x, 7, labels).sample)
    scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler", local_files_only=True)
    torch.testing.assert_close(scheduler.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-5, atol=0)
    _, loaded = load_network(tmp_path)
    torch.testing.assert_close(loaded.alphas_cumprod, schedule.alphas_cumprod, rtol=2e-7, atol=0)


def test_invalid_folders_raise(tmp_path):
    with pytest.raises(ValueError, match=r"path .*nowhere is not the folder"):
        load_network(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        load_network(tmp_path)
    save_network(tmp_path, tiny_unet(), SCHEDULE)
    config_file = tmp_path / "config.json"
    config = json.loads(config_file.read_text())

    def load_with(**changes):
        config_file.write_text(json.dumps({**config, **changes}))
        load_network(tmp_path)

    with pytest.raises(ValueError, match="has a UNet2DConditionModel, expected a UNet2DModel"):
        load_with(_class_name="UNet2DConditionModel")
    with pytest.raises(ValueError, match="network without class labels"):
        load_with(num_class_embeds=None)
    with pytest.raises(ValueError, match="network without class labels"):
        load_with(class_embed_type="identity")
    with pytest.raises(ValueError, match="do not fit"):
        load_with(num_class_embeds=7)
    with pytest.raises(ValueError, match="do not fit"):
        load_with(layers_per_block=2)
    load_with()
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for wrong in ({k: v for k, v in tensors.items() if k != "conv_in.bias"}, {**tensors, "more": torch.ones(2)}):
        save_file(wrong, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"do not fit.*(conv_in\.bias|more)"):
            load_with()
    save_file(tensors, weights, metadata={"format": "pt"})
    load_with()
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no safetensors weights \(diffusion_pytorch_model"):
        load_with()
    (tmp_path / "elsewhere").rename(weights)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no scheduler/scheduler_config\.json"):
        load_with()
    with pytest.raises(ValueError, match="is a file"):
        save_network(config_file, tiny_unet(), SCHEDULE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 9}, "sample_size is 9, expected a multiple of 2"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"block_out_channels": ()}, "block_out_channels is empty"),
        ({"block_out_channels": (4, 7)}, "block_out_channels has 7"),
        ({"block_out_channels": (3, 6), "norm_num_groups": 3}, "odd"),
        ({"attention_resolutions": (5,)}, r"attention_resolutions has \[5\]"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_invalid_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_configuration_from_lists():
    config = UNetConfig(8, 3, block_out_channels=[32, 64], attention_resolutions=[4])
    assert config.block_out_channels == (32, 64) and config.resolutions == (8, 4)
    with pytest.raises(TypeError, match=r"sample_size is 8\.5"):
        UNetConfig(8.5, 3)
