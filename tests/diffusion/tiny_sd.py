"""A Stable Diffusion with some ten thousand random weights and all its parts, in a folder and in memory."""

import json
from pathlib import Path

import torch
from torch import nn

from pecker_fast.diffusion import NoiseSchedule, PromptTable, TextConditioned

WIDTH, SIZE, LATENTS = 16, 8, 4
PROMPTS = ("", "a dog", "a brad pitt", "a man", "a cat on a mat")


def tiny_unet(**changes):
    from diffusers import UNet2DConditionModel

    options = {
        "sample_size": SIZE,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**options, **changes}).eval()


def tiny_schedule() -> NoiseSchedule:
    """Stable Diffusion's schedule."""
    return NoiseSchedule.from_scheduler(tiny_scheduler())


def tiny_scheduler(prediction_type: str = "epsilon"):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def tiny_text_network(prompts: int = 5, prediction_type: str = "epsilon", **changes) -> TextConditioned:
    table = PromptTable(torch.randn(prompts, 7, WIDTH))
    return TextConditioned(tiny_unet(**changes), table, tiny_schedule(), prediction_type)


def _alphabet() -> list[str]:
    """A printable character for each byte, as in CLIP's tokenizer."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(unprintable))]


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer of single bytes with a few merges, and return the size of its vocabulary."""
    from transformers import CLIPTokenizer

    merges = [("m", "a"), ("ma", "n</w>"), ("d", "o"), ("do", "g</w>")]
    characters = _alphabet()
    words = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in merges))
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    CLIPTokenizer(*files, model_max_length=77).save_pretrained(folder)
    return len(words)


def tiny_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=LATENTS,
        sample_size=2 * SIZE,
        scaling_factor=0.5,
    ).eval()


def write_stable_diffusion(folder: Path, prediction_type: str = "epsilon", **changes) -> Path:
    """Write a folder as StableDiffusionPipeline saves it."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    size = write_tokenizer(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=tiny_unet(**changes),
        scheduler=tiny_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
