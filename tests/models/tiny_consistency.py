"""A class-conditional consistency model with a few thousand random weights, in the layout of those of ImageNet 64."""

from pathlib import Path

import torch

CLASSES, SIZE = 5, 8


def tiny_unet():
    """The architecture of openai/diffusers-cd_imagenet64_l2 with fewer levels and channels."""
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        num_class_embeds=CLASSES,
        block_out_channels=(8, 16),
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
        upsample_type="resnet",
        downsample_type="resnet",
    )
    with torch.no_grad():
        # So that classes differ, and samples are not all clipped.
        unet.class_embedding.weight.mul_(3)
    return unet.eval()


def write_consistency_model(folder: Path, **scheduler) -> Path:
    """Write a folder as ``ConsistencyModelPipeline`` saves it."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    options = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, **scheduler}
    ConsistencyModelPipeline(tiny_unet(), CMStochasticIterativeScheduler(**options)).save_pretrained(folder)
    return folder
