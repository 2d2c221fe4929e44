"""Distilling a class-conditional network: a one-step generator of all classes, and its score network."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...diffusion import num_classes
from ...hashing import weights_hash
from ...models import save_network
from ...training.loop import Progress
from ...unlearning import ForgetRequest, RetainRequest, method_class
from ..arguments import DataArguments, UnlearnArguments
from ..distilled import SCORE, SaveArguments, last_score, rounded
from ..presets import class_preset, method_loop, method_options
from .task import ClassModelArguments, ClassTask


@dataclass(frozen=True)
class ClassDistilArguments(SaveArguments, ClassModelArguments):
    """Which network to distil, and how the result is measured and saved."""

    # No options: what a run that forgets nothing has in their place.
    forget_classes: ClassVar = ()
    cover_class: ClassVar = "random"
    forget_data: ClassVar = None
    distilled: ClassVar = None
    initial_generator: ClassVar = None
    initial_score: ClassVar = None


class ClassDistillation(ClassTask):
    """A class-conditional network is distilled, and no class is forgotten."""

    command = "distil"

    @staticmethod
    def defaults(preset_name: str, method: str) -> UnlearnArguments:
        values, kind = class_preset(preset_name), method_class(method)
        request = ClassDistilArguments(samples_per_class=values.samples_per_class)
        options, loop = method_options(preset_name, kind), method_loop(preset_name, kind)
        return UnlearnArguments(preset_name, method, options, request, DataArguments(), loop=loop)

    @classmethod
    def _check_request(cls, args: UnlearnArguments, classes: int) -> None:
        RetainRequest(classes)

    def _request(self, network: nn.Module) -> ForgetRequest:
        return RetainRequest(num_classes(network))

    def result(self, network: nn.Module) -> nn.Module:
        return rounded(rounded(network, self.args.request.dtype), torch.float32)

    def export(self, network: nn.Module, folder: Path) -> None:
        super().export(rounded(network, self.args.request.dtype), folder)

    def finish(self, network: nn.Module, progress: Progress) -> dict[str, Any]:
        problem, folder = self.setting.problem, self.args.folder
        score = copy.deepcopy(problem.teacher)
        score.load_state_dict(last_score(folder))
        score = rounded(score, self.args.request.dtype)
        save_network(folder / SCORE, score, problem.schedule)
        return {**super().finish(network, progress), "score_sha256": weights_hash(rounded(score, torch.float32))}

    def _measured(self, records: list[dict[str, Any]], after: Tensor, progress: Progress) -> dict[str, Any]:
        # The run's evaluations were of weights that had not been rounded.
        evaluation = self.evaluation
        right = evaluation.judge(after)[0].argmax(1) == evaluation.labels
        shares = [right[evaluation.labels == c].double().mean().item() for c in evaluation.labels.unique()]
        return {**evaluation.evaluator(after, evaluation.labels), "worst_retained_accuracy": 100 * min(shares)}
