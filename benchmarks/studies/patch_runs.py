"""One run of the study of patches: from a distilled generator to a record of its figures. Nothing but the distilled
networks is kept on disk: a run takes seconds, and an interrupted one is made again."""

import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.delta import save_delta
from pecker_fast.diffusion.networks import unwrap
from pecker_fast.files import save_tensors
from pecker_fast.hashing import weights_hash
from pecker_fast.metrics.drift import total, weight_drift
from pecker_fast.models import resolve
from pecker_fast.report.files import images_to_forget
from pecker_fast.runs.presets import class_preset, method_options
from pecker_fast.unlearning import Compute, ForgetRequest, Method, Problem, Setting, method_class

from .ablate import FULL_STEPS, UA_STEPS, SparseEvaluation, evaluator_of
from .lora import LoraSFD

# Half of the digits' batch, to save time; the other options are the preset's.
COMMON = {"max_train_steps": 80, "train_batch_size": 24, "forget_batch_size": 8}
SAMPLES_PER_CLASS = 100
# Iterations of the distillation that all runs start from, at the preset's own batch.
DISTILLATION = 300


@dataclass(frozen=True)
class Condition:
    """A method with options.

    Parameters
    ----------
    name : str
        In tables, and in the key of its runs.
    method : str
        Name of a method, or "lora".
    options : dict
        Options that differ from those of the preset.
    group : str
        Conditions of a group are settings of one rule, of which the best counts.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Job:
    """A run that is to be made."""

    preset: str
    pair: tuple[int, int]
    condition: Condition
    seed: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What a record is found by."""
        return self.preset, f"{self.pair[0]}-{self.pair[1]}", self.condition.name, self.seed

    @property
    def title(self) -> str:
        preset, pair, name, seed = self.key
        return f"{preset} {pair.replace('-', ' onto ')}, {name}, seed {seed}"


def distilled(preset: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The generator and the score network that all runs on a preset start from; made once and kept in ``folder``."""
    path = folder / f"distilled-{preset}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        model, kind = resolve(None, shipped=class_preset(preset).network), method_class("sfd")
        request = ForgetRequest.of(model.network, (0,), 1)
        options = replace(method_options(preset, kind), two_stage=True, first_stage_steps=DISTILLATION)
        method = kind(Setting(Problem(model.network, model.schedule, request)), options)
        phase = method.phases[0]
        phase.start(None)
        for iteration in range(phase.iterations):
            phase.step(iteration)
        with phase.averaged() as network:
            tensors = {f"generator.{name}": value.contiguous() for name, value in network.state_dict().items()}
            tensors |= {f"score.{name}": value.contiguous() for name, value in method.score.state_dict().items()}
            save_tensors(path, tensors)
    from safetensors.torch import load_file

    states: dict[str, dict[str, Tensor]] = {"generator": {}, "score": {}}
    for name, value in load_file(path).items():
        network, _, rest = name.partition(".")
        states[network][rest] = value
    return states


@lru_cache(maxsize=4)
def _start(preset: str, folder: Path) -> tuple[Any, nn.Module, nn.Module, str]:
    """The pretrained model, generator and score network of a preset, and the generator's hash."""
    states = distilled(preset, folder)
    networks = []
    for state in (states["generator"], states["score"]):
        network = resolve(None, shipped=class_preset(preset).network).network
        network.load_state_dict(state)
        networks.append(network)
    return resolve(None, shipped=class_preset(preset).network), *networks, weights_hash(networks[0])


def method_of(job: Job, folder: Path) -> Method:
    """The method of a job on its setting."""
    model, generator, score, _ = _start(job.preset, folder)
    request = ForgetRequest.of(model.network, job.pair[:1], job.pair[1])
    problem = Problem(model.network, model.schedule, request, initial_generator=generator, initial_score=score)
    kind = LoraSFD if job.condition.method == "lora" else method_class(job.condition.method)
    options = replace(method_options(job.preset, kind), **{**COMMON, **job.condition.options})
    return kind(Setting(problem, Compute(seed=job.seed)), options)


def train(method: Method, evaluation: SparseEvaluation | None = None) -> dict[str, Any]:
    """Run the last phase of a method; returns its evaluations and the processor time of its iterations."""
    phase, evaluations, seconds = method.phases[-1], [], []
    phase.start(None)
    for iteration in range(phase.iterations):
        start = time.process_time()
        phase.step(iteration)
        seconds.append(time.process_time() - start)
        step = iteration + 1
        if evaluation is not None and (step % UA_STEPS == 0 or step == phase.iterations):
            with phase.averaged() as network:
                record = evaluation(network, step)
            evaluations.append({**record, "images": step * phase.images_per_iteration})
    # The first iteration computes the mask.
    median = statistics.median(seconds[1:]) if len(seconds) > 1 else seconds[0]
    return {"evaluations": evaluations, "iteration_seconds": median, "first_seconds": seconds[0]}


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Make a run; returns its record as JSON."""
    method = method_of(job, folder)
    setting, phase = method.setting, method.phases[-1]
    size = setting.problem.teacher.config["sample_size"]
    evaluator = evaluator_of(job.preset, size, job.pair[:1], job.pair[1])
    trained = train(method, SparseEvaluation(setting, method, evaluator, SAMPLES_PER_CLASS))
    evaluations = trained.pop("evaluations")
    with phase.averaged() as network:
        # An adapter is merged, so that names and weights are the generator's.
        result = method.merged() if isinstance(method, LoraSFD) else unwrap(network)
        start = setting.problem.initial_generator
        drift = total(weight_drift(result, start).values())
        size = patch_bytes(start.state_dict(), result.state_dict())
    preset, pair, name, seed = job.key
    final = evaluations[-1]
    figures = {key: final.get(key) for key in FINAL} | {
        "images_to_forget": images_to_forget(evaluations),
        "changed": 100 * drift.changed / drift.entries,
        "drift": drift.relative,
        "patch_bytes": method.adapter_bytes() if isinstance(method, LoraSFD) else size,
        "state_bytes": state_bytes(phase),
        **trained,
    }
    return {
        "preset": preset,
        "pair": pair,
        "condition": name,
        "seed": seed,
        "group": job.condition.group,
        "method": job.condition.method,
        "options": job.condition.options,
        "images": final["images"],
        "generator_sha256": _start(job.preset, folder)[3],
        "figures": figures,
        "ua": [[record["images"], round(record["ua"], 2)] for record in evaluations],
    }


FINAL = ("ua", "retain_accuracy", "frechet_distance", "diversity", "cover_frechet_distance", "cover_diversity")


def state_bytes(phase: Any) -> int:
    """Bytes of the state of the generator's optimizer: moments, averages, masters, masks, step counts."""
    optimizer = phase.generator_optimizer
    trained = [param for param in phase.generator.parameters() if param.requires_grad]
    tensors = [value for param in trained for value in optimizer.state[param].values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def patch_bytes(base: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> int:
    """Bytes of the smallest file that turns ``base`` into ``changed``: of the changed entries, or of all."""
    with tempfile.TemporaryDirectory() as folder:
        summary = save_delta(base, changed, Path(folder) / "delta.safetensors")
    return min(summary.bytes, sum(value.nbytes for value in changed.values()))
