"""The demo: one class of real handwritten digits forgotten by several methods, from the same weights and seed."""

from pathlib import Path
from typing import Any

from ..files import write_json
from ..report import comparison_table, write_comparison
from ..unlearning import ForgetRequest
from .arguments import with_options
from .classes.data import cover_of
from .distilled import AUTO
from .pretrain import PretrainArguments, pretrain
from .several import check_alone
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
) -> tuple[Path, str]:
    """Forget one class of real handwritten digits with a sparse patch, PECKER and SFD, measure it and write a report.

    The last row is relabel, the yardstick: the cover class's condition in place of the forgotten one's, without any
    training. The patch starts from the distilled generator that comes with the package, PECKER and SFD from the
    pretrained network; nothing is downloaded.

    Parameters
    ----------
    forget_class : int
        The digit to forget.
    cover_class : str
        The digit to draw in its place, or "random".
    seed : int
        Seed of everything random, for all methods.
    output_dir : str
        Folder of the report; an earlier demo there is replaced.
    max_train_steps : int, optional
        Iterations of each method. Default: the preset's.
    from_scratch : bool
        Pretrain the network first, and distil it for the patch.
    profile : bool
        Print the time of each part of an iteration.

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
    # Checked before a network is pretrained.
    ForgetRequest(10, (forget_class,), cover_of(cover_class))
    options: dict[str, Any] = {"seed": seed, "profile": profile, "overwrite_output_dir": True}
    options |= {"forget_classes": (forget_class,), "cover_class": cover_class}
    own: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
    if max_train_steps is not None:
        own = {method: {"max_train_steps": max_train_steps} for method in METHODS}
    # Drawn in one step like the others, if there is a generator for it.
    own["relabel"] = {} if from_scratch else {"distilled": AUTO}
    if from_scratch:
        base = PretrainArguments.defaults("digits")
        print(f"pretrain: {base.options.max_train_steps} steps")
        target = {"output_dir": str(folder / "pretrain"), "overwrite_output_dir": True, "seed": seed}
        pretrain(with_options(base, target))
        options["pretrained_model_name_or_path"] = str(folder / "pretrain" / "unet")
    metrics, runs, before = {}, {}, None
    for method in METHODS:
        args = unlearn_arguments("digits", method, {**options, **own[method], "output_dir": str(folder / method)})
        print(f"{method}: {getattr(args.options, 'max_train_steps', 'no')} iterations")
        outcome = unlearn(args, before)
        metrics[method], runs[method], before = outcome.metrics, folder / method, outcome.before
    write_json(folder / "metrics.json", metrics[METHODS[0]])
    return write_comparison(folder, runs), comparison_table(metrics)
