"""The demo: one class of real handwritten digits forgotten by several methods, from the same weights and seed."""

from pathlib import Path
from typing import Any

from ..files import write_json
from ..report import comparison_table, write_comparison
from ..run_records import read_metrics
from ..unlearning import ForgetRequest
from .arguments import with_options
from .classes.names import cover_of
from .distilled import AUTO
from .presets import class_preset
from .pretrain import PretrainArguments, pretrain
from .several import check_alone, check_place, ended, resumed
from .task import unlearn_arguments
from .unlearn import unlearn

# metrics.json of the demo is that of the first.
METHODS = ("patch", "pecker", "sfd", "relabel")


def demo(
    forget_class: int = 0,
    cover_class: str = "1",
    seed: int = 0,
    output_dir: str = "runs/demo",
    max_train_steps: int | None = None,
    from_scratch: bool = False,
    profile: bool = False,
    preset: str = "digits",
    resume: bool = False,
) -> tuple[Path, str]:
    """Forget one class of real handwritten digits with a sparse patch, PECKER and SFD, measure it and write a report.

    The last row is relabel, the yardstick: the cover class's condition in place of the forgotten one's, without any
    training. The patch starts from the distilled generator that comes with the package, and on mnist so do the others;
    on the digits PECKER and SFD start from the pretrained network. Nothing is downloaded.

    Parameters
    ----------
    forget_class : int
        The digit to forget.
    cover_class : str
        The digit to draw in its place, or "random".
    seed : int
        Seed of everything random, for all methods.
    output_dir : str
        Folder of the report; an earlier demo there is replaced, unless it is resumed.
    max_train_steps : int, optional
        Iterations of each method. Default: the preset's.
    from_scratch : bool
        Pretrain the network first, and distil it for the patch.
    profile : bool
        Print the time of each part of an iteration.
    preset : str
        digits, digits16 or mnist.
    resume : bool
        Continue an earlier demo in the folder: runs that have ended are kept, one that was interrupted goes on from its
        last checkpoint.

    Returns
    -------
    tuple of Path and str
        report.md, and the table for a terminal.

    Raises
    ------
    ValueError
        If an option is wrong, before anything is written.
    """
    check_alone("demo")
    folder = Path(output_dir)
    check_place("demo", folder)
    # Checked before a network is pretrained.
    values = class_preset(preset)
    if values.network is None:
        raise ValueError(f"preset is {preset!r}, which has no network of its own: expected digits, digits16 or mnist")
    ForgetRequest(values.unet.num_classes, (forget_class,), cover_of(cover_class))
    options: dict[str, Any] = {"seed": seed, "profile": profile, "overwrite_output_dir": True}
    options |= {"forget_classes": (forget_class,), "cover_class": cover_class}
    length = {} if max_train_steps is None else {"max_train_steps": max_train_steps}
    own: dict[str, dict[str, Any]] = {method: {**values.demo, **length} for method in METHODS}
    # Drawn in one step like the others, if there is a generator for it.
    own["relabel"] = {} if from_scratch else {"distilled": AUTO}
    if from_scratch:
        base = PretrainArguments.defaults(preset)
        target = {"output_dir": str(folder / "pretrain"), "overwrite_output_dir": True, "seed": seed}
        args = with_options(base, target)
        if not (resume and (args.folder / "metrics.json").is_file()):
            print(f"pretrain: {base.options.max_train_steps} steps")
            pretrain(resumed(args) if resume else args)
        options["pretrained_model_name_or_path"] = str(folder / "pretrain" / "unet")
    metrics, runs, before = {}, {}, None
    for method in METHODS:
        args = unlearn_arguments(preset, method, {**options, **own[method], "output_dir": str(folder / method)})
        runs[method] = folder / method
        if resume and ended(args):
            print(f"{method}: has ended")
            metrics[method] = read_metrics(folder / method)
            continue
        print(f"{method}: {getattr(args.options, 'max_train_steps', 'no')} iterations")
        outcome = unlearn(resumed(args) if resume else args, before)
        metrics[method], before = outcome.metrics, outcome.before
    write_json(folder / "metrics.json", metrics[METHODS[0]])
    return write_comparison(folder, runs), comparison_table(metrics)
