"""One run of the study of patches: from a distilled generator to a record of its figures. Nothing but the distilled
networks is kept on disk: a run takes seconds, and an interrupted one is made again."""

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pecker_fast.diffusion.networks import unwrap
from pecker_fast.files import save_tensors
from pecker_fast.hashing import weights_hash
from pecker_fast.metrics.drift import total, weight_drift
from pecker_fast.models import resolve
from pecker_fast.patches import Patch
from pecker_fast.report.files import images_to_forget
from pecker_fast.runs.distilled import SHIPPED, Distilled, is_distilled
from pecker_fast.runs.presets import class_preset, method_options
from pecker_fast.unlearning import Compute, ForgetRequest, Method, Problem, Setting, method_class

from .ablate import UA_STEPS, SparseEvaluation, evaluator_of
from .lora import LoraSFD
from .patch_conditions import Job

# Half of the digits' batch, to save time; the other options are the preset's.
COMMON = {"max_train_steps": 80, "train_batch_size": 24, "forget_batch_size": 8}
# Of every ratio, unless a condition has another number: the presets' defaults follow from the study.
CHUNKS = 64
SAMPLES_PER_CLASS = 100
KINDS = ("generator", "score")


def distil(preset: str, problem: Problem, retained_only: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The states of a one-step generator of all classes, or of the retained ones, and of its score network."""
    kind = method_class("sfd" if retained_only else "distil")
    options = method_options(preset, kind)
    if retained_only:
        # As long as the other distillation, on retained samples only.
        weights = {"generator_forget_weight": 0.0, "score_forget_weight": 0.0}
        length = method_options(preset, method_class("distil")).max_train_steps
        options = replace(options, max_train_steps=length, **weights)
    method = kind(Setting(problem), options)
    phase = method.phases[0]
    phase.start(None)
    for iteration in range(phase.iterations):
        phase.step(iteration)
    with phase.averaged() as network:
        states = network.state_dict(), method.score.state_dict()
        generator, score = ({name: value.clone() for name, value in state.items()} for state in states)
    return generator, score


def distilled(preset: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The generator and the score network that all runs on a preset start from: those that come with the package, or
    else networks that are made once and kept in ``folder``."""
    from safetensors.torch import load_file

    shipped = f"{SHIPPED}{class_preset(preset).network}"
    if is_distilled(shipped):
        paths = Distilled.read(shipped).networks.values()
        return dict(zip(KINDS, (resolve(path).network.state_dict() for path in paths), strict=True))
    path = folder / f"distilled-{preset}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        model = resolve(None, shipped=class_preset(preset).network)
        states = distil(preset, Problem(model.network, model.schedule, ForgetRequest.of(model.network, (0,), 1)))
        named = zip(KINDS, states, strict=True)
        save_tensors(path, {f"{kind}.{name}": value for kind, state in named for name, value in state.items()})
    networks: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for name, value in load_file(path).items():
        kind, _, rest = name.partition(".")
        networks[kind][rest] = value
    return networks


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
    options = method_options(job.preset, kind)
    estimate = {"saliency_chunks": CHUNKS} if hasattr(options, "saliency_chunks") else {}
    options = replace(options, **{**COMMON, **estimate, **job.condition.options})
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
        "gradient_bytes": phase.gradient_bytes(),
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
        "line": line_of(figures),
        "ua": [[record["images"], round(record["ua"], 2)] for record in evaluations],
    }


def line_of(figures: Mapping[str, Any]) -> str:
    """The main figures in one line."""
    reached = figures["images_to_forget"]
    return (
        f"UA 98 {'never' if reached is None else f'after {reached} images'}, retained Fréchet "
        f"{figures['frechet_distance']:.2f}, cover Fréchet {figures['cover_frechet_distance']:.0f}, "
        f"{figures['iteration_seconds']:.3f} s an iteration"
    )


FINAL = ("ua", "retain_accuracy", "frechet_distance", "diversity", "cover_frechet_distance", "cover_diversity")


def state_bytes(phase: Any) -> int:
    """Bytes of the state of the generator's optimizer: moments, averages, masters, masks, step counts."""
    optimizer = phase.generator_optimizer
    trained = [param for param in phase.generator.parameters() if param.requires_grad]
    tensors = [value for param in trained for value in optimizer.state[param].values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def patch_bytes(base: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> int:
    """Bytes of the smallest file that turns ``base`` into ``changed``: a patch, or all weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patch.safetensors"
        Patch.between(base, changed).save(path)
        return min(path.stat().st_size, sum(value.nbytes for value in changed.values()))
