"""The preset of one's own images, whose size, channels and classes decide the network."""

from dataclasses import replace

from ...diffusion import UNetConfig
from ...training.loop import LoopOptions
from .classes import CLASS_PRESETS
from .kinds import ClassPreset

# Channels of each level, from the finest.
WIDTHS = (24, 48, 96, 128)
# Height of the coarsest level: at least, and at most.
COARSEST = 4, 8
# The largest images that the widths are meant for, and the size to which larger pictures are scaled unless it is given.
LARGEST, USUAL = 64, 32
# The least size, and what sizes that are taken from the data are multiples of.
LEAST, STEP = 8, 4

_MNIST = CLASS_PRESETS["mnist"]


def size_for(shortest: int) -> int:
    """The size for pictures whose shortest side has so many pixels, all of which are at least 8.

    It is the largest multiple of 4 that needs no enlarging, but at most 32.
    """
    return min(USUAL, shortest // STEP * STEP)


def unet_for(size: int, channels: int, num_classes: int) -> UNetConfig:
    """A small network for images of ``size`` pixels, with as many levels as it takes to get down to 4 to 8 pixels.

    Raises
    ------
    ValueError
        If there is none for this size.
    """
    levels = 1
    while levels < len(WIDTHS) and size % 2**levels == 0 and size // 2**levels >= COARSEST[0]:
        levels += 1
    coarsest = size // 2 ** (levels - 1)
    if size > LARGEST:
        raise ValueError(
            f"sample_size is {size}, and the preset images has networks for {LEAST} to {LARGEST} pixels: choose a "
            "smaller --sample_size, or set --block_out_channels (--preset stl10 has the network of published work)"
        )
    if size < LEAST or coarsest > COARSEST[1]:
        best = min(range(LEAST, LARGEST + 1, 8), key=lambda n: abs(n - size))
        raise ValueError(
            f"sample_size is {size}, which cannot be halved down to {COARSEST[0]} to {COARSEST[1]} pixels: expected "
            f"such as --sample_size {best}, or --block_out_channels with other levels"
        )
    return replace(
        _MNIST.unet,
        sample_size=size,
        in_channels=channels,
        num_classes=num_classes,
        block_out_channels=WIDTHS[:levels],
    )


# The values of mnist, whose images are of about this size. Nothing comes with the package.
IMAGES = ClassPreset(
    dataset=None,
    # What the help shows; a run takes these from its data.
    unet=unet_for(USUAL, 3, 10),
    pretrain=replace(_MNIST.pretrain, max_train_steps=6000, random_shift=0),
    pretrain_in_bf16=True,
    pretrain_loop=_MNIST.pretrain_loop,
    unlearning=_MNIST.unlearning,
    guidance_scale=_MNIST.guidance_scale,
    num_inference_steps=_MNIST.num_inference_steps,
    methods=_MNIST.methods,
    loop=LoopOptions(logging_steps=5, checkpointing_steps=50, checkpoints_total_limit=2, validation_steps=10),
    forget_class=None,
    cover_class=None,
)
