"""Requests one after the other, each starting from the result of the one before."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..diffusion import Sampler, pretrained_sampler
from ..environment import environment
from ..files import write_json
from ..metrics import Judge
from ..models import resolve, save_network
from ..report import RunRecord, portable, write_sequence
from ..robustness import confusion_matrix
from ..unlearning import ForgetRequest, method_class
from ..unlearning.score_forgetting import ScoreForgetting
from ..unlearning.streams import derived_seed
from .arguments import UnlearnArguments, with_options
from .audit import record_hashes
from .classes.data import find_judge
from .classes.names import cover_of, named
from .classes.task import ClassTask
from .distilled import SCORE, last_score
from .patches import make_patch
from .presets import class_preset
from .run import Run
from .several import assignment, check_alone, check_place, check_shared, command_line, ended, resumed, run_arguments
from .unlearn import unlearn

# Options of the sequence that its runs take, under the same names.
OF_RUNS = ("cover_class", "pretrained_model_name_or_path", "samples_per_class", "judge")
# Options that earlier runs may have recorded, or that may be names.
SETTLED = ("forget_classes", "cover_class", "judge")
# Option of methods with a fixed mask: masks whose entries they leave alone.
TAKEN = "disjoint_from"
# File of what a request with such a method changed.
PATCH = "patch.safetensors"


@dataclass(frozen=True, kw_only=True)
class RequestsArguments(ABC):
    """Options that sequences of classes and of concepts share."""

    method: str
    """Name of a method."""
    preset: str
    """Name of a preset."""
    score: Literal["previous", "teacher"] = "previous"
    """What the score network of a request starts from: the previous request's, or the pretrained network."""
    disjoint: bool = True
    """Methods with a fixed mask (patch): each request leaves alone what earlier ones changed."""
    at_once: bool = True
    """Also forget all of them in one request, from the pretrained network."""
    seed: int = 0
    """Seed of everything random."""
    output_dir: str | None = None
    """Folder of the sequence. Default: runs/sequence-<preset>-<method>-seed<seed>."""
    max_train_steps: int | None = None
    """Iterations of each request. Default: the method's."""
    set: tuple[str, ...] = ()
    """Options of the method, as name=value, such as generator_learning_rate=1e-4."""
    keep_checkpoints: bool = False
    """Keep the checkpoints and score networks of requests that have ended."""
    progress_bar: bool = True
    """Show a progress bar."""

    @property
    def folder(self) -> Path:
        """The folder of the sequence."""
        return Path(self.output_dir or f"runs/sequence-{self.preset}-{self.method}-seed{self.seed}")

    @property
    def shared(self) -> dict[str, Any]:
        """Options of the method that are set."""
        values = dict(assignment(item) for item in self.set)
        return values if self.max_train_steps is None else {**values, "max_train_steps": self.max_train_steps}

    @property
    @abstractmethod
    def first(self) -> dict[str, Any]:
        """Options that the first request has and later ones have not."""

    @property
    def distils(self) -> bool:
        """Whether the method trains a one-step generator and a score network."""
        return issubclass(method_class(self.method), ScoreForgetting)

    @property
    def keeps_score(self) -> bool:
        """Whether a request starts from the score network of the one before."""
        return self.distils and self.score == "previous"

    @property
    def patches(self) -> bool:
        """Whether the method has a fixed mask, so that each request leaves a patch file."""
        return TAKEN in {item.name for item in fields(method_class(self.method).Options)}

    def start(self, earlier: Sequence[UnlearnArguments]) -> dict[str, Any]:
        """Options of a request that say what it starts from; ``earlier``: the requests before it."""
        if not earlier:
            return self.first
        last = earlier[-1].folder
        name = "initial_generator" if self.distils else "pretrained_model_name_or_path"
        values: dict[str, Any] = {name: str(last)}
        if self.keeps_score:
            values["initial_score"] = str(last / SCORE)
        if self.patches and self.disjoint:
            values[TAKEN] = tuple(str(run.folder / "mask.safetensors") for run in earlier)
        return values

    def request(
        self, name: str, own: Mapping[str, Any], names: Sequence[str], more: Mapping[str, Any]
    ) -> UnlearnArguments:
        """The options of one request: those called ``names`` of the sequence, if set, then ``own``, then ``more``."""
        options = {key: getattr(self, key) for key in names if getattr(self, key) is not None}
        options |= {**own, "progress_bar": self.progress_bar, **more}
        shared = self.shared
        if TAKEN in more:
            # Beside those that are set for all requests.
            shared |= {TAKEN: (*shared.get(TAKEN, ()), *more[TAKEN])}
        return run_arguments(self.preset, self.method, self.seed, self.folder / name, options, shared)


@dataclass(frozen=True, kw_only=True)
class SequenceArguments(RequestsArguments):
    """Options of a sequence of requests."""

    forget_classes: tuple[str, ...] = ("0", "3", "7")
    """Classes to forget, by number or name, in this order."""
    method: str = "pecker"
    """Name of a method."""
    preset: str = "digits"
    """digits, digits16, mnist, images, cifar10 or stl10."""
    cover_class: str | None = None
    """Class to draw in their place, retained throughout, or "random". Default: the preset's."""
    pretrained_model_name_or_path: str | None = None
    """The network to start from. Default: the preset's."""
    distilled: str | None = None
    """Folder of a run of distillation, or "auto": the first request, and all at once, start from its networks. Default:
    what the method starts from alone."""
    samples_per_class: int | None = None
    """Images of each class in an evaluation. Default: the preset's."""
    judge: str | None = None
    """File of the classifier that evaluates. Default: that of the pretraining, otherwise the preset's."""

    def run(self, name: str, classes: Sequence[int], **more: Any) -> UnlearnArguments:
        """The options of one request."""
        return self.request(name, {"forget_classes": tuple(classes)}, OF_RUNS, more)

    @property
    def first(self) -> dict[str, Any]:
        """Options that the first request has and later ones have not."""
        return {} if self.distilled is None else {"distilled": self.distilled}


def sequence(args: SequenceArguments) -> tuple[Path, str]:
    """Forget classes one request after the other, measure all of them after each, and compare with all at once.

    Request i forgets all classes up to the i-th. One-step generators start from the previous request's generator, with
    the pretrained network as teacher; other methods take the previous request's network as the pretrained one. Called
    again with the same options it continues where it was interrupted, and with further classes it adds requests.

    Requests of the method patch have disjoint masks, and each leaves a patch file: reverting that of the last withdraws
    it, bit for bit.

    Parameters
    ----------
    args : SequenceArguments
        The classes and the options.

    Returns
    -------
    tuple of Path and str
        sequence.md, and its table for a terminal.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, before the first request starts.
    SystemExit
        With status 128 + n if signal n stopped a run, after a checkpoint.
    """
    check_alone("sequence")
    check_place("sequence", args.folder)
    request = ClassTask.settled(args.run("request", args.forget_classes, **args.first)).request
    args = with_options(args, {name: getattr(request, name) for name in SETTLED})
    classes = request.forget_classes
    judge = find_judge(args.preset, args.judge)
    if judge is None:
        raise ValueError(f"judge is not given, and the preset {args.preset} comes without one")
    plan: list[UnlearnArguments] = []
    for i, label in enumerate(classes):
        plan.append(args.run(f"request-{i + 1}-forget-{label}", classes[: i + 1], **args.start(plan)))
    once = None
    if args.at_once and len(classes) > 1:
        once = args.run("at-once-" + "-".join(map(str, classes)), classes, **args.first)
    # The last request is checked before the first one starts.
    last = args.run("request", classes, **args.first)
    cover = cover_of(last.request.cover_class)
    network = resolve(args.pretrained_model_name_or_path, shipped=class_preset(args.preset).network).network
    ForgetRequest.of(network, classes, cover)
    check_shared(args.shared, [last])
    ClassTask.check(last)
    every = [*plan, *([once] if once else [])]
    for run in every:
        ended(run)
    titles = [f"forget {', '.join(map(str, run.request.forget_classes))}" for run in every]
    run_requests(args, plan, once, titles, _keep_score)
    names = request.class_names
    rows = [_row(f"{i + 1}: forget {named(classes[i], names)}", run, judge) for i, run in enumerate(plan)]
    if once:
        rows.append(_row("all at once", once, judge))
    record = {
        "command": command_line("sequence"),
        "method": args.method,
        "preset": args.preset,
        "seed": args.seed,
        "forget_classes": list(classes),
        "cover_class": cover,
        "class_names": names,
        "score": args.score if args.distils else None,
        "rows": rows,
        "judge": {"name": judge.name, "accuracy": judge.accuracy},
        "environment": environment(),
    }
    write_json(args.folder / "sequence.json", portable(record))
    return write_sequence(args.folder)


def run_requests(
    args: RequestsArguments,
    plan: list[UnlearnArguments],
    once: UnlearnArguments | None,
    titles: Sequence[str],
    keep_score: Callable[[Path], None],
) -> None:
    """Run what has not ended, and make the patch files if there are any.

    Parameters
    ----------
    args : RequestsArguments
        Options of the sequence.
    plan : list of UnlearnArguments
        Requests one after the other.
    once : UnlearnArguments, optional
        All at once, which is run last.
    titles : sequence of str
        What each of them forgets.
    keep_score : callable
        Called with the folder of a run whose score network the next request starts from: writes it into ``SCORE``.

    Raises
    ------
    SystemExit
        With status 128 + n if signal n stopped a run, after a checkpoint.
    """
    every = [*plan, *([once] if once else [])]
    source, before = plan[0].request.pretrained_model_name_or_path, None
    for i, run in enumerate(every):
        if not ended(run):
            print(f"[{i + 1} of {len(every)}] {titles[i]}")
            # Requests on one pretrained network share what it draws.
            shared = run.request.pretrained_model_name_or_path == source
            try:
                outcome = unlearn(resumed(run), before if shared else None)
            except SystemExit:
                print("run the same command again to continue")
                raise
            before = outcome.before if shared else before
        # The last one's is for a request that may be added later. It is gone if a longer sequence has used it.
        latest = run is plan[-1] and (run.folder / "checkpoints").is_dir()
        needed = run is not once and (latest or (run is not plan[-1] and not ended(plan[i + 1])))
        if args.keeps_score and needed and not (run.folder / SCORE).is_dir():
            keep_score(run.folder)
        if not args.keep_checkpoints:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
            if 0 < i < len(plan):
                shutil.rmtree(plan[i - 1].folder / SCORE, ignore_errors=True)
    for run in every if args.patches else ():
        if not (run.folder / PATCH).is_file():
            make_patch(Run(run.folder), output=run.folder / PATCH)
            record_hashes(run.folder, [PATCH])


def _keep_score(folder: Path) -> None:
    """Write the score network of a run's last checkpoint into ``folder/score``.

    It fits the generator as it is now. The pretrained network in its place would first have to learn what the generator
    draws for the forgotten classes.
    """
    model = resolve(folder / "unet")
    model.network.load_state_dict(last_score(folder, "start over, or choose --score teacher"))
    save_network(folder / SCORE, model.network, model.schedule)


def _row(name: str, args: UnlearnArguments, judge: Judge) -> dict[str, Any]:
    """What is reported after a request: forgetting of each class, and the quality of the retained ones."""
    run = RunRecord.read(args.folder)
    model = resolve(args.folder / "unet")
    count, classes = args.request.samples_per_class, judge.num_classes
    labels = torch.arange(classes).repeat_interleave(count)
    t_init = run.config["options"].get("t_init")
    if t_init is None:
        sampler = pretrained_sampler(model.schedule, model.network)
    else:
        sampler = Sampler("one_step", t_init=t_init)
    images = sampler.draw(model.network, model.schedule, labels, derived_seed(args.compute.seed, "sequence"))
    share = 100 * confusion_matrix(judge, images, labels).double() / count
    forgotten = list(args.request.forget_classes)
    retained = [c for c in range(classes) if c not in forgotten]
    names = ("ua", "retain_accuracy", "frechet_distance", "frechet_real_split", "diversity", "images", "seconds")
    names += ("parameters_changed",)
    patch = args.folder / PATCH
    return {
        "request": name,
        "folder": args.folder.name,
        "forget_classes": forgotten,
        "ua_by_class": {str(c): 100 - share[c, forgotten].sum().item() for c in forgotten},
        "worst_retained_accuracy": min(share[c, c].item() for c in retained),
        **{key: run.metrics.get(key) for key in names},
        **({"patch_bytes": patch.stat().st_size} if patch.is_file() else {}),
    }
