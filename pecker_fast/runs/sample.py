"""``pecker-fast sample`` and ``pecker-fast mask``: draws images, and computes or shows a mask."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..diffusion import NoiseSchedule, OneStepGenerator, num_classes, sample_ddim, sample_ddpm, sample_one_step
from ..mask import SaliencyMask
from ..report import save_grid
from ..training.presets import preset
from ..unlearning import Compute, ForgetRequest, Problem, Setting
from ..unlearning.masking import Masker, SaliencyOptions, density_by_module
from .options import PresetName, check_output, load_pretrained

# Of DDIM and DDPM, where neither the command nor a run says it.
STEPS = 50


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
    network, schedule, source = load_pretrained(pretrained_model_name_or_path, preset(preset_name).network)
    classes = num_classes(network)
    chosen = torch.tensor(labels or range(classes)).repeat_interleave(images_per_class)
    drawing = Drawing.of(network, sampler, t_init, num_inference_steps)
    images = drawing(network, schedule, chosen, seed)
    save_grid(Path(output), images, chosen, tuple(map(str, range(classes))))
    print(f"{len(images)} images of {source}, sampler {drawing.sampler}, seed {seed}: {output}")


@dataclass(frozen=True)
class Drawing:
    """How images of a network are drawn.

    Parameters
    ----------
    sampler: "one_step" (at ``t_init``), "ddim" or "ddpm" (in ``num_inference_steps``).
    guidance: further arguments of the two: guidance_scale, clip_sample.
    """

    sampler: str
    t_init: int | None = None
    num_inference_steps: int | None = None
    guidance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, sampler: str, t_init: int | None, num_inference_steps: int | None) -> "Drawing":
        """What was asked for, or what the run that the network is of says. ValueError for one step without t_init."""
        options = options_of(network)
        recorded = options.get("t_init")
        if sampler == "auto" and t_init is None and recorded is None and "eval_sampler" in options:
            guidance = {"guidance_scale": options["eval_guidance_scale"], "clip_sample": options["clip_sample"]}
            steps = options["num_inference_steps"] if num_inference_steps is None else num_inference_steps
            return cls(options["eval_sampler"], None, steps, guidance)
        t_init = recorded if t_init is None else t_init
        if sampler == "auto":
            sampler = "ddim" if t_init is None else "one_step"
        if sampler != "one_step":
            return cls(sampler, None, STEPS if num_inference_steps is None else num_inference_steps)
        if t_init is None:
            raise ValueError("t_init is not given, and the network is not of a run that says it")
        return cls(sampler, t_init)

    def __call__(
        self, network: nn.Module, schedule: NoiseSchedule, labels: Tensor, seed: int, batch_size: int = 256
    ) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of ``labels``."""
        if self.sampler == "one_step":
            generator = OneStepGenerator(schedule, self.t_init)
            return sample_one_step(network, generator, labels, batch_size=batch_size, seed=seed)
        draw = sample_ddim if self.sampler == "ddim" else sample_ddpm
        return draw(
            network, schedule, labels, self.num_inference_steps, batch_size=batch_size, seed=seed, **self.guidance
        )

    def describe(self) -> dict[str, Any]:
        """What settles the images beside network, labels and seed, as JSON."""
        return {
            "sampler": self.sampler,
            "t_init": self.t_init,
            "num_inference_steps": self.num_inference_steps,
            **self.guidance,
        }


def options_of(network: nn.Module) -> dict[str, Any]:
    """The options of the run, or the configuration of the pipeline, that the network was read from, local or of the
    hub; empty where it was read from neither."""
    # diffusers keeps the folder that it read.
    path = network.config.get("_name_or_path")
    return {} if path is None else recorded_options(Path(path))


def recorded_options(path: Path) -> dict[str, Any]:
    """The same for the folder of a network, a run or a pipeline."""
    for folder in (path, path.parent):
        for name in ("config.json", "model_index.json"):
            try:
                said = json.loads((folder / name).read_text())
                found = said.get("options", said)
                if "t_init" in found or "eval_sampler" in found:
                    return found
            except (OSError, ValueError, TypeError, AttributeError):
                continue
    return {}


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
    network, schedule, _ = load_pretrained(pretrained_model_name_or_path, preset(preset_name).network)
    request = ForgetRequest.of(network, forget_classes, "random")
    setting = Setting(Problem(network, schedule, request), Compute(seed=seed))
    masker = Masker(setting, options, preset(preset_name).unlearning.get("t_init", 440) if t_init is None else t_init)
    masker.start(network)
    masker.refresh(0, network)
    _show(masker.mask)
    if output is not None:
        masker.mask.save(output)
        print(f"saved: {output}")


def _show(found: SaliencyMask) -> None:
    print(found.summary())
    if found.names is not None:
        print("\nby module")
        for name, share in density_by_module(found).items():
            print(f"{name:24}{share:8.1%}")
