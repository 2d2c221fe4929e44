"""Names of the original Stable Diffusion code, against diffusers' converter, which reads them."""

import pytest
import torch
from safetensors.torch import load_file

from pecker_fast.cli import main
from pecker_fast.models import read_stable_diffusion, resolve_text_unet
from pecker_fast.models.ldm_names import ldm_names
from tests.commands.case import fails
from tests.diffusion.tiny_sd import tiny_unet
from tests.diffusion.tiny_sdxl import tiny_xl_unet, write_sdxl

# The block layouts of Stable Diffusion 1.x and 2.x, and of XL.
UNETS = {
    "sd15": lambda: tiny_unet(
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "sdxl": lambda: tiny_xl_unet(
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 2, 4),
    ),
    "small": tiny_xl_unet,
}


@pytest.mark.parametrize("kind", UNETS)
def test_diffusers_reads_the_names_back(kind):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = UNETS[kind]()
    state = unet.state_dict()
    names = ldm_names(state, unet.config)
    assert set(names) == set(state) and len(set(names.values())) == len(state)
    back = convert_ldm_unet_checkpoint({names[name]: value for name, value in state.items()}, dict(unet.config))
    assert set(back) == set(state) and all(torch.equal(back[name], value) for name, value in state.items())


def test_names_of_the_published_checkpoints():
    """Some names of sd_xl_base_1.0.safetensors and v1-5-pruned.safetensors."""
    xl = ldm_names(UNETS["sdxl"]().state_dict(), UNETS["sdxl"]().config)
    assert xl["add_embedding.linear_1.weight"] == "model.diffusion_model.label_emb.0.0.weight"
    assert xl["down_blocks.0.downsamplers.0.conv.weight"] == "model.diffusion_model.input_blocks.3.0.op.weight"
    assert (
        xl["down_blocks.2.attentions.1.transformer_blocks.2.attn2.to_k.weight"]
        == "model.diffusion_model.input_blocks.8.1.transformer_blocks.2.attn2.to_k.weight"
    )
    assert xl["mid_block.resnets.1.conv1.bias"] == "model.diffusion_model.middle_block.2.in_layers.2.bias"
    assert xl["up_blocks.0.upsamplers.0.conv.bias"] == "model.diffusion_model.output_blocks.2.2.conv.bias"
    assert xl["up_blocks.2.resnets.2.conv_shortcut.weight"] == (
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight"
    )
    one = ldm_names(UNETS["sd15"]().state_dict(), UNETS["sd15"]().config)
    assert one["up_blocks.0.upsamplers.0.conv.bias"] == "model.diffusion_model.output_blocks.2.1.conv.bias"
    assert one["up_blocks.1.upsamplers.0.conv.bias"] == "model.diffusion_model.output_blocks.5.2.conv.bias"


def test_layers_without_a_name():
    with pytest.raises(ValueError, match=r"the weight down_blocks\.0\.motion\.x has no name"):
        ldm_names(["down_blocks.0.motion.x"], {"layers_per_block": 2})
    with pytest.raises(ValueError, match=r"layers_per_block is \[1, 2\], expected one number"):
        ldm_names([], {"layers_per_block": [1, 2]})


def test_a_model_is_exported_as_one_file(tmp_path, capsys):
    from diffusers import UNet2DConditionModel

    folder = write_sdxl(tmp_path / "base")
    unet, path = read_stable_diffusion(folder).load_unet(), tmp_path / "unet.safetensors"
    words = ["patch", "export", "--model", str(folder), "--output", str(path), "--format", "ldm"]
    main(words)
    assert "original code" in capsys.readouterr().out
    state = load_file(path)
    assert all(name.startswith("model.diffusion_model.") for name in state) and len(state) == len(unet.state_dict())
    # diffusers and this package read it as a single file.
    config = str(folder / "unet")
    theirs = UNet2DConditionModel.from_single_file(str(path), config=config, local_files_only=True)
    ours = resolve_text_unet(path, parts=read_stable_diffusion(folder), name="initial_generator")
    for other in (theirs, ours):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in unet.state_dict().items())
    half = tmp_path / "half.safetensors"
    main([*words[:-3], str(half), "--format", "ldm", "--dtype", "float16"])
    assert {value.dtype for value in load_file(half).values()} == {torch.float16}
    assert "model is" in fails(
        capsys, "patch", "export", "--model", str(path), "--output", "x.safetensors", "--format", "ldm"
    )
    assert "expected same" in fails(capsys, *words[:-3], "other", "--format", "shira", "--dtype", "float16")
