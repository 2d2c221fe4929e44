"""``pecker-fast demo``: real digits, one class forgotten by three methods from the same weights and seed."""

import dataclasses
import time
from pathlib import Path

from ..files import write_json
from ..parallel import started_by_torchrun
from ..report import comparison_table, write_comparison
from ..unlearning import ForgetRequest
from .pretrain import PretrainArguments, PretrainRequest, pretrain
from .unlearn import UnlearnArguments, unlearn

# The first is the demo's subject: metrics.json is its.
METHODS = ("pecker", "pecker+", "sfd")


def demo(
    forget_class: int = 0,
    cover_class: str = "1",
    seed: int = 0,
    output_dir: str = "runs/demo",
    max_train_steps: int | None = None,
    from_scratch: bool = False,
    profile: bool = False,
) -> None:
    """Forgets one class of real handwritten digits with PECKER, PECKER+ and SFD, measures it and writes a report.

    Starts from a pretrained network that comes with the package; nothing is downloaded.

    Args:
        forget_class: The digit to forget.
        cover_class: The digit that is to be drawn in its place, or "random".
        seed: Of everything random; all methods run on it.
        output_dir: Folder of the report; an earlier demo there is replaced.
        max_train_steps: Iterations of each method; the preset's by default.
        from_scratch: Pretrain the network first.
        profile: Print where the time of an iteration goes.
    """
    if started_by_torchrun():
        raise ValueError("demo runs in one process: pecker-fast unlearn is the command for torchrun")
    start = time.perf_counter()
    folder = Path(output_dir)
    # Checked before a network is pretrained for it.
    ForgetRequest(10, (forget_class,), UnlearnArguments.cover_of(cover_class))
    network = None
    if from_scratch:
        base = PretrainArguments.defaults("digits")
        request = PretrainRequest(output_dir=str(folder / "pretrain"), overwrite_output_dir=True)
        compute = dataclasses.replace(base.compute, seed=seed)
        print(f"pretrain: {base.options.max_train_steps} steps")
        pretrain(dataclasses.replace(base, request=request, compute=compute))
        network = str(folder / "pretrain" / "unet")
    metrics, runs, before = {}, {}, None
    for method in METHODS:
        base = UnlearnArguments.defaults("digits", method)
        options = base.options
        if max_train_steps is not None:
            options = dataclasses.replace(options, max_train_steps=max_train_steps)
        request = dataclasses.replace(
            base.request,
            pretrained_model_name_or_path=network,
            output_dir=str(folder / method),
            overwrite_output_dir=True,
            forget_classes=(forget_class,),
            cover_class=cover_class,
        )
        compute = dataclasses.replace(base.compute, seed=seed, profile=profile)
        print(f"{method}: {options.max_train_steps} iterations")
        args = dataclasses.replace(base, options=options, request=request, compute=compute)
        outcome = unlearn(args, before)
        metrics[method], runs[method], before = outcome.metrics, folder / method, outcome.before
    write_json(folder / "metrics.json", metrics[METHODS[0]])
    report = write_comparison(folder, runs)
    covered = "a random other digit" if cover_class == "random" else f"a {cover_class}"
    print(f"\nAsked to draw a {forget_class}, the network now is to draw {covered}.")
    print(comparison_table(metrics))
    print(f"{time.perf_counter() - start:.0f} s in all; report: {report}")
