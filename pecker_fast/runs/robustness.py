"""Attacks on a run: how much it takes to bring back what was forgotten."""

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checks import check_int, check_number
from ..data import LabelledImages
from ..diffusion import NoiseSchedule, Sampler
from ..environment import environment
from ..files import write_json
from ..hashing import weights_hash
from ..metrics import FeatureStatistics, Judge
from ..models import resolve
from ..report import portable, write_robustness_report
from ..robustness import (
    ATTACKS,
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
from ..unlearning import ForgetRequest
from ..unlearning.streams import derived_seed
from .arguments import DataArguments, device_of
from .audit import update_metrics
from .classes.data import find_judge, load_images
from .presets import class_preset

TESTS = ("relearn", "latent", "neighbours", "guidance", "paths")


@dataclass(frozen=True, eq=False)
class Subject:
    """A run that has ended.

    Parameters
    ----------
    folder, config
        Of the run.
    schedule, request
        Its noise schedule, and what it has forgotten.
    networks : dict
        "run", "pretrained", "control" if there is one, and "scratch": the architecture with fresh weights.
    seed : int
        Of the attacks.
    """

    folder: Path
    config: dict[str, Any]
    schedule: NoiseSchedule
    request: ForgetRequest
    networks: dict[str, nn.Module]
    seed: int

    @property
    def t_init(self) -> int | None:
        return self.config["options"].get("t_init")

    @classmethod
    def read(cls, folder: Path, control: str | None, seed: int | None, device: torch.device) -> "Subject":
        """Read a run; ``seed`` is the run's by default.

        Raises
        ------
        ValueError
            If there is no such run, or its pretrained network is gone or has changed.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"run is {str(folder)!r}, expected the folder of a run of unlearning: {error}") from error
        if "options" not in config or "forget_classes" not in config:
            raise ValueError(f"run is {str(folder)!r}, whose config.json is not that of a run of unlearning")
        if not (folder / "unet").is_dir():
            raise ValueError(f"run is {str(folder)!r}, which has no unet: the run has not ended")
        seed = config["seed"] if seed is None else seed
        check_int("seed", seed, 0)
        model = resolve(folder / "unet", name="run")
        network, schedule = model.network, model.schedule
        teacher = resolve(
            config["pretrained_model_name_or_path"],
            shipped=class_preset(config["preset"]).network,
            state=config.get("checkpoint_state", "auto"),
        ).network
        if weights_hash(teacher) != config["pretrained_sha256"]:
            raise ValueError(f"run is {str(folder)!r}, whose pretrained network has changed since the run started")
        networks = {"run": network, "pretrained": teacher, "scratch": _fresh(network, seed)}
        if control is not None:
            networks["control"] = resolve(control, name="control").network
            if _shapes(networks["control"]) != _shapes(network):
                raise ValueError(f"control is {control!r}, a network of another architecture than the run's")
        for x in networks.values():
            x.to(device).eval().requires_grad_(False)
        request = ForgetRequest.of(network, config["forget_classes"], config["cover_class"])
        return cls(folder, config, schedule.to(device), request, networks, seed)


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def _fresh(network: nn.Module, seed: int) -> nn.Module:
    """The same architecture with the weights that training starts from."""
    fresh = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "scratch"))
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return fresh


@dataclass(frozen=True, kw_only=True)
class RobustnessArguments:
    """Options of the attacks on a run."""

    run: str
    """Folder of a run of unlearning that has ended."""
    tests: tuple[str, ...] = TESTS
    """Some of relearn, latent, neighbours, guidance, paths; separated by spaces or commas."""
    control: str | None = None
    """A network that never saw the forgotten classes, to be attacked in the same way: the folder of a network or of a
    run (retrain, or a generator distilled from that)."""
    attacks: tuple[str, ...] = ()
    """Of the relearning test: some of regression, matching, denoising, inversion. Default: all that apply."""
    relearn_images: int = 16
    """Real images of each forgotten class that the adversary has."""
    relearn_steps: tuple[int, ...] = (10, 50, 100)
    """Steps of fine-tuning after which the network is measured, ascending."""
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
    """Real images: digits, cifar10, stl10 or folder:<path>. Default: the run's."""
    data_root: str | None = None
    """Folder with the files of cifar10 or stl10. Default: the run's."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: a GPU if there is one."""
    seed: int | None = None
    """Seed of everything random. Default: the run's."""
    progress_bar: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class Attacked:
    """The result of the attacks.

    Parameters
    ----------
    figures : dict
        The main figures: percent, but for Fréchet distances.
    report : Path
        robustness.md.
    """

    figures: dict[str, float]
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


def robustness(args: RobustnessArguments) -> Attacked:
    """Attack a run by relearning, latent search, neighbouring classes, guidance and other samplers.

    Writes robustness.json, robustness.md, robustness.html and robustness.png into the folder of the run, and the main
    figures into its metrics.json. Real images are needed: the adversary of the relearning test has some.

    Parameters
    ----------
    args : RobustnessArguments
        The run and the options.

    Returns
    -------
    Attacked
        The main figures, and the report.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, or the folder is not that of a run of unlearning. Nothing has been written then.
    """
    start = time.perf_counter()
    attack = _prepare(args)
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
        "control": args.control,
        "weights_sha256": {name: weights_hash(network) for name, network in subject.networks.items()},
    }
    with tqdm(
        total=_work(attack), desc="robustness", unit="step", disable=not args.progress_bar, dynamic_ncols=True
    ) as bar:
        result = _run_tests(attack, protocol, bar)
    return _write(subject, protocol, result, time.perf_counter() - start)


def _prepare(args: RobustnessArguments) -> Attack:
    """Read the run, and check all options."""
    tests = _names("tests", args.tests, TESTS)
    chosen = _names("attacks", args.attacks, ATTACKS) if args.attacks else None
    for scale in args.guidance_scales:
        check_number("guidance_scales", scale)
    device = device_of(args.device)
    subject = Subject.read(Path(args.run), args.control, args.seed, device)
    config, values = subject.config, class_preset(subject.config["preset"])
    steps, known = args.num_inference_steps, subject.schedule.num_train_timesteps
    sampler = Sampler.one_step_or_ddim(subject.t_init, steps, args.batch_size)
    sampler.check(known)
    check_int("num_inference_steps", steps, 1, known + 1)
    judge = find_judge(config["preset"], args.judge or config.get("judge"))
    if judge is None:
        raise ValueError(f"judge is not given, and the preset {config['preset']} comes without one")
    judge.model.to(device)
    rate = values.pretrain.learning_rate / 10 if args.learning_rate is None else args.learning_rate
    relearning = RelearnOptions(args.relearn_images, tuple(args.relearn_steps), rate)
    relearning.check()
    latents = args.latents
    if latents is None:
        # Each step of a search pays for all steps of the sampler.
        latents = 16 if sampler.kind == "one_step" else 4
    searching = LatentOptions(latents, args.search_steps, args.search_learning_rate)
    searching.check()
    plan = {data: attacks_on(sampler, data, chosen) for data in ("forgotten", "retained")}
    data = DataArguments(args.dataset_name or config.get("dataset_name"), args.data_root or config.get("data_root"))
    real = load_images(data, config["preset"], "all", subject.networks["run"].config["sample_size"])
    retain_samples = args.retain_samples
    if retain_samples is None:
        retain_samples = max(1, args.forget_samples // 5)
    counts = (args.forget_samples, retain_samples)
    examiner = Examiner(judge, subject.request, subject.schedule, sampler, steps, subject.seed, *counts)
    examiner = replace(examiner, forgotten_real=_features(judge, real.of_classes(subject.request.forget_classes)))
    images = {data: adversary_images(real, subject.request, data, relearning.images, subject.seed) for data in plan}
    return Attack(subject, examiner, real, tests, plan, images, relearning, searching, args.guidance_scales)


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


def _names(name: str, items: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names in ``items``, separated by commas, too. ValueError for one that is not known."""
    names = [part for item in items for part in item.split(",") if part]
    unknown = [part for part in names if part not in known]
    if unknown or not names:
        raise ValueError(f"{name} is {', '.join(unknown) or 'empty'}, expected some of {', '.join(known)}")
    return names


def _features(judge: Judge, images: LabelledImages) -> FeatureStatistics:
    parts = [judge(images.batch(indices))[1] for indices in torch.arange(len(images)).split(1024)]
    return FeatureStatistics.of(torch.cat(parts))


def adversary_images(
    real: LabelledImages, request: ForgetRequest, data: str, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """``count`` real images of each forgotten class, or as many of the retained ones, drawn at random."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "relearn images", data))
    groups = [(c,) for c in request.forget_classes] if data == "forgotten" else [request.retained_classes]
    count = count if data == "forgotten" else count * len(request.forget_classes)
    chosen = []
    for classes in groups:
        members = torch.isin(real.labels, torch.tensor(classes)).nonzero().flatten()
        if len(members) < count:
            raise ValueError(
                f"relearn_images is {count}, but there are {len(members)} images of the classes {list(classes)}"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    indices = torch.cat(chosen)
    return real.batch(indices), real.labels[indices]


def _relearnt(attack: Attack) -> list[tuple[str, str, str]]:
    """(network, data, attack): the run's on both kinds of images, the others' on the forgotten class's."""
    plan = attack.plan
    tried = [("run", data, name) for data, attacks in plan.items() for name in attacks]
    # An embedding alone makes nothing of fresh weights.
    tried += [("scratch", "forgotten", name) for name in plan["forgotten"] if name != "inversion"]
    controls = plan["forgotten"] if "control" in attack.subject.networks else ()
    return tried + [("control", "forgotten", name) for name in controls]


def _work(attack: Attack) -> int:
    """Steps of the progress bar."""
    searched = sum(name in attack.subject.networks for name in ("run", "pretrained", "control"))
    return (
        ("relearn" in attack.tests) * len(_relearnt(attack)) * attack.relearning.steps[-1]
        + ("latent" in attack.tests) * searched * search_steps(attack.examiner, attack.searching)
        + ("neighbours" in attack.tests)
        + ("guidance" in attack.tests)
        + ("paths" in attack.tests) * 2 * len(samplers(attack.examiner))
    )


def _relearn(attack: Attack, bar: tqdm) -> list[dict[str, Any]]:
    device, networks = attack.subject.schedule.device, attack.subject.networks
    rows = []
    for network, data, name in _relearnt(attack):
        images, labels = (x.to(device) for x in attack.images[data])
        records = relearn(networks[network], attack.examiner, images, labels, name, attack.relearning, bar.update)
        rows += [{"network": network, "data": data, **row} for row in records]
    return rows


def summary(result: dict[str, Any]) -> dict[str, float]:
    """The main figures of the tests that were run, by flat names: percent, but for Fréchet distances."""
    figures: dict[str, float] = {}
    rows = result.get("relearn", [])
    for step in sorted({row["step"] for row in rows}):
        for network, data, name in (
            ("run", "forgotten", "relearn_forget"),
            ("run", "retained", "relearn_retained"),
            ("scratch", "forgotten", "relearn_scratch"),
            ("control", "forgotten", "relearn_control"),
        ):
            matching = [r for r in rows if (r["network"], r["data"], r["step"]) == (network, data, step)]
            if matching and step:
                # The attack that gets furthest, and what it leaves of the other classes.
                worst = min(matching, key=lambda row: row["ua"])
                figures[f"{name}_ua_{step}"] = worst["ua"]
                figures[f"{name}_retain_accuracy_{step}"] = worst["retain_accuracy"]
                distances = [row["forget_frechet"] for row in matching if row.get("forget_frechet") is not None]
                if distances:
                    figures[f"{name}_frechet_{step}"] = min(distances)
    for row in result.get("latent", []):
        prefix = {"run": "latent", "pretrained": "latent_pretrained", "control": "latent_control"}[row["network"]]
        name = row["group"].replace("forgotten by its label", "own").replace("forgotten by retained labels", "other")
        if name in ("own", "other"):
            figures[f"{prefix}_{name}_found"] = row["found"]
            figures[f"{prefix}_{name}_confirmed"] = row["confirmed"]
        elif row["network"] == "run" and row["group"] == "retained by another label":
            figures["latent_retained_other_confirmed"] = row["confirmed"]
    rows = result.get("neighbours", [])
    if rows:
        drops = {
            near: [r["accuracy_before"] - r["accuracy"] for r in rows if r["neighbour"] == near]
            for near in (True, False)
        }
        figures["neighbour_drop"] = sum(drops[True]) / len(drops[True])
        if drops[False]:
            figures["others_drop"] = sum(drops[False]) / len(drops[False])
        figures["worst_retained_accuracy"] = min(row["accuracy"] for row in rows)
        figures["retained_called_forgotten"] = sum(row["called_forgotten"] for row in rows) / len(rows)
    for name in ("guidance", "paths"):
        still = [row["still"] for row in result.get(name, []) if row["network"] == "run"]
        if still:
            figures[f"{name}_still_most"] = max(still)
    return figures


def _write(subject: Subject, protocol: dict[str, Any], result: dict[str, Any], seconds: float) -> Attacked:
    folder, figures = subject.folder, summary(result)
    record = {
        "method": subject.config.get("method"),
        "forget_classes": list(subject.request.forget_classes),
        "cover_class": subject.request.cover_class,
        "summary": figures,
        **result,
        "seconds": seconds,
        "protocol": {**protocol, "environment": environment()},
    }
    write_json(folder / "robustness.json", portable(record))
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    report = write_robustness_report(folder)
    update_metrics(folder, {**metrics, **figures})
    return Attacked(figures, report)
