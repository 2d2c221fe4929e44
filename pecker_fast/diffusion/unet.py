"""The class-conditional U-Net (diffusers' ``UNet2DModel``): configuration and classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checks import check_int, check_number
from .networks import unwrap

if TYPE_CHECKING:
    from diffusers import UNet2DModel

# Keys in the network's configuration. diffusers ignores names with an underscore, but writes and reads them.
NUM_CLASSES = "_num_classes"
CLASS_NAMES = "_class_names"
GUIDANCE_SCALE = "_guidance_scale"
SAMPLING_STEPS = "_num_inference_steps"


@dataclass(frozen=True)
class UNetConfig:
    """DDPM's U-Net (arXiv 2006.11239, Appendix B) with a class embedding that is added to the time embedding.

    The defaults are DDPM's configuration for 32 x 32 pixels.

    Parameters
    ----------
    sample_size : int
        Height and width, a multiple of 2 ** (levels - 1).
    num_classes : int
        Real classes, with labels 0 to num_classes - 1.
    null_label : bool
        Whether one more label, num_classes, means "no condition" (for guidance).
    in_channels : int
        Channels of the image and of the predicted noise.
    block_out_channels : tuple of int
        Channels of each level, from the finest; multiples of ``norm_num_groups``.
    layers_per_block : int
        Residual blocks of each level.
    attention_resolutions : tuple of int
        Heights of the levels with self-attention; each must be a level's, sample_size / 2 ** i.
    mid_attention : bool
        Whether the middle block has self-attention.
    attention_head_dim : int or None
        Channels of a head; None for one head, as in DDPM.
    norm_num_groups : int
        Groups of all group norms.
    dropout : float
        Rate in the residual blocks, in [0, 1).

    Raises
    ------
    ValueError, TypeError
        If a value is out of range, does not fit the others, or has another type.
    """

    sample_size: int
    num_classes: int
    null_label: bool = False
    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    mid_attention: bool = True
    attention_head_dim: int | None = None
    norm_num_groups: int = 32
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("sample_size", "num_classes", "in_channels", "layers_per_block", "norm_num_groups"):
            check_int(name, getattr(self, name), 1)
        # Configurations from JSON have lists.
        for name in ("block_out_channels", "attention_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.block_out_channels:
            raise ValueError("block_out_channels is empty, expected at least one level")
        for channels in self.block_out_channels:
            check_int("block_out_channels", channels, 1)
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {channels}, expected multiples of norm_num_groups, {self.norm_num_groups}"
                )
        if self.block_out_channels[0] % 2:
            raise ValueError("block_out_channels starts with an odd number, expected an even one (sines and cosines)")
        factor = 2 ** (len(self.block_out_channels) - 1)
        if self.sample_size % factor:
            raise ValueError(f"sample_size is {self.sample_size}, expected a multiple of {factor}, 2 ** (levels - 1)")
        unknown = sorted(set(self.attention_resolutions) - set(self.resolutions))
        if unknown:
            raise ValueError(f"attention_resolutions has {unknown}, expected some of the levels' {self.resolutions}")
        if self.attention_head_dim is not None:
            check_int("attention_head_dim", self.attention_head_dim, 1)
        check_number("dropout", self.dropout, 0, 1, open_high=True)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height of each level."""
        return tuple(self.sample_size // 2**i for i in range(len(self.block_out_channels)))


def build_unet(config: UNetConfig) -> "UNet2DModel":
    """Build a ``UNet2DModel`` with random weights from torch's global generator, float32 on the CPU in train mode."""
    from diffusers import UNet2DModel

    attention = [size in config.attention_resolutions for size in config.resolutions]
    unet = UNet2DModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        up_block_types=tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        add_attention=config.mid_attention,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        num_class_embeds=config.num_classes + config.null_label,
        # As in DDPM's own code; diffusers' defaults differ.
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
        norm_eps=1e-6,
    )
    register_classes(unet, config.num_classes)
    return unet


def fresh_unet(like: nn.Module) -> "UNet2DModel":
    """Build a ``UNet2DModel`` of the architecture of ``like`` with random weights, as ``build_unet`` does."""
    check_class_conditional(like)
    like = unwrap(like)
    unet = like.from_config(like.config)
    register_classes(unet, num_classes(like), class_names(like))
    register_sampling(unet, guidance_scale(like), sampling_steps(like))
    return unet


def check_class_conditional(unet: nn.Module) -> None:
    """Raise ValueError unless ``unet`` is a ``UNet2DModel`` with an embedding of class labels."""
    unet = unwrap(unet)
    # By name, because importing diffusers takes seconds.
    if not any(base.__name__ == "UNet2DModel" for base in type(unet).__mro__):
        raise ValueError(f"unet is a {type(unet).__name__}, expected a UNet2DModel")
    if unet.config["class_embed_type"] is not None or unet.config["num_class_embeds"] is None:
        raise ValueError("unet has no embedding of class labels, expected one (num_class_embeds)")


def register_classes(unet: "UNet2DModel", num_classes: int, names: Sequence[str] = ()) -> None:
    """Record in the configuration how many rows of the class embedding are real classes, and their names.

    They are all rows, or all but the last, which is then the null label. Networks that ``build_unet`` did not build
    need this: without it all rows count as classes.

    Parameters
    ----------
    unet : UNet2DModel
        Its configuration is changed.
    num_classes : int
        Number of real classes.
    names : sequence of str
        A name for each class, in the order of their labels. None are recorded if it is empty, or if the names are the
        labels themselves.

    Raises
    ------
    ValueError
        If the network has no class labels, or ``num_classes`` or the names do not fit its embedding.
    """
    check_class_conditional(unet)
    rows = unwrap(unet).config["num_class_embeds"]
    check_int("num_classes", num_classes, max(1, rows - 1), rows + 1)
    if names and len(names) != num_classes:
        raise ValueError(f"names has {len(names)} names, expected one for each of {num_classes} classes")
    named = {CLASS_NAMES: list(names)} if list(names) != [str(label) for label in range(len(names))] else {}
    unwrap(unet).register_to_config(**{NUM_CLASSES: num_classes}, **named)


def class_names(unet: nn.Module) -> tuple[str, ...]:
    """The names of the classes, in the order of their labels; empty if the configuration has none."""
    return tuple(unwrap(unet).config.get(CLASS_NAMES) or ())


def register_sampling(unet: "UNet2DModel", guidance_scale: float = 1.0, num_inference_steps: int | None = None) -> None:
    """Record in the configuration how the network is sampled by DDIM.

    Parameters
    ----------
    unet : UNet2DModel
        The network.
    guidance_scale : float
        1, no guidance, is not recorded.
    num_inference_steps : int, optional
        Steps of DDIM. None is not recorded.

    Raises
    ------
    ValueError
        If ``guidance_scale`` is no number of at least 0, or is not 1 although the network has no null label; if there
        is less than one step.
    """
    check_number("guidance_scale", guidance_scale)
    if guidance_scale != 1:
        if null_label(unet) is None:
            raise ValueError(
                f'guidance_scale is {guidance_scale:g}, but the network has no label for "no condition": expected 1'
            )
        unwrap(unet).register_to_config(**{GUIDANCE_SCALE: float(guidance_scale)})
    if num_inference_steps is not None:
        check_int("num_inference_steps", num_inference_steps, 1)
        unwrap(unet).register_to_config(**{SAMPLING_STEPS: num_inference_steps})


def guidance_scale(unet: nn.Module) -> float:
    """The guidance scale at which the network is sampled; 1, no guidance, unless the configuration has another."""
    scale = _recorded(unet).get(GUIDANCE_SCALE, 1.0)
    check_number(GUIDANCE_SCALE, scale)
    return float(scale)


def sampling_steps(unet: nn.Module) -> int | None:
    """The steps of DDIM by which the network is sampled; None unless the configuration has them."""
    steps = _recorded(unet).get(SAMPLING_STEPS)
    if steps is not None:
        check_int(SAMPLING_STEPS, steps, 1)
    return steps


def _recorded(unet: nn.Module) -> Mapping[str, Any]:
    return getattr(unwrap(unet), "config", None) or {}


def num_classes(unet: nn.Module) -> int:
    """Count the real classes of the network, without the null label. ValueError if it has no class labels."""
    check_class_conditional(unet)
    config = unwrap(unet).config
    return config.get(NUM_CLASSES, config["num_class_embeds"])


def null_label(unet: nn.Module) -> int | None:
    """Return the label of "no condition", or None if the network has none.

    It is num_classes for a ``UNet2DModel``, and the attribute ``null_label`` for other networks.
    """
    own = getattr(unwrap(unet), "null_label", None)
    if own is not None:
        return own
    classes = num_classes(unet)
    return classes if classes < unwrap(unet).config["num_class_embeds"] else None
