"""``pecker-fast robustness``: attacks what a run has forgotten, and says what it takes to bring it back."""

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from ..checks import check_int, check_number
from ..data import LabelledImages
from ..diffusion import NoiseSchedule, Sampler
from ..environment import environment
from ..files import write_json
from ..hashing import weights_hash
from ..metrics import FeatureStatistics, Judge, load_judge
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
from ..training.presets import preset
from ..unlearning import ForgetRequest
from ..unlearning.streams import derived_seed
from .audit import update_metrics
from .options import DataArguments, device_of
from .unlearn import load_images

TESTS = ("relearn", "latent", "neighbours", "guidance", "paths")


@dataclass(frozen=True, eq=False)
class Subject:
    """A run that has ended, read back.

    networks: "run", "pretrained", "control" where one was given, and "scratch": the architecture with fresh weights.
    seed: of the attacks.
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
        """``seed``: the run's by default.

        ValueError where there is no such run, or where its pretrained network is gone or another one."""
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
            shipped=preset(config["preset"]).network,
            state=config.get("checkpoint_state", "auto"),
        ).network
        if weights_hash(teacher) != config["pretrained_sha256"]:
            raise ValueError(f"run is {str(folder)!r}, whose pretrained network is not what it was when the run began")
        networks = {"run": network, "pretrained": teacher, "scratch": _fresh(network, seed)}
        if control is not None:
            networks["control"] = resolve(control, name="control").network
            if _shapes(networks["control"]) != _shapes(network):
                raise ValueError(f"control is {control!r}, a network of another architecture than the run's")
        for found in networks.values():
            found.to(device).eval().requires_grad_(False)
        request = ForgetRequest.of(network, config["forget_classes"], config["cover_class"])
        return cls(folder, config, schedule.to(device), request, networks, seed)


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def _fresh(network: nn.Module, seed: int) -> nn.Module:
    """The same architecture with weights as they are before any training."""
    fresh = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "scratch"))
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return fresh


def robustness(
    run: tyro.conf.Positional[str],
    tests: tuple[str, ...] = TESTS,
    control: str | None = None,
    attacks: tuple[str, ...] = (),
    relearn_images: int = 16,
    relearn_steps: tuple[int, ...] = (10, 50, 100),
    learning_rate: float | None = None,
    latents: int | None = None,
    search_steps: int = 40,
    search_learning_rate: float = 0.1,
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0),
    forget_samples: int = 100,
    retain_samples: int | None = None,
    num_inference_steps: int = 10,
    batch_size: int = 256,
    judge: str | None = None,
    dataset_name: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    progress_bar: bool = True,
) -> None:
    """Does it stay forgotten? Relearning, latent search, neighbouring classes, guidance and other samplers.

    Writes robustness.json, robustness.md, robustness.html and robustness.png into the folder of the run, and the main
    figures into its metrics.json. Real images are needed: the adversary of the relearning test has some.

    Args:
        run: Folder of a run of unlearning that has ended.
        tests: Some of relearn, latent, neighbours, guidance, paths; with spaces or commas between.
        control: A network that never saw the forgotten classes, to be relearnt and searched likewise: the folder of a
            run (retrain, or a generator distilled from that) or of a network.
        attacks: Of the relearning test: some of regression, matching, denoising, inversion; all that apply by default.
        relearn_images: Real images of each forgotten class that the adversary has.
        relearn_steps: After how many steps of fine-tuning it is measured, ascending.
        learning_rate: Of the fine-tuning; a tenth of that of the preset's pretraining by default.
        latents: Searches for a forgotten class by its label (a quarter of that for other pairs of a class and a label);
            16, or 4 for networks that are sampled in many steps.
        search_steps: Steps of each latent search.
        search_learning_rate: Of Adam on the latents.
        guidance_scales: Scales to sample at, for networks with a label for "no condition".
        forget_samples: Images of each forgotten class in a measurement.
        retain_samples: Images of each retained class; a fifth of the former by default.
        num_inference_steps: Of DDIM, where a network is sampled by it.
        batch_size: Images in a call of a network.
        judge: File of the classifier; the run's by default, otherwise the one that comes with the preset.
        dataset_name: Real images: digits, cifar10, stl10 or folder:<path>; the run's by default.
        data_root: Folder with the files of cifar10 or stl10; the run's by default.
        device: cpu or cuda; a GPU where there is one by default.
        seed: Of everything random; the run's by default.
        progress_bar: Show a progress bar.
    """
    start = time.perf_counter()
    asked = _names("tests", tests, TESTS)
    chosen = _names("attacks", attacks, ATTACKS) if attacks else None
    for scale in guidance_scales:
        check_number("guidance_scales", scale)
    place = device_of(device)
    folder = Path(run)
    subject = Subject.read(folder, control, seed, place)
    seed, described = subject.seed, subject.config
    found = preset(described["preset"])
    sampler = Sampler.one_step_or_ddim(subject.t_init, num_inference_steps, batch_size)
    sampler.check(subject.schedule.num_train_timesteps)
    check_int("num_inference_steps", num_inference_steps, 1, subject.schedule.num_train_timesteps + 1)
    named = judge or described.get("judge")
    if named is None and found.judge is None:
        raise ValueError(f"judge is not given, and none comes with the preset {described['preset']}")
    judging = Judge.load(named) if named else load_judge(found.judge)
    judging.model.to(place)
    rate = found.pretrain.learning_rate / 10 if learning_rate is None else learning_rate
    relearning = RelearnOptions(relearn_images, tuple(relearn_steps), rate)
    relearning.check()
    if latents is None:
        # Many-step sampling is paid for in every step of the search.
        latents = 16 if sampler.kind == "one_step" else 4
    searching = LatentOptions(latents, search_steps, search_learning_rate)
    searching.check()
    plan = {data: attacks_on(sampler, data, chosen) for data in ("forgotten", "retained")}
    data = DataArguments(dataset_name or described.get("dataset_name"), data_root or described.get("data_root"))
    real = load_images(data, described["preset"], "all", subject.networks["run"].config["sample_size"])
    if retain_samples is None:
        retain_samples = max(1, forget_samples // 5)
    examiner = Examiner(
        judging,
        subject.request,
        subject.schedule,
        sampler,
        num_inference_steps,
        seed,
        forget_samples,
        retain_samples,
    )
    examiner = replace(examiner, forgotten_real=_features(judging, real.of_classes(subject.request.forget_classes)))
    shown = {data: _adversary_images(real, subject.request, data, relearning.images, seed) for data in plan}

    protocol = {
        "seed": seed,
        "sampler": sampler.name,
        "judge": {"name": judging.name, "accuracy": judging.accuracy},
        "samples": {
            "of each forgotten class": examiner.forget_samples,
            "of each retained class": examiner.retain_samples,
        },
        "relearn": asdict(relearning),
        "latent": asdict(searching),
        "guidance_scales": list(guidance_scales),
        "control": control,
        "weights_sha256": {name: weights_hash(network) for name, network in subject.networks.items()},
    }
    result: dict[str, Any] = {}
    with tqdm(
        total=_work(subject, examiner, asked, plan, relearning, searching),
        desc="robustness",
        unit="step",
        disable=not progress_bar,
        dynamic_ncols=True,
    ) as bar:
        if "relearn" in asked:
            # What the class looked like to begin with: how far a revival can go.
            protocol["relearn"]["pretrained"] = {
                used.name: examiner.measure(subject.networks["pretrained"], used) for used in own_and_ddim(examiner)
            }
            result["relearn"] = _relearn(subject, examiner, plan, shown, relearning, bar)
        if "latent" in asked:
            nearest = NearestImage(real)
            protocol["latent"]["nearest_image_accuracy"] = nearest.accuracy()
            result["latent"] = [
                {"network": name, **row}
                for name in ("run", "pretrained", "control")
                if name in subject.networks
                for row in latent(subject.networks[name], examiner, nearest, searching, bar.update)
            ]
        if "neighbours" in asked:
            before = examiner.confusion(subject.networks["pretrained"], examiner.by_ddim)
            after = examiner.confusion(subject.networks["run"])
            result["neighbours"] = neighbours(before, after, class_distances(judging, real), subject.request)
            bar.update()
        if "guidance" in asked:
            result["guidance"] = [
                {"network": name, **row}
                for name in ("run", "pretrained")
                for row in guidance(subject.networks[name], examiner, guidance_scales)
            ]
            bar.update()
        if "paths" in asked:
            result["paths"] = [
                {"network": name, **row}
                for name in ("run", "pretrained")
                for row in paths(subject.networks[name], examiner, bar.update)
            ]
    _write(subject, protocol, result, time.perf_counter() - start)


def _names(name: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    names = [part for item in given for part in item.split(",") if part]
    unknown = [part for part in names if part not in known]
    if unknown or not names:
        raise ValueError(f"{name} is {', '.join(unknown) or 'empty'}, expected some of {', '.join(known)}")
    return names


def _features(judge: Judge, images: LabelledImages) -> FeatureStatistics:
    parts = [judge(images.batch(indices))[1] for indices in torch.arange(len(images)).split(1024)]
    return FeatureStatistics.of(torch.cat(parts))


def _adversary_images(
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


def _relearnt(subject: Subject, plan: dict[str, tuple[str, ...]]) -> list[tuple[str, str, str]]:
    """(network, data, attack): the run's on both kinds of images, the others on the forgotten class's."""
    tried = [("run", data, attack) for data, attacks in plan.items() for attack in attacks]
    # An embedding alone makes nothing of fresh weights.
    tried += [("scratch", "forgotten", attack) for attack in plan["forgotten"] if attack != "inversion"]
    return tried + [("control", "forgotten", attack) for attack in plan["forgotten"] if "control" in subject.networks]


def _work(subject, examiner, asked, plan, relearning: RelearnOptions, searching: LatentOptions) -> int:
    searched = sum(name in subject.networks for name in ("run", "pretrained", "control"))
    return (
        ("relearn" in asked) * len(_relearnt(subject, plan)) * relearning.steps[-1]
        + ("latent" in asked) * searched * search_steps(examiner, searching)
        + ("neighbours" in asked)
        + ("guidance" in asked)
        + ("paths" in asked) * 2 * len(samplers(examiner))
    )


def _relearn(subject, examiner: Examiner, plan, shown, options: RelearnOptions, bar) -> list[dict[str, Any]]:
    device = subject.schedule.device
    rows = []
    for network, data, attack in _relearnt(subject, plan):
        images, labels = (x.to(device) for x in shown[data])
        found = relearn(subject.networks[network], examiner, images, labels, attack, options, bar.update)
        rows += [{"network": network, "data": data, **row} for row in found]
    return rows


def summary(result: dict[str, Any]) -> dict[str, float]:
    """The main figures by flat names, in percent but for Fréchet distances; of the tests that there are results of."""
    found: dict[str, float] = {}
    rows = result.get("relearn", [])
    for step in sorted({row["step"] for row in rows}):
        for network, data, name in (
            ("run", "forgotten", "relearn_forget"),
            ("run", "retained", "relearn_retained"),
            ("scratch", "forgotten", "relearn_scratch"),
            ("control", "forgotten", "relearn_control"),
        ):
            there = [r for r in rows if (r["network"], r["data"], r["step"]) == (network, data, step)]
            if there and step:
                # The attack that gets furthest, and what it leaves of the other classes.
                worst = min(there, key=lambda row: row["ua"])
                found[f"{name}_ua_{step}"] = worst["ua"]
                found[f"{name}_retain_accuracy_{step}"] = worst["retain_accuracy"]
                distances = [row["forget_frechet"] for row in there if row.get("forget_frechet") is not None]
                if distances:
                    found[f"{name}_frechet_{step}"] = min(distances)
    for row in result.get("latent", []):
        prefix = {"run": "latent", "pretrained": "latent_pretrained", "control": "latent_control"}[row["network"]]
        name = row["group"].replace("forgotten by its label", "own").replace("forgotten by retained labels", "other")
        if name in ("own", "other"):
            found[f"{prefix}_{name}_found"] = row["found"]
            found[f"{prefix}_{name}_confirmed"] = row["confirmed"]
        elif row["network"] == "run" and row["group"] == "retained by another label":
            found["latent_retained_other_confirmed"] = row["confirmed"]
    rows = result.get("neighbours", [])
    if rows:
        drops = {
            near: [r["accuracy_before"] - r["accuracy"] for r in rows if r["neighbour"] == near]
            for near in (True, False)
        }
        found["neighbour_drop"] = sum(drops[True]) / len(drops[True])
        if drops[False]:
            found["others_drop"] = sum(drops[False]) / len(drops[False])
        found["worst_retained_accuracy"] = min(row["accuracy"] for row in rows)
        found["retained_called_forgotten"] = sum(row["called_forgotten"] for row in rows) / len(rows)
    for name in ("guidance", "paths"):
        still = [row["still"] for row in result.get(name, []) if row["network"] == "run"]
        if still:
            found[f"{name}_still_most"] = max(still)
    return found


def _write(subject: Subject, protocol: dict[str, Any], result: dict[str, Any], seconds: float) -> None:
    folder = subject.folder
    flat = summary(result)
    told = {
        "method": subject.config.get("method"),
        "forget_classes": list(subject.request.forget_classes),
        "cover_class": subject.request.cover_class,
        "summary": flat,
        **result,
        "seconds": seconds,
        "protocol": {**protocol, "environment": environment()},
    }
    write_json(folder / "robustness.json", portable(told))
    metrics = folder / "metrics.json"
    kept = json.loads(metrics.read_text()) if metrics.is_file() else {}
    report = write_robustness_report(folder)
    update_metrics(folder, {**kept, **flat})
    for name, value in flat.items():
        print(f"{name:36}{value:8.1f}{'' if 'frechet' in name else ' %'}")
    print(f"report: {report}")
