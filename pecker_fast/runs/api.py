"""Runs from Python: ``unlearn``, ``distil``, ``evaluate`` and ``compare`` as functions, with the commands' options."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

from torch import nn

from ..models import StableDiffusionXL, conditioning_of, resolve, resolve_text, save_network, save_text_pipeline
from .arguments import UnlearnArguments, with_options
from .compare import Comparison, comparison_class
from .compare import compare as run_comparison
from .distilled import distil_arguments
from .evaluate import evaluate as measure
from .evaluate import evaluation_class
from .folder import check_folder
from .presets import PRESETS, ClassPreset, preset
from .remembered import record_of
from .run import Run
from .task import unlearn_arguments
from .unlearn import distil as run_distillation
from .unlearn import unlearn as run_unlearning

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# A preset, a folder or a name on the hub; or an object in memory.
Model = Union[str, os.PathLike, nn.Module, "DiffusionPipeline"]
# Subfolder of the run for a model that was an object in memory.
PRETRAINED = "pretrained"


def unlearn(
    model: Model,
    method: str = "pecker",
    *,
    forget: int | str | Sequence[int | str] | None = None,
    cover: int | str | None = None,
    distilled: Run | str | os.PathLike | None = None,
    preset: str | None = None,
    scheduler: Any = None,
    **options: Any,
) -> Run:
    """Make a pretrained diffusion model forget classes or a concept.

    Does what ``pecker-fast unlearn`` does: trains, measures, and writes a folder with the result, a report, and all
    that is needed to resume or to audit the run.

    Parameters
    ----------
    model : str, PathLike, nn.Module or DiffusionPipeline
        What to start from: the name of a preset ("digits": its network comes with the package), a folder, a name on the
        Hugging Face hub, a pipeline of diffusers, or a class-conditional ``UNet2DModel``. An object is not changed: it
        is copied into ``pretrained/`` in the folder of the run.
    method : str
        pecker, pecker+, patch, sfd, retrain, salun, selective_amnesia, esd or relabel.
    forget : int, str, or sequence of these
        Classes to forget, by number or name; or the name of a concept. Default: what the preset says, if ``model`` is a
        preset.
    cover : int or str
        Class to draw in their place, by number or name, or "random"; or the text to draw in place of the
        concept. Default: the preset's.
    distilled : Run, str or PathLike, optional
        A run of ``distil`` on the same model to start from, its folder, or "auto": the networks that come with the
        preset or are beside the model, which is distilled first if there are none. Default: "auto" for methods that
        need them, otherwise none.
    preset : str, optional
        The values for everything that is not set. Default: that of a run or pretraining whose folder is given;
        for a class-conditional network the preset with images of its size and channels (digits, digits16, mnist,
        cifar10, stl10); for a text-to-image model sd15-celebrity or sdxl-celebrity, whose values are for
        any concept with a name.
    scheduler : SchedulerMixin, optional
        The noise schedule of a ``UNet2DModel``; a pipeline has its own.
    **options
        Any option of ``pecker-fast unlearn --help_all``, such as ``output_dir``, ``max_train_steps``, ``density``,
        ``seed``, ``device`` or ``overwrite_output_dir``.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    ValueError
        If an option is out of range, a model or a file cannot be found or does not fit, or the folder already has a
        run. Nothing is trained then.
    TypeError
        If there is no option of a name, or ``forget`` is of the wrong kind.
    SystemExit
        With status 128 + n if signal n stopped the run, after a checkpoint.

    Examples
    --------
    >>> run = pf.unlearn("digits", method="pecker", forget=[0], cover=1)
    >>> run = pf.unlearn(pipe, forget="brad pitt", cover="a middle aged man", output_dir="runs/x")
    >>> run = pf.unlearn(unet, "salun", forget=3, preset="cifar10", scheduler=scheduler, data_root="data")
    """
    name = _preset_name(model, preset)
    if forget is None and not (_is_preset(model) or preset is not None or _names_request(options)):
        raise ValueError("forget is not given: expected classes, or the name of a concept")
    if distilled is not None:
        options["distilled"] = str(distilled.folder if isinstance(distilled, Run) else distilled)
    args = unlearn_arguments(name, method, {**options, **_request(name, forget, cover)})
    args = _on_model(args, model, scheduler)
    run_unlearning(args)
    return Run(args.folder)


def distil(model: Model, *, preset: str | None = None, scheduler: Any = None, **options: Any) -> Run:
    """Distil a pretrained diffusion model into a one-step generator and its score network.

    Does what ``pecker-fast distil`` does: trains, measures, and writes a folder from which ``unlearn`` starts with
    ``distilled``, once for many requests.

    Parameters
    ----------
    model : str, PathLike, nn.Module or DiffusionPipeline
        What to distil, as for ``unlearn``.
    preset : str, optional
        The values for everything that is not set, as for ``unlearn``.
    scheduler : SchedulerMixin, optional
        The noise schedule of a ``UNet2DModel``; a pipeline has its own.
    **options
        Any option of ``pecker-fast distil --help_all``, such as ``output_dir``, ``max_train_steps``, ``save_dtype``,
        ``seed``, ``device`` or ``overwrite_output_dir``.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    ValueError
        If an option is out of range, a model or a file cannot be found or does not fit, or the folder already has a
        run. Nothing is trained then.
    TypeError
        If there is no option of a name.
    SystemExit
        With status 128 + n if signal n stopped the run, after a checkpoint.

    Examples
    --------
    >>> distilled = pf.distil(pipe, preset="cifar10", output_dir="runs/distilled")
    >>> run = pf.unlearn(pipe, "sfd", forget=[3], cover=5, distilled=distilled)
    """
    args = _on_model(distil_arguments(_preset_name(model, preset), options), model, scheduler)
    run_distillation(args)
    return Run(args.folder)


def evaluate(run: Run | str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Measure a run, or any network, with samples that are drawn once.

    Does what ``pecker-fast evaluate`` does: writes evaluation.json, and adds what a run has not measured itself to its
    metrics.json and its report.

    Parameters
    ----------
    run : Run, str or PathLike
        A run, or a folder or a name on the hub of a network or a text-to-image model.
    **options
        Any option of ``pecker-fast evaluate --help``, such as ``samples_per_class`` and ``inception_weights``; for
        text-to-image models of ``pecker-fast evaluate-concept --help``.

    Returns
    -------
    dict
        Value of each figure by its key.

    Raises
    ------
    ValueError
        If an option is out of range, or a model or a file cannot be found or does not fit.
    TypeError
        If there is no option of a name.

    Examples
    --------
    >>> pf.evaluate(run, samples_per_class=1000)["frechet_distance"]
    """
    path = str(run.folder if isinstance(run, Run) else run)
    kind = evaluation_class([path], options.get("preset"), options)
    return measure(with_options(kind(run=path), options)).figures


def compare(
    preset: str = "digits",
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    *,
    set: Mapping[str, Any] | Sequence[str] = (),
    **options: Any,
) -> Comparison:
    """Run methods over seeds, and report means and spreads.

    Does what ``pecker-fast compare`` does. Called again with the same options it continues where it was interrupted:
    runs that have ended are read, not repeated.

    Parameters
    ----------
    preset : str
        Name of a preset.
    methods : sequence of str, optional
        Names of methods. Default: pecker, pecker+, sfd and relabel; for text-to-image models the rows of the published
        table and relabel.
    seeds : int, optional
        Number of seeds. Default: 3; for text-to-image models 1.
    set : Mapping or sequence of str
        Options for all methods that have them, such as ``{"generator_learning_rate": 1e-4}``.
    **options
        Any option of ``pecker-fast compare --preset <preset> --help``.

    Returns
    -------
    Comparison
        The runs, a table and the report.

    Raises
    ------
    ValueError
        If an option is out of range, before the first run starts.
    TypeError
        If there is no option of a name.

    Examples
    --------
    >>> print(pf.compare("digits", methods=["pecker", "sfd"], seeds=3))
    """
    assignments = [f"{name}={json.dumps(value)}" for name, value in set.items()] if isinstance(set, Mapping) else set
    values = {**options, "preset": preset, "set": tuple(assignments)}
    if methods is not None:
        values["methods"] = tuple(methods)
    if seeds is not None:
        values["seeds"] = seeds
    return run_comparison(with_options(comparison_class(preset)(), values))


def _is_preset(model: Model) -> bool:
    return isinstance(model, str) and model in PRESETS


def _preset_name(model: Model, name: str | None) -> str:
    """The preset of a run on ``model``, for which ``name`` was given."""
    if model is None:
        raise TypeError("model is None, expected a path, a name, a U-Net or a pipeline of diffusers")
    if not _is_preset(model):
        return name or _preset_for(model)
    if name is not None and name != model:
        raise ValueError(f"preset is {name!r}, but the model is the preset {model!r}: expected one of the two")
    return str(model)


def _on_model(args: UnlearnArguments, model: Model, scheduler: Any) -> UnlearnArguments:
    """The options of a run on ``model``, which is saved with the run if it is an object in memory."""
    if args.output.dry_run:
        raise TypeError("dry_run is an option of the command line only")
    if _is_preset(model):
        return args
    path = str(model) if isinstance(model, (str, os.PathLike)) else _save_pretrained(model, scheduler, args)
    return with_options(args, {"pretrained_model_name_or_path": path})


def _is_xl(model: Model) -> bool:
    try:
        return isinstance(resolve_text(model, name="model").parts, StableDiffusionXL)
    except ValueError:
        # What is wrong is said when the run reads it.
        return False


def _names_request(options: Mapping[str, Any]) -> bool:
    """Whether the options of the command say what to forget."""
    return any(name in options for name in ("forget_classes", "concept", "concepts", "forget_prompts"))


def _request(name: str, forget: int | str | Sequence[int | str] | None, cover: int | str | None) -> dict[str, Any]:
    """``forget`` and ``cover`` as the options of the command."""
    if isinstance(preset(name), ClassPreset):
        several = isinstance(forget, Sequence) and not isinstance(forget, str)
        values: dict[str, Any] = {"forget_classes": forget if forget is None or several else [forget]}
        values["cover_class"] = cover
    else:
        if forget is not None and not isinstance(forget, str):
            raise TypeError(f"forget is {forget!r}, expected a concept: {name} is for text-to-image models")
        values = {"concept": forget, "cover": cover}
    return {key: value for key, value in values.items() if value is not None}


def _preset_for(model: Model) -> str:
    """The preset for a model that is no preset itself. ValueError if there is none that fits."""
    record = record_of(model) if isinstance(model, (str, os.PathLike)) else {}
    if record:
        return record["preset"]
    if conditioning_of(model, name="model") == "prompts":
        return "sdxl-celebrity" if _is_xl(model) else "sd15-celebrity"
    network = resolve(model, name="model").network if isinstance(model, (str, os.PathLike)) else model
    config: Any = getattr(network, "unet", network).config
    candidates = [(name, values) for name, values in PRESETS.items() if isinstance(values, ClassPreset)]
    # Of images of one size, first those with as many classes.
    candidates.sort(key=lambda item: item[1].unet.num_classes != config["num_class_embeds"])
    for name, values in candidates:
        if (values.unet.sample_size, values.unet.in_channels) == (config["sample_size"], config["in_channels"]):
            return name
    size, channels = config["sample_size"], config["in_channels"]
    raise ValueError(
        f"preset is not given, and none is for images of {size} pixels and {channels} channels: expected one of "
        f"{', '.join(name for name, _ in candidates)}"
    )


def _save_pretrained(model: Any, scheduler: Any, args: UnlearnArguments) -> str:
    """Save an object in memory into the folder of the run, which can then be resumed and examined without it."""
    check_folder(args.folder, args.loop.resume_from_checkpoint, args.output.overwrite_output_dir)
    folder = args.folder / PRETRAINED
    if isinstance(preset(args.preset), ClassPreset):
        resolved = resolve(model, scheduler=scheduler, name="model")
        save_network(folder, resolved.network, resolved.schedule)
    else:
        text = resolve_text(model, name="model")
        save_text_pipeline(folder, text.load_unet(), text.parts, text.t_init)
    return str(folder)
