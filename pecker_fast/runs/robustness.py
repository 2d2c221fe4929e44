"""Attacks on a run: how much it takes to bring back what was forgotten."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import check_int, check_number
from ..data import LabelledImages
from ..diffusion import Sampler
from ..environment import environment
from ..files import write_json
from ..hashing import weights_hash
from ..locks import PATIENCE, locked
from ..metrics import FeatureStatistics, Judge
from ..records import RecordError, read_object
from ..report import portable, write_robustness_report
from ..robustness import (
    ATTACKS,
    EMBEDDING,
    Examiner,
    LatentOptions,
    NearestImage,
    RelearnOptions,
    attacks_on,
    class_distances,
    guidance,
    latent,
    neighbours,
    own_and_ddim,
    paths,
    relearn,
    samplers,
    search_steps,
)
from ..run_records import read_file
from .arguments import DataArguments, device_of
from .audit import update_metrics
from .classes.data import check_images, check_judge, dataset_of, find_judge, load_images
from .controls import is_retrained, never_saw, relabelled_run
from .presets import class_preset
from .robustness_across import run_folders, write_across_runs
from .robustness_figures import NETWORKS, cost_record, summary
from .subject import RELABEL_MISSING, Subject, adversary_images, read_config

TESTS = ("relearn", "latent", "neighbours", "guidance", "paths")
# Options that do not change the result of a run.
NEUTRAL = ("run", "output_dir", "controls_dir", "device", "progress_bar")


@dataclass(frozen=True, kw_only=True)
class RobustnessArguments:
    """Options of the attacks on runs."""

    run: tuple[str, ...]
    """Folder of a run of unlearning that has ended. Several, or that of a comparison: each is attacked unless it has
    been with the same options, and a report over the seeds is written."""
    tests: tuple[str, ...] = TESTS
    """Some of relearn, latent, neighbours, guidance, paths; separated by spaces or commas."""
    control: str | None = None
    """A network that never saw the forgotten classes, to be attacked in the same way: the folder of a network or of a
    run (retrain, or a generator distilled from that)."""
    controls: bool = False
    """Make what is missing to compare with: a network that never saw the classes (retrain, distilled if the run draws
    in one step; control may name a run of retrain), and a distilled generator to relabel. Takes as long as training."""
    controls_dir: str | None = None
    """Where controls are kept, for all runs with the same request. Default: never-saw-<preset>-<classes> beside the
    run."""
    relabel: str | None = None
    """The relabelled network to compare with: the folder of a run of relabel. Default: the network that the run started
    from is relabelled, or the generator that was distilled for the same timestep."""
    attacks: tuple[str, ...] = ()
    """Of the relearning test: some of regression, matching, denoising, inversion, inversion_random. Default: all that
    apply."""
    relearn_images: int = 16
    """Real images of each forgotten class that the adversary has."""
    relearn_steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Steps of fine-tuning after which the network is measured, ascending."""
    inversion_starts: int = 5
    """Random embeddings that inversion_random starts from; the best one counts."""
    learning_rate: float | None = None
    """Of the fine-tuning. Default: a tenth of that of the preset's pretraining."""
    latents: int | None = None
    """Searches for a forgotten class by its label; a quarter of that for other pairs of a class and a label. Default:
    16, or 4 for networks that are sampled in many steps."""
    search_steps: int = 40
    """Steps of each latent search."""
    search_learning_rate: float = 0.1
    """Learning rate of Adam on the latents."""
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """Scales to sample at, for networks with a label for "no condition"."""
    forget_samples: int = 100
    """Images of each forgotten class in a measurement."""
    retain_samples: int | None = None
    """Images of each retained class. Default: a fifth of that."""
    num_inference_steps: int = 10
    """Steps of DDIM, for networks that are sampled by it."""
    batch_size: int = 256
    """Images in a call of the network."""
    judge: str | None = None
    """File of the classifier. Default: the run's, otherwise the preset's."""
    dataset_name: str | None = None
    """Real images: digits, mnist, cifar10, stl10 or folder:<path>. Default: the run's."""
    data_root: str | None = None
    """Folder with the files of cifar10 or stl10. Default: the run's."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: a GPU if there is one."""
    seed: int | None = None
    """Seed of everything random. Default: the run's."""
    output_dir: str | None = None
    """Folder of the report over several runs. Default: the comparison's, or the folder that all of them are in."""
    progress_bar: bool = True
    """Show a progress bar."""

    @property
    def asked(self) -> dict[str, Any]:
        """The options that determine the result for a run, as JSON."""
        values = {name: value for name, value in asdict(self).items() if name not in NEUTRAL}
        return portable(json.loads(json.dumps(values)))


@dataclass(frozen=True)
class Attacked:
    """The result of the attacks.

    Parameters
    ----------
    figures : dict
        The main figures of a run: percent, but for Fréchet distances, steps and ratios. Empty for several runs.
    verdicts : list of str
        What it costs to bring the class back, in words.
    report : Path
        robustness.md.
    """

    figures: dict[str, float]
    verdicts: list[str]
    report: Path


@dataclass(frozen=True, eq=False)
class Attack:
    """Everything that the tests need: ``images`` are the adversary's, with their labels."""

    subject: Subject
    examiner: Examiner
    real: LabelledImages
    tests: list[str]
    plan: dict[str, tuple[str, ...]]
    images: dict[str, tuple[Tensor, Tensor]]
    relearning: RelearnOptions
    searching: LatentOptions
    guidance_scales: tuple[float, ...]
    #: Rows of relearning that runs share, by all that determines them.
    shared: dict[tuple[Any, ...], list[dict[str, Any]]] = field(default_factory=dict)


def robustness(args: RobustnessArguments) -> Attacked:
    """Attack runs by relearning, latent search, neighbouring classes, guidance and other samplers.

    Writes robustness.json, robustness.md, robustness.html and robustness.png into the folder of each run, and the main
    figures into its metrics.json; of several runs, also a report over the seeds. Real images are needed: the adversary
    of the relearning test has some.

    Parameters
    ----------
    args : RobustnessArguments
        The runs and the options.

    Returns
    -------
    Attacked
        The main figures, verdicts in words, and the report.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, or a folder is not that of a run of unlearning. Nothing has been written then.
    """
    folders, place = run_folders(args.run, args.output_dir)
    shared: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    if place is None:
        return _attack(folders[0], args, shared)
    # A wrong option is found before the first attack.
    _check(args)
    for folder in folders:
        read_config(folder)
    for number, folder in enumerate(folders, 1):
        if _asked(folder) != args.asked:
            print(f"robustness [{number} of {len(folders)}]: {folder}")
            _attack(folder, args, shared)
    report, verdicts = write_across_runs(place, folders)
    return Attacked({}, verdicts, report)


def _asked(folder: Path) -> dict[str, Any] | None:
    """The options of the attacks that a run has been through; None if it has not, or an earlier version did not say."""
    try:
        return read_object(folder / "robustness.json").get("asked")
    except RecordError:
        return None


def _attack(folder: Path, args: RobustnessArguments, shared: dict[tuple[Any, ...], list[dict[str, Any]]]) -> Attacked:
    """Attack one run, and write its report."""
    start = time.perf_counter()
    attack = _prepare(folder, args, shared)
    subject, examiner, sampler = attack.subject, attack.examiner, attack.examiner.sampler
    protocol: dict[str, Any] = {
        "seed": subject.seed,
        "sampler": sampler.name,
        "judge": {"name": examiner.judge.name, "accuracy": examiner.judge.accuracy},
        "samples": {
            "of each forgotten class": examiner.forget_samples,
            "of each retained class": examiner.retain_samples,
        },
        "relearn": asdict(attack.relearning),
        "latent": asdict(attack.searching),
        "guidance_scales": list(args.guidance_scales),
        "control": subject.control,
        "relabel": subject.relabel,
        "notes": list(subject.notes),
        "weights_sha256": {name: weights_hash(network) for name, network in subject.networks.items()},
    }
    with tqdm(
        total=_work(attack), desc="robustness", unit="step", disable=not args.progress_bar, dynamic_ncols=True
    ) as bar:
        result = _run_tests(attack, protocol, bar)
    return _write(subject, args.asked, protocol, result, time.perf_counter() - start)


def _check(args: RobustnessArguments) -> tuple[list[str], list[str] | None]:
    """The tests and the attacks. ValueError or TypeError if an option that needs no run is wrong."""
    tests = names_in("tests", args.tests, TESTS)
    chosen = names_in("attacks", args.attacks, ATTACKS) if args.attacks else None
    for scale in args.guidance_scales:
        check_number("guidance_scales", scale)
    _relearning(args, 1.0).check()
    return tests, chosen


def _relearning(args: RobustnessArguments, rate: float) -> RelearnOptions:
    rate = rate if args.learning_rate is None else args.learning_rate
    return RelearnOptions(args.relearn_images, tuple(args.relearn_steps), rate, starts=args.inversion_starts)


def _prepare(folder: Path, args: RobustnessArguments, shared: dict[tuple[Any, ...], list[dict[str, Any]]]) -> Attack:
    """Read the run, and check all options."""
    tests, chosen = _check(args)
    device = device_of(args.device)
    subject = Subject.read(folder, args.control, args.seed, device, args.relabel)
    config, values = subject.config, class_preset(subject.config["preset"])
    steps, known = args.num_inference_steps, subject.schedule.num_train_timesteps
    sampler = Sampler.one_step_or_ddim(subject.t_init, steps, args.batch_size)
    sampler.check(known)
    check_int("num_inference_steps", steps, 1, known + 1)
    judge_file = args.judge or config.get("judge")
    judge = find_judge(config["preset"], judge_file)
    if judge is None:
        raise ValueError(f"judge is not given, and the preset {config['preset']} comes without one")
    judge.model.to(device)
    relearning = _relearning(args, values.pretrain.learning_rate / 10)
    relearning.check()
    latents = args.latents
    if latents is None:
        # Each step of a search pays for all steps of the sampler.
        latents = 16 if sampler.kind == "one_step" else 4
    searching = LatentOptions(latents, args.search_steps, args.search_learning_rate)
    searching.check()
    plan = {data: attacks_on(sampler, data, chosen) for data in ("forgotten", "retained")}
    data = DataArguments(args.dataset_name or config.get("dataset_name"), args.data_root or config.get("data_root"))
    network, name = subject.networks["run"], dataset_of(data, config["preset"])
    real = load_images(data, config["preset"], "all", network.config["sample_size"], network.config["in_channels"])
    check_images(real, name, network, "the network of the run")
    check_judge(judge, judge_file, real, name)
    retain_samples = args.retain_samples
    if retain_samples is None:
        retain_samples = max(1, args.forget_samples // 5)
    counts = (args.forget_samples, retain_samples)
    examiner = Examiner(judge, subject.request, subject.schedule, sampler, steps, subject.seed, *counts)
    examiner = replace(examiner, forgotten_real=_features(judge, real.of_classes(subject.request.forget_classes)))
    images = {data: adversary_images(real, subject.request, data, relearning.images, subject.seed) for data in plan}
    if args.controls and "relearn" in tests:
        # Everything else has been checked: making them takes long.
        subject = _with_controls(subject, args, device)
    scales = args.guidance_scales
    return Attack(subject, examiner, real, tests, plan, images, relearning, searching, scales, shared)


def _with_controls(subject: Subject, args: RobustnessArguments, device: torch.device) -> Subject:
    """The run with the networks that it lacked, which are made unless they exist already."""
    config, relabel, control = subject.config, args.relabel, args.control
    classes = "-".join(map(str, config["forget_classes"]))
    place = args.controls_dir or subject.folder.parent / f"never-saw-{config['preset']}-{classes}"
    how = (Path(place), args.device, args.progress_bar)
    if RELABEL_MISSING in subject.notes:
        relabel = str(relabelled_run(config, *how))
    if control is None or is_retrained(control):
        control = str(never_saw(config, how[0], control, *how[1:]))
    return Subject.read(subject.folder, control, args.seed, device, relabel)


def _run_tests(attack: Attack, protocol: dict[str, Any], bar: tqdm) -> dict[str, Any]:
    """Rows of each test; what it measured first is added to ``protocol``."""
    subject, examiner, tests, networks = attack.subject, attack.examiner, attack.tests, attack.subject.networks
    result: dict[str, Any] = {}
    if "relearn" in tests:
        # What the class looked like at first: how far a revival can go.
        protocol["relearn"]["pretrained"] = {
            used.name: examiner.measure(networks["pretrained"], used) for used in own_and_ddim(examiner)
        }
        result["relearn"] = _relearn(attack, bar)
        result["cost"] = cost_record(result["relearn"])
    if "latent" in tests:
        nearest = NearestImage(attack.real)
        protocol["latent"]["nearest_image_accuracy"] = nearest.accuracy()
        result["latent"] = [
            {"network": name, **row}
            for name in ("run", "pretrained", "control")
            if name in networks
            for row in latent(networks[name], examiner, nearest, attack.searching, bar.update)
        ]
    if "neighbours" in tests:
        before = examiner.confusion(networks["pretrained"], examiner.by_ddim)
        after = examiner.confusion(networks["run"])
        distances = class_distances(examiner.judge, attack.real)
        result["neighbours"] = neighbours(before, after, distances, subject.request)
        bar.update()
    if "guidance" in tests:
        result["guidance"] = [
            {"network": name, **row}
            for name in ("run", "pretrained")
            for row in guidance(networks[name], examiner, attack.guidance_scales)
        ]
        bar.update()
    if "paths" in tests:
        result["paths"] = [
            {"network": name, **row}
            for name in ("run", "pretrained")
            for row in paths(networks[name], examiner, bar.update)
        ]
    return result


def names_in(name: str, items: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names in ``items``, separated by commas, too. ValueError for one that is not known."""
    names = [part for item in items for part in item.split(",") if part]
    unknown = [part for part in names if part not in known]
    if unknown or not names:
        raise ValueError(f"{name} is {', '.join(unknown) or 'empty'}, expected some of {', '.join(known)}")
    return names


def _features(judge: Judge, images: LabelledImages) -> FeatureStatistics:
    parts = [judge(images.batch(indices))[1] for indices in torch.arange(len(images)).split(1024)]
    return FeatureStatistics.of(torch.cat(parts))


def _relearnt(attack: Attack) -> list[tuple[str, str, str]]:
    """(network, data, attack): the run's on both kinds of images, the others' on the forgotten class's."""
    plan = attack.plan
    tried = [("run", data, name) for data, attacks in plan.items() for name in attacks]
    for network in NETWORKS[1:]:
        if network in attack.subject.networks:
            # An embedding alone makes nothing of fresh weights.
            names = [name for name in plan["forgotten"] if network != "scratch" or name not in EMBEDDING]
            tried += [(network, "forgotten", name) for name in names]
    return tried


def _work(attack: Attack) -> int:
    """Steps of the progress bar."""
    searched = sum(name in attack.subject.networks for name in ("run", "pretrained", "control"))
    return (
        ("relearn" in attack.tests) * sum(attack.relearning.work(name) for _, _, name in _relearnt(attack))
        + ("latent" in attack.tests) * searched * search_steps(attack.examiner, attack.searching)
        + ("neighbours" in attack.tests)
        + ("guidance" in attack.tests)
        + ("paths" in attack.tests) * 2 * len(samplers(attack.examiner))
    )


def _relearn(attack: Attack, bar: tqdm) -> list[dict[str, Any]]:
    device, networks = attack.subject.schedule.device, attack.subject.networks
    rows = []
    examiner, request = attack.examiner, attack.subject.request
    same = (request.forget_classes, examiner.sampler.name, examiner.by_ddim.name, attack.relearning, examiner.seed)
    same += (examiner.forget_samples, examiner.retain_samples, examiner.judge.name)
    same += tuple(attack.subject.config.get(name) for name in ("preset", "dataset_name", "data_root"))
    hashes = {name: weights_hash(network) for name, network in networks.items()}
    for network, data, name in _relearnt(attack):
        images, labels = (x.to(device) for x in attack.images[data])
        # Runs of one seed have the same networks to compare with.
        key = (hashes[network], data, name, *same)
        if key not in attack.shared:
            arguments = (images, labels, name, attack.relearning, bar.update)
            attack.shared[key] = relearn(networks[network], examiner, *arguments)
        else:
            bar.update(attack.relearning.work(name))
        rows += [{"network": network, "data": data, **row} for row in attack.shared[key]]
    return rows


def _write(
    subject: Subject, asked: dict[str, Any], protocol: dict[str, Any], result: dict[str, Any], seconds: float
) -> Attacked:
    folder, figures = subject.folder, summary(result)
    record = {
        "method": subject.config.get("method"),
        "forget_classes": list(subject.request.forget_classes),
        "cover_class": subject.request.cover_class,
        "class_names": subject.config.get("class_names") or [],
        "summary": figures,
        **result,
        "seconds": seconds,
        "asked": asked,
        "protocol": {**protocol, "environment": environment()},
    }
    with locked(folder, PATIENCE):
        write_json(folder / "robustness.json", portable(record))
        metrics = read_file(folder, "metrics")
        report = write_robustness_report(folder)
        update_metrics(folder, {**metrics, **figures})
    words = [verdict["text"] for verdict in result.get("cost", {}).get("verdicts", {}).values()]
    return Attacked(figures, [*words, *(subject.notes if "relearn" in result else ())], report)
