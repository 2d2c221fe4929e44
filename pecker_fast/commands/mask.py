"""``pecker-fast mask``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ..mask import SaliencyMask
from ..parsing import parse_call
from ..runs.arguments import check_output
from ..runs.masks import compute_mask, describe_mask


def parse(words: Sequence[str]) -> Callable[[], None]:
    return parse_call(mask, words, "mask", aliases={"preset": "--preset-name"})


def mask(
    inspect: str | None = None,
    pretrained_model_name_or_path: str | None = None,
    preset: str = "digits",
    forget_classes: tuple[int, ...] = (0,),
    density: float | None = None,
    threshold: float | None = None,
    saliency_batch_size: int = 128,
    saliency_batches: int = 1,
    saliency_samples: Literal["initial", "teacher"] = "initial",
    t_init: int | None = None,
    output: str | None = None,
    seed: int = 0,
) -> None:
    """Compute PECKER's mask for a pretrained network, or show one from a file: density by tensor and by module.

    Parameters
    ----------
    inspect
        Show this mask instead of computing one.
    pretrained_model_name_or_path
        Folder of the network. Default: the preset's network.
    preset
        digits, digits16, cifar10 or stl10.
    forget_classes
        Classes to forget.
    density
        Share of the parameters in the mask, in (0, 1]. Default: 0.5 unless a threshold is given.
    threshold
        Least magnitude of a salient gradient.
    saliency_batch_size
        Samples in a batch.
    saliency_batches
        Number of batches.
    saliency_samples
        initial: samples of the one-step generator that training starts from; teacher: by DDIM.
    t_init
        Timestep at which the generator is fed noise. Default: the preset's.
    output
        File to save the mask to.
    seed
        Seed of the samples.
    """
    if inspect is not None:
        if not Path(inspect).is_file():
            raise ValueError(f"inspect is {inspect!r}, no such file")
        print(describe_mask(SaliencyMask.load(inspect)))
        return
    if output is not None:
        check_output(output)
    saliency = (saliency_batch_size, saliency_batches, saliency_samples)
    computed = compute_mask(
        pretrained_model_name_or_path, preset, forget_classes, density, threshold, *saliency, t_init, seed
    )
    print(describe_mask(computed))
    if output is not None:
        computed.save(output)
        print(f"saved: {output}")
