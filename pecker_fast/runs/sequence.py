"""``pecker-fast sequence``: requests that come one after the other, each starting from what the last one left."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from ..diffusion import Sampler
from ..environment import environment
from ..files import write_json
from ..metrics import Judge, load_judge
from ..models import resolve, save_network
from ..parallel import started_by_torchrun
from ..report import Run, portable, write_sequence
from ..robustness import confusion_matrix
from ..training.checkpoints import STATE, Checkpoints
from ..training.presets import preset as preset_of
from ..training.state import load_state
from ..unlearning import ForgetRequest, method_class
from ..unlearning.distillation import ScoreForgetting
from ..unlearning.streams import derived_seed
from .evaluation import DDIM_STEPS
from .several import assignment, check_given, command_line, ended, going_on, run_arguments
from .unlearn import UnlearnArguments, unlearn

# The score network that a request leaves for the next one.
SCORE = "score"


def sequence(
    forget_classes: tuple[int, ...] = (0, 3, 7),
    method: str = "pecker",
    preset: str = "digits",
    cover_class: str | None = None,
    score: Literal["previous", "teacher"] = "previous",
    at_once: bool = True,
    seed: int = 0,
    output_dir: str | None = None,
    pretrained_model_name_or_path: str | None = None,
    max_train_steps: int | None = None,
    samples_per_class: int | None = None,
    judge: str | None = None,
    set: tuple[str, ...] = (),
    keep_checkpoints: bool = False,
    progress_bar: bool = True,
) -> None:
    """Forgets classes one request after the other and measures all of them after each; then all at once, to compare.

    Request i forgets all classes asked for so far. One-step generators go on from the last request's generator with the
    pretrained network as teacher; other methods take the last request's network for the pretrained one. The same
    command again goes on where it was interrupted, and with more classes at the end it adds requests.

    Args:
        forget_classes: Classes, in the order in which they are asked for.
        method: Name of a method.
        preset: digits, cifar10 or stl10.
        cover_class: What is to be drawn in their place, retained throughout, or "random"; the preset's by default.
        score: What the score network of a request starts from: the last request's, or the pretrained network.
        at_once: Forget all of them in one request too, from the pretrained network.
        seed: Of everything random.
        output_dir: Folder of the sequence; runs/sequence-<preset>-<method>-seed<seed> by default.
        pretrained_model_name_or_path: The network to start from; the one that comes with the preset by default.
        max_train_steps: Iterations of each request; the method's by default.
        samples_per_class: Images of each class in an evaluation; the preset's by default.
        judge: File of the classifier for the evaluation; the one that comes with the preset by default.
        set: Options of the method, as name=value, such as generator_learning_rate=1e-4.
        keep_checkpoints: Keep the checkpoints and score networks of requests that have ended.
        progress_bar: Show a progress bar.
    """
    if started_by_torchrun():
        raise ValueError("sequence runs in one process: pecker-fast unlearn is the command for torchrun")
    if judge is None and preset_of(preset).judge is None:
        raise ValueError(f"judge is not given, and none comes with the preset {preset}")
    folder = Path(output_dir or f"runs/sequence-{preset}-{method}-seed{seed}")
    given = dict(assignment(item) for item in set)
    if max_train_steps is not None:
        given["max_train_steps"] = max_train_steps
    request = {
        "cover_class": cover_class,
        "pretrained_model_name_or_path": pretrained_model_name_or_path,
        "samples_per_class": samples_per_class,
        "judge": judge,
    }
    request = {name: value for name, value in request.items() if value is not None}

    def run_of(name: str, classes: tuple[int, ...], **further: str) -> UnlearnArguments:
        asked = {**request, "forget_classes": classes, **further}
        return run_arguments(preset, method, seed, folder / name, asked, given, progress_bar)

    distils = issubclass(method_class(method), ScoreForgetting)
    plan: list[UnlearnArguments] = []
    for i in range(len(forget_classes)):
        classes = forget_classes[: i + 1]
        further = _start(plan[-1].output_dir, distils, score) if plan else {}
        plan.append(run_of(f"request-{i + 1}-forget-{forget_classes[i]}", classes, **further))
    once = None
    if at_once and len(forget_classes) > 1:
        once = run_of("at-once-" + "-".join(map(str, forget_classes)), forget_classes)
    # What is wrong with the last of them is said before the first is run.
    network = resolve(pretrained_model_name_or_path, shipped=preset_of(preset).network).network
    first = run_of("request", forget_classes)
    ForgetRequest.of(network, forget_classes, first.cover_of(first.request.cover_class))
    check_given(given, [first])
    first.options.check()
    judging = Judge.load(judge) if judge else load_judge(preset_of(preset).judge)
    for args in (*plan, *([once] if once else [])):
        ended(args)
    try:
        _run(plan, once, distils and score == "previous", keep_checkpoints)
    except SystemExit:
        print("the same command again goes on here")
        raise
    rows = [_row(f"{i + 1}: forget {forget_classes[i]}", args, judging) for i, args in enumerate(plan)]
    if once:
        rows.append(_row("all at once", once, judging))
    told = {
        "command": command_line("sequence"),
        "method": method,
        "preset": preset,
        "seed": seed,
        "forget_classes": list(forget_classes),
        "cover_class": first.cover_of(first.request.cover_class),
        "score": score if distils else None,
        "rows": rows,
        "judge": {"name": judging.name, "accuracy": judging.accuracy},
        "environment": environment(),
    }
    write_json(folder / "sequence.json", portable(told))
    report, table = write_sequence(folder)
    print(table)
    print(f"report: {report}")


def _start(last: Path, distils: bool, score: str) -> dict[str, str]:
    """What a request starts from, given the folder of the one before it."""
    if not distils:
        return {"pretrained_model_name_or_path": str(last)}
    return {"initial_generator": str(last)} | ({"initial_score": str(last / SCORE)} if score == "previous" else {})


def _run(plan: list[UnlearnArguments], once: UnlearnArguments | None, keep_score: bool, keep_checkpoints: bool) -> None:
    """Runs what has not ended."""
    every = [*plan, *([once] if once else [])]
    source, before = plan[0].request.pretrained_model_name_or_path, None
    for i, args in enumerate(every):
        if not ended(args):
            print(f"[{i + 1} of {len(every)}] forget {', '.join(map(str, args.request.forget_classes))}")
            # Requests on one pretrained network share what it draws.
            shared = args.request.pretrained_model_name_or_path == source
            outcome = unlearn(going_on(args), before if shared else None)
            before = outcome.before if shared else before
        # The last one's serves the request that may come.
        serves = keep_score and args is not once and (args is plan[-1] or not ended(plan[i + 1]))
        if serves and not (args.output_dir / SCORE).is_dir():
            _keep_score(args.output_dir)
        if not keep_checkpoints:
            shutil.rmtree(args.output_dir / "checkpoints", ignore_errors=True)
            if 0 < i < len(plan):
                shutil.rmtree(plan[i - 1].output_dir / SCORE, ignore_errors=True)


def _keep_score(folder: Path) -> None:
    """Writes the score network of a run's last checkpoint into ``folder/score``.

    It follows the generator as that is now. The pretrained network in its place would take what is drawn for a
    forgotten class for what it once was, until it has learnt better.
    """
    checkpoints = Checkpoints(folder / "checkpoints", None, {})
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{folder} has neither a score network nor a checkpoint: begin anew, or take --score teacher")
    path = checkpoints.path(steps[-1])
    checkpoints.verify(path)
    model = resolve(folder / "unet")
    model.network.load_state_dict(load_state(path / STATE)["state"]["score"])
    temporary = folder / f".{SCORE}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_network(temporary, model.network, model.schedule)
    temporary.rename(folder / SCORE)


def _row(name: str, args: UnlearnArguments, judge: Judge) -> dict[str, Any]:
    """What is reported after a request: forgetting by class, and what is kept."""
    run = Run.read(args.output_dir)
    model = resolve(args.output_dir / "unet")
    count, classes = args.request.samples_per_class, judge.num_classes
    labels = torch.arange(classes).repeat_interleave(count)
    sampler = Sampler.one_step_or_ddim(run.config["options"].get("t_init"), DDIM_STEPS)
    images = sampler.draw(model.network, model.schedule, labels, derived_seed(args.compute.seed, "sequence"))
    share = 100 * confusion_matrix(judge, images, labels).double() / count
    forgotten = list(args.request.forget_classes)
    kept = [c for c in range(classes) if c not in forgotten]
    names = ("ua", "retain_accuracy", "frechet_distance", "frechet_real_split", "diversity", "images", "seconds")
    return {
        "request": name,
        "folder": args.output_dir.name,
        "forget_classes": forgotten,
        "ua_by_class": {str(c): 100 - share[c, forgotten].sum().item() for c in forgotten},
        "worst_retained_accuracy": min(share[c, c].item() for c in kept),
        **{key: run.metrics.get(key) for key in names},
    }
