"""``pecker-fast sample`` and ``pecker-fast mask``: draws images, and computes or shows a mask."""

from pathlib import Path
from typing import Literal

import torch

from ..diffusion import num_classes
from ..mask import SaliencyMask
from ..models import resolve
from ..report import save_grid
from ..training.presets import preset
from ..unlearning import Compute, ForgetRequest, Problem, Setting
from ..unlearning.masking import Masker, SaliencyOptions, density_by_module
from .options import PresetName, check_output


def sample(
    pretrained_model_name_or_path: str | None = None,
    preset_name: PresetName = "digits",
    labels: tuple[int, ...] = (),
    images_per_class: int = 10,
    sampler: Literal["auto", "one_step", "ddim", "ddpm"] = "auto",
    t_init: int | None = None,
    num_inference_steps: int | None = None,
    output: str = "samples.png",
    seed: int = 0,
) -> None:
    """Draws images of a network's classes into one picture, a row a class.

    Args:
        pretrained_model_name_or_path: Folder of a run or of a network; the one that comes with the preset by default.
        preset_name: digits, cifar10 or stl10.
        labels: Classes to draw; all by default.
        images_per_class: Images of each.
        sampler: auto: as a run of unlearning draws (in one step at its t_init, or by its own sampler), DDIM otherwise.
        t_init: Timestep of the one-step sampler; that of the run by default.
        num_inference_steps: Of ddim and ddpm; those of the run, or 50, by default.
        output: The picture, a PNG.
        seed: Of the noise.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class is {images_per_class}, expected at least 1")
    if not output.endswith(".png"):
        raise ValueError(f"output is {output!r}, expected a file that ends with .png")
    check_output(output)
    model = resolve(pretrained_model_name_or_path, shipped=preset(preset_name).network)
    classes = num_classes(model.network)
    chosen = torch.tensor(labels or range(classes)).repeat_interleave(images_per_class)
    drawn_by = model.sampler(sampler, t_init, num_inference_steps)
    images = drawn_by.draw(model.network, model.schedule, chosen, seed)
    save_grid(Path(output), images, chosen, tuple(map(str, range(classes))))
    print(f"{len(images)} images of {model.source}, sampler {drawn_by.kind}, seed {seed}: {output}")


def mask(
    inspect: str | None = None,
    pretrained_model_name_or_path: str | None = None,
    preset_name: PresetName = "digits",
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
    """Computes PECKER's mask for a pretrained network, or shows one from a file: density by tensor and by module.

    Args:
        inspect: Show this mask instead of computing one.
        pretrained_model_name_or_path: Folder of the network; the one that comes with the preset by default.
        preset_name: digits, cifar10 or stl10.
        forget_classes: Classes to forget.
        density: Share of the parameters to keep, in (0, 1]; 0.5 unless a threshold is given.
        threshold: Least magnitude of a salient gradient.
        saliency_batch_size: Samples in a batch.
        saliency_batches: Batches.
        saliency_samples: initial: of the one-step generator as it starts; teacher: by DDIM.
        t_init: Timestep at which the generator is fed noise; the preset's by default.
        output: File to save the mask to.
        seed: Of the samples.
    """
    if inspect is not None:
        if not Path(inspect).is_file():
            raise ValueError(f"inspect is {inspect!r}, no such file")
        _show(SaliencyMask.load(inspect))
        return
    if output is not None:
        check_output(output)
    if density is None and threshold is None:
        density = 0.5
    options = SaliencyOptions(
        density=density,
        threshold=threshold,
        saliency_batch_size=saliency_batch_size,
        saliency_batches=saliency_batches,
        saliency_samples=saliency_samples,
    )
    options.check_saliency()
    model = resolve(pretrained_model_name_or_path, shipped=preset(preset_name).network)
    network = model.network
    request = ForgetRequest.of(network, forget_classes, "random")
    setting = Setting(Problem(network, model.schedule, request), Compute(seed=seed))
    masker = Masker(setting, options, preset(preset_name).unlearning.get("t_init", 440) if t_init is None else t_init)
    masker.start(network)
    masker.refresh(0, network)
    _show(masker.mask)
    if output is not None:
        masker.mask.save(output)
        print(f"saved: {output}")


def _show(mask: SaliencyMask) -> None:
    print(mask.summary())
    if mask.names is not None:
        print("\nby module")
        for name, share in density_by_module(mask).items():
            print(f"{name:24}{share:8.1%}")
