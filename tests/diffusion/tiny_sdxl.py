"""A Stable Diffusion XL with some ten thousand random weights and all its parts, in a folder."""

from pathlib import Path

import torch

from pecker_fast.diffusion import Conditioning, NoiseSchedule, PromptTable, TextConditioned
from pecker_fast.diffusion.conditioning import POOLED, TIME_IDS
from tests.diffusion.tiny_sd import LATENTS, SIZE, tiny_unet, tiny_vae, write_tokenizer

# Widths of the two text encoders, of the pooled embedding, and of the embedding of a size.
FIRST, SECOND, POOLED_WIDTH, SIZE_WIDTH = 8, 12, 6, 4
WIDTH = FIRST + SECOND


def tiny_xl_unet(**changes):
    options = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * SIZE_WIDTH,
    }
    return tiny_unet(**{**options, **changes})


def xl_scheduler():
    """The scheduler of SDXL base."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        timestep_spacing="leading",
    )


def turbo_scheduler():
    """The scheduler of sdxl-turbo."""
    from diffusers import EulerAncestralDiscreteScheduler

    return EulerAncestralDiscreteScheduler.from_config(xl_scheduler().config, timestep_spacing="trailing")


def tiny_xl_network(prompts: int = 5, prediction_type: str = "epsilon", **options) -> TextConditioned:
    sizes = torch.tensor([16, 16, 0, 0, 16, 16]).expand(prompts, -1)
    table = Conditioning.of(torch.randn(prompts, 7, WIDTH)) | {
        POOLED: torch.randn(prompts, POOLED_WIDTH),
        TIME_IDS: sizes,
    }
    schedule = NoiseSchedule.from_scheduler(xl_scheduler())
    return TextConditioned(tiny_xl_unet(), PromptTable(table), schedule, prediction_type, **options)


def write_sdxl(folder: Path, scheduler=None, **changes) -> Path:
    """Write a folder as StableDiffusionXLPipeline saves it."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    size = write_tokenizer(folder / "tokenizer")

    def config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=POOLED_WIDTH,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )

    # The second tokenizer of SDXL pads with "!".
    second = CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(config(FIRST)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config(SECOND)).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=second,
        unet=tiny_xl_unet(**changes),
        scheduler=xl_scheduler() if scheduler is None else scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


__all__ = ["LATENTS", "SIZE", "WIDTH", "tiny_xl_network", "tiny_xl_unet", "turbo_scheduler", "write_sdxl"]
