"""Results that many runs of the tests share, computed once in a process: a run on the digits spends most of its time on
the images of its pretrained network and on the features of the real images.

They are found by everything that they depend on. Each is computed by the code under test, and a change of that code
shows in the first run.
"""

import copy
import hashlib
import sys
from collections.abc import Callable, Hashable

import torch

from pecker_fast.hashing import weights_hash

_results: dict[Hashable, object] = {}


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.shape} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def _result(key: Hashable, compute: Callable[[], object]) -> object:
    if key not in _results:
        _results[key] = compute()
    # The caller may change what it gets.
    return copy.deepcopy(_results[key])


def _images_of(measure, draw: Callable) -> Callable:
    """``RunEvaluation.teacher_samples``."""

    def teacher_samples(self):
        problem, compute = self.setting.problem, self.setting.compute
        teacher = problem.teacher
        if compute.compile or type(teacher).__name__ != "UNet2DModel":
            return draw(self)
        key = (
            "images", weights_hash(teacher), repr(teacher.config), teacher.training,
            repr(measure.pretrained_sampler(problem.schedule, teacher)), type(problem.schedule),
            _digest(*problem.schedule._float64.values(), self.labels), compute.seed, compute.mixed_precision,
            compute.channels_last, compute.device, torch.get_num_threads(),
        )  # fmt: skip
        return _result(key, lambda: draw(self))

    return teacher_samples


def _statistics(metrics, of: Callable) -> Callable:
    """``RealStatistics.of``."""

    def remembered(dataset, judge, forget_classes, cover_class=None):
        compute = lambda: of(dataset, judge, forget_classes, cover_class)  # noqa: E731
        plain = type(judge) is metrics.Judge and type(forget_classes) in (list, tuple)
        if not plain or not isinstance(dataset.images, torch.Tensor):
            return compute()
        key = (
            "features", _digest(dataset.images, dataset.labels), dataset.class_names, weights_hash(judge.model),
            type(judge.model), repr(judge.model.config), judge.class_names, judge.name, tuple(forget_classes),
            cover_class, torch.get_num_threads(),
        )  # fmt: skip
        return _result(key, compute)

    return remembered


def _split(of: Callable) -> Callable:
    """``real_split_frechet``."""

    def remembered(features, count=None, *, labels=None, repeats, seed):
        digests = _digest(features), None if labels is None else _digest(labels)
        key = ("split", *digests, count, repeats, seed)
        return _result(key, lambda: of(features, count, labels=labels, repeats=repeats, seed=seed))

    return remembered


def remember(monkeypatch) -> None:
    """Patch the modules that have been imported by now."""
    measure = sys.modules.get("pecker_fast.runs.classes.measure")
    if measure is not None:
        kind = measure.RunEvaluation
        monkeypatch.setattr(kind, "teacher_samples", _images_of(measure, kind.teacher_samples))
        metrics = sys.modules["pecker_fast.metrics.unlearning"]
        monkeypatch.setattr(metrics.RealStatistics, "of", staticmethod(_statistics(metrics, metrics.RealStatistics.of)))
        monkeypatch.setattr(metrics, "real_split_frechet", _split(metrics.real_split_frechet))
