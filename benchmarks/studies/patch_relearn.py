"""How soon fine-tuning on a few real images brings a class back: patches, dense rules, and two controls.

The controls are ``relabel``, which copies the cover class's row of the class embedding over the forgotten one's, and a
generator that was distilled from a network that never saw the class.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pecker_fast.diffusion.networks import unwrap
from pecker_fast.files import save_tensors
from pecker_fast.metrics import load_judge
from pecker_fast.robustness import Examiner, RelearnOptions, relearn
from pecker_fast.runs.arguments import DataArguments
from pecker_fast.runs.classes.data import load_images
from pecker_fast.runs.presets import class_preset, method_options
from pecker_fast.runs.subject import adversary_images
from pecker_fast.unlearning import ForgetRequest, Problem, Setting, method_class
from pecker_fast.unlearning.relabel import relabelled

from .patch_conditions import NEVER_SAW, REFERENCE, RELABEL, Job
from .patch_runs import distil, method_of, train

# Steps after which each attack is measured.
STEPS = {
    "inversion": (50, 100, 200),
    "regression": (5, 10, 20),
    "matching": (5, 10, 20),
    "denoising": (5, 10, 20, 50),
}
IMAGES = 16
# Images of the forgotten class and of each retained one in a measurement.
SAMPLES = (100, 20)
# Of the control's pretraining and distillation.
CONTROL_SEED = 0


def _never_saw(job: Job, folder: Path) -> nn.Module:
    """The generator that never saw the class; made once and kept in ``folder``."""
    from safetensors.torch import load_file

    setting = method_of(Job(job.preset, job.pair, REFERENCE, CONTROL_SEED), folder).setting
    path = folder / f"never-saw-{job.preset}-{job.pair[0]}.safetensors"
    if not path.is_file():
        problem, config = setting.problem, setting.problem.teacher.config
        images = load_images(DataArguments(), job.preset, "train", config["sample_size"], config["in_channels"])
        kind = method_class("retrain")
        retrained = Problem(problem.teacher, problem.schedule, problem.request, training_images=images)
        phase = kind(Setting(retrained, setting.compute), method_options(job.preset, kind)).phases[0]
        phase.start(None)
        for iteration in range(phase.iterations):
            phase.step(iteration)
        with phase.averaged() as network:
            teacher = copy.deepcopy(unwrap(network))
        generator, _ = distil(job.preset, Problem(teacher, problem.schedule, problem.request), retained_only=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {name: value.contiguous() for name, value in generator.items()})
    network = copy.deepcopy(setting.problem.teacher)
    network.load_state_dict(load_file(path))
    return network


def network_of(job: Job, folder: Path) -> nn.Module:
    """The generator of a job, or of a control, in eval mode."""
    if job.condition.name == NEVER_SAW:
        return _never_saw(job, folder).eval()
    if job.condition.name == RELABEL:
        start = method_of(Job(job.preset, job.pair, REFERENCE, job.seed), folder).setting.problem.initial_generator
        request = ForgetRequest.of(start, [job.pair[0]], job.pair[1])
        return relabelled(start, request, job.seed).eval()
    method = method_of(job, folder)
    train(method)
    with method.phases[-1].averaged() as network:
        return copy.deepcopy(unwrap(network)).eval()


def attacked(
    network: nn.Module, job: Job, folder: Path, steps_of: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[int, float]]:
    """Attack a copy of a generator.

    Parameters
    ----------
    network : nn.Module
        In eval mode. Is not changed.
    job : Job
        Which classes it has forgotten, and the seed.
    folder : Path
        Of the distilled generators.
    steps_of : mapping of str to tuple of int
        Attack to the steps after which it is measured, ascending.

    Returns
    -------
    dict
        Attack to steps to UA in percent, from 0 steps on.
    """
    method = method_of(Job(job.preset, job.pair, REFERENCE, job.seed), folder)
    problem, values = method.setting.problem, class_preset(job.preset)
    judge = load_judge(values.judge)
    size, channels = (network.config[name] for name in ("sample_size", "in_channels"))
    real = load_images(DataArguments(), job.preset, "all", size, channels)
    examiner = Examiner(judge, problem.request, problem.schedule, method.sampler, 10, job.seed, *SAMPLES)
    images, labels = adversary_images(real, problem.request, "forgotten", IMAGES, job.seed)
    rows = []
    for attack, steps in steps_of.items():
        options = RelearnOptions(IMAGES, steps, values.pretrain.learning_rate / 10)
        rows += relearn(network, examiner, images, labels, attack, options)
    by_attack: dict[str, dict[int, float]] = {}
    for row in rows:
        label = row["attack"] if row["sampler"] == method.sampler.name else f"{row['attack']}, {row['sampler']}"
        by_attack.setdefault(label, {})[row["step"]] = row["ua"]
    return by_attack


def relearn_job(job: Job, folder: Path) -> dict[str, Any]:
    """Attack a generator; returns the record as JSON: the UA, in percent, after each number of steps of each attack."""
    by_attack = attacked(network_of(job, folder), job, folder, STEPS)
    preset, pair, name, seed = job.key
    return {
        "preset": preset,
        "pair": pair,
        "condition": name,
        "seed": seed,
        "options": job.condition.options,
        "ua": by_attack,
        "line": ", ".join(
            f"{label} {' / '.join(f'{ua:.0f}' for ua in of.values())}" for label, of in by_attack.items()
        ),
    }
