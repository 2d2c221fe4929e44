"""Stable Diffusion 3, SANA and SANA-Sprint with a few thousand random weights and all their parts."""

import json
from pathlib import Path

import torch

from tests.diffusion.tiny_sd import write_tokenizer

SIZE, LATENTS, WIDTH = 16, 4, 16
SHIFT = 3.0


def sd3_transformer(**changes):
    from diffusers import SD3Transformer2DModel

    options = {
        "sample_size": SIZE,
        "patch_size": 1,
        "in_channels": LATENTS,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 2 * WIDTH,
        "out_channels": LATENTS,
        "pos_embed_max_size": 16,
    }
    return SD3Transformer2DModel(**{**options, **changes}).eval()


def sana_transformer(sprint: bool = True):
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=SIZE,
        guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if sprint else None,
        timestep_scale=1.0,
    ).eval()


def write_sd3(folder: Path) -> Path:
    """Write a folder as ``StableDiffusion3Pipeline`` saves it, without T5."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    size = write_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=LATENTS,
        scaling_factor=1.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.eval(),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    return folder


def _gemma(folder: Path):
    """A tokenizer of characters, and an encoder."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return fast, Gemma2Model(config).eval()


def write_sana(folder: Path, sprint: bool = True) -> Path:
    """Write a folder as ``SanaSprintPipeline`` or ``SanaPipeline`` saves it."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaSprintPipeline, SCMScheduler

    tokenizer, encoder = _gemma(folder)
    vae = AutoencoderDC(
        latent_channels=LATENTS,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    )
    if sprint:
        scheduler, kind = SCMScheduler(), SanaSprintPipeline
    else:
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
        scheduler, kind = DPMSolverMultistepScheduler(**options), SanaPipeline
    parts = {"tokenizer": tokenizer, "text_encoder": encoder, "vae": vae.eval(), "scheduler": scheduler}
    kind(transformer=sana_transformer(sprint), **parts).save_pretrained(folder)
    return folder


WRITERS = {
    "sd3": write_sd3,
    "sana": lambda folder: write_sana(folder, sprint=False),
    "sana-sprint": write_sana,
}


def class_of(folder: Path) -> str:
    return json.loads((folder / "model_index.json").read_text())["_class_name"]


def one_step_options(kind: str) -> dict:
    """Arguments with which the model's own pipeline draws in one step without guidance."""
    if kind == "sana-sprint":
        return {"num_inference_steps": 1, "intermediate_timesteps": None, "use_resolution_binning": False}
    sana = {"use_resolution_binning": False} if kind == "sana" else {}
    return {"num_inference_steps": 1, "guidance_scale": 1.0, **sana}


def latents_of(count: int) -> torch.Tensor:
    return torch.randn(count, LATENTS, SIZE, SIZE)
