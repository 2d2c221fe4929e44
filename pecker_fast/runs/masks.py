"""The mask that PECKER starts with, computed for a pretrained network."""

from pathlib import Path
from typing import Literal

from ..diffusion import class_names
from ..mask import SaliencyMask
from ..models import resolve
from ..unlearning import Compute, ForgetRequest, Problem, Setting
from ..unlearning.masking import Masker, SaliencyOptions, density_by_module
from .arguments import check_output, check_unused
from .classes.names import labels_of
from .folder import run_config
from .presets import class_preset

# Timestep of the one-step generator if the preset does not say it.
T_INIT = 440


def mask(
    run: str | None = None,
    inspect: str | None = None,
    pretrained_model_name_or_path: str | None = None,
    preset: str = "digits",
    forget_classes: tuple[str, ...] = ("0",),
    density: float | None = None,
    threshold: float | None = None,
    saliency_batch_size: int = 128,
    saliency_batches: int = 1,
    saliency_samples: Literal["initial", "teacher"] = "initial",
    t_init: int | None = None,
    output: str | None = None,
    seed: int = 0,
) -> SaliencyMask:
    """Compute PECKER's mask for a pretrained network, or read that of a run or a file.

    Parameters
    ----------
    run : str, optional
        A run whose last mask is read, a file with a mask, or the folder of a network whose mask is computed.
    inspect : str, optional
        Read the mask in this file instead of computing one.
    pretrained_model_name_or_path : str, optional
        Folder of the network. Default: the preset's network.
    preset : str
        digits, digits16, mnist, cifar10 or stl10.
    forget_classes : tuple of str
        Classes to forget, by number or name.
    density : float, optional
        Share of the parameters in the mask, in (0, 1]. Default: 0.5 unless a threshold is given.
    threshold : float, optional
        Least magnitude of a salient gradient.
    saliency_batch_size : int
        Samples in a batch.
    saliency_batches : int
        Number of batches.
    saliency_samples : {"initial", "teacher"}
        initial: samples of the one-step generator that training starts from; teacher: by DDIM.
    t_init : int, optional
        Timestep at which the generator is fed noise. Default: the preset's.
    output : str, optional
        File to save the mask to.
    seed : int
        Seed of the samples.

    Returns
    -------
    SaliencyMask
        Over the parameters of the network, by name.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong.
    """
    values = locals()
    if run is not None:
        inspect, network = _place(run)
        check_unused(mask, values, ["inspect", "pretrained_model_name_or_path"], f"{run} is given as well")
        pretrained_model_name_or_path = network
    if inspect is not None:
        if not Path(inspect).is_file():
            raise ValueError(f"inspect is {inspect!r}, no such file")
        check_unused(mask, values, values.keys() - {"run", "inspect"}, f"the mask in {inspect} is read, not computed")
        return SaliencyMask.load(inspect)
    if output is not None:
        check_output(output, ".safetensors", "a mask", SaliencyMask.load)
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
    known = class_preset(preset)
    model = resolve(pretrained_model_name_or_path, shipped=known.network)
    request = ForgetRequest.of(model.network, labels_of(forget_classes, class_names(model.network)), "random")
    setting = Setting(Problem(model.network, model.schedule, request), Compute(seed=seed))
    masker = Masker(setting, options, known.unlearning.get("t_init", T_INIT) if t_init is None else t_init)
    masker.start(model.network)
    masker.refresh(0, model.network)
    if output is not None:
        masker.mask.save(output)
    return masker.mask


def _place(run: str) -> tuple[str | None, str | None]:
    """The file of a mask to read, or the network whose mask is computed."""
    path, config = Path(run), run_config(Path(run))
    if path.is_file():
        return run, None
    file = path / "mask.safetensors"
    if config and not file.is_file():
        raise ValueError(
            f"run is {run!r}, which has no {file.name}: {config['method']} has no mask, or the run has not ended "
            "(a mask of its network is computed with --pretrained_model_name_or_path)"
        )
    return (str(file), None) if config else (None, run)


def describe_mask(mask: SaliencyMask) -> str:
    """Count and density of a mask, by tensor and by module, as lines to read."""
    lines = [mask.summary()]
    if mask.names is not None:
        lines += ["", "by module"]
        lines += [f"{name:24}{share:8.1%}" for name, share in density_by_module(mask).items()]
    return "\n".join(lines)
