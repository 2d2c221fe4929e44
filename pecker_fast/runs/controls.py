"""The networks that a run is compared with, made on request: one that never saw the class, and a relabelled one."""

from pathlib import Path
from typing import Any

from .arguments import UnlearnArguments
from .distilled import distil_arguments
from .folder import run_config
from .several import ended, resumed
from .subject import RETRAIN
from .task import unlearn_arguments
from .unlearn import unlearn

# Options of a run that its controls take.
SHARED = ("pretrained_model_name_or_path", "checkpoint_state", "judge", "dataset_name", "data_root")


def never_saw(config: dict[str, Any], folder: Path, retrained: str | None, device: str | None, progress: bool) -> Path:
    """Make a network that never saw the classes of a run, and distil it if the run draws in one step.

    The first is a run of retrain on the preset. The second is a run of SFD on that network with forget weights of 0, so
    that it is distilled on the retained classes alone: with the preset's options of distillation if the run started
    from a distilled generator, otherwise with those of SFD. What is there already is used again.

    Parameters
    ----------
    config : dict
        config.json of the run.
    folder : Path
        Where the controls are kept.
    retrained : str or None
        Folder of a run of retrain that exists already.
    device, progress
        Where to compute, and whether to show progress.

    Returns
    -------
    Path
        Folder of the control.

    Raises
    ------
    ValueError
        If an option is wrong, or a folder has another run.
    """
    base = _shared(config, device, progress)
    if retrained is None:
        target = {**base, "output_dir": str(folder / RETRAIN)}
        retrained = str(_made(unlearn_arguments(config["preset"], RETRAIN, target)))
    t_init = config["options"].get("t_init")
    if t_init is None:
        return Path(retrained)
    own = unlearn_arguments(config["preset"], "sfd").options
    options = {"score_forget_weight": 0.0, "generator_forget_weight": 0.0, "t_init": t_init}
    if config.get("distilled") is not None or config.get("initial_generator") is not None:
        source = distil_arguments(config["preset"]).options
        names = ("max_train_steps", "score_learning_rate", "generator_learning_rate", "train_batch_size", "ema_decay")
        options |= {name: getattr(source, name) for name in names if hasattr(own, name)}
    target = {**base, **options, "pretrained_model_name_or_path": retrained, "checkpoint_state": "auto"}
    target["output_dir"] = str(folder / f"one-step-{options.get('max_train_steps', own.max_train_steps)}")
    return _made(unlearn_arguments(config["preset"], "sfd", target))


def relabelled_run(config: dict[str, Any], folder: Path, device: str | None, progress: bool) -> Path:
    """Relabel a generator, which is distilled first if there is none. Arguments and errors: as of ``never_saw``."""
    base = {**_shared(config, device, progress), "seed": config["seed"], "distilled": "auto"}
    t_init = config["options"]["t_init"]
    target = {**base, "t_init": t_init, "output_dir": str(folder / f"relabel-seed{config['seed']}")}
    return _made(unlearn_arguments(config["preset"], "relabel", target))


def is_retrained(path: str | None) -> bool:
    """Whether it is the folder of a run of retrain."""
    return path is not None and run_config(Path(path)).get("method") == RETRAIN


def _shared(config: dict[str, Any], device: str | None, progress: bool) -> dict[str, Any]:
    cover = config["cover_class"]
    request = {
        "forget_classes": tuple(config["forget_classes"]),
        "cover_class": "random" if cover is None else str(cover),
    }
    given = {name: config[name] for name in SHARED if config.get(name) is not None}
    # The attacks measure the controls before their first step.
    fixed = {"evaluate": False, "overwrite_output_dir": True}
    return {**given, **request, **fixed, "device": device, "progress_bar": progress}


def _made(args: UnlearnArguments) -> Path:
    """The folder of a run, which is carried out if it has not ended."""
    if not ended(args):
        print(f"control: {args.method} in {args.folder}")
        unlearn(resumed(args))
    return args.folder
