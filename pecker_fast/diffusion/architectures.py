"""The text-conditional networks of diffusers that are understood: one entry of a table each.

An entry says how the network is called, and which tensors it takes beside the embeddings of the tokens. Everything else
(losses, masks, samplers, memory estimates) follows from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Config = Mapping[str, Any]
# Shape, without the batch, of each further tensor by the keyword that it is given as.
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """How a network is called.

    Parameters
    ----------
    sample : str or None
        Keyword of the noisy latents; None if latents and time are the first two arguments.
    width : str
        Key of the configuration with the width of the token embeddings.
    tokens : int
        Tokens of a prompt in an estimate of memory.
    shapes : callable
        From the configuration and the number of tokens to the further tensors that it needs.
    adapted : tuple of str
        Layers that get a low-rank update.
    """

    sample: str | None
    width: str
    tokens: int
    shapes: Callable[[Config, int], Shapes]
    adapted: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def check(self, name: str, config: Config) -> None:
        """Raise ValueError unless a transformer with this configuration draws from text alone."""
        channels = config["in_channels"], config.get("out_channels") or config["in_channels"]
        if channels[0] != channels[1]:
            raise ValueError(
                f"a {name} has {channels[0]} input and {channels[1]} output channels, expected as many of both"
            )


def _sd3(config: Config, tokens: int) -> Shapes:
    return {"pooled_projections": (config["pooled_projection_dim"],)}


def _sana(config: Config, tokens: int) -> Shapes:
    # SANA-Sprint is told the guidance that it was distilled with.
    guidance: Shapes = {"guidance": ()} if config.get("guidance_embeds") else {}
    return {"encoder_attention_mask": (tokens,), **guidance}


# Stable Diffusion's U-Net, whose kinds (SDXL's takes a pooled embedding) are checked in ``text``.
UNET = "UNet2DConditionModel"
UNET_ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
ARCHITECTURES: dict[str, Architecture] = {
    UNET: Architecture(None, "cross_attention_dim", 77, lambda config, tokens: {}, UNET_ADAPTED),
    "SD3Transformer2DModel": Architecture("hidden_states", "joint_attention_dim", 77 + 256, _sd3),
    "SanaTransformer2DModel": Architecture("hidden_states", "caption_channels", 300, _sana),
}


def architecture_name(network: nn.Module) -> str | None:
    """The key of a network in ``ARCHITECTURES``; None if it has none."""
    # By name, because importing diffusers takes seconds.
    return next((base.__name__ for base in type(network).__mro__ if base.__name__ in ARCHITECTURES), None)


def time_scale(config: Config) -> float:
    """Factor of the schedule's time that a network is given: SANA's own, which SANA-Sprint's pipeline leaves out."""
    return 1.0 if config.get("guidance_embeds") else config.get("timestep_scale", 1.0)
