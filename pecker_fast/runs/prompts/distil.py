"""Distilling a text-to-image model: a one-step generator, and its score network."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...hashing import weights_hash
from ...models import save_text_network
from ...training.loop import Progress
from ..arguments import UnlearnArguments
from ..distilled import SCORE, SaveArguments, last_score, rounded
from .request import PromptRequestArguments
from .task import PromptTask


@dataclass(frozen=True)
class PromptDistilArguments(SaveArguments, PromptRequestArguments):
    """Which model to distil, on which prompts, and which samples to draw of it: those to keep and those that are to be
    forgotten later."""


class PromptDistillation(PromptTask):
    """A Stable Diffusion is distilled on all prompts, and none is forgotten."""

    command = "distil"

    @staticmethod
    def defaults(preset_name: str, method: str) -> UnlearnArguments:
        return dataclasses.replace(PromptTask.defaults(preset_name, method), request=PromptDistilArguments())

    def result(self, network: nn.Module) -> nn.Module:
        return rounded(rounded(network, self.args.request.dtype), torch.float32)

    def finish(self, network: nn.Module, progress: Progress) -> dict[str, Any]:
        score = rounded(self.setting.problem.teacher, torch.float32)
        score.load_state_dict(last_score(self.args.folder))
        score = rounded(score, self.args.request.dtype)
        save_text_network(self.args.folder / SCORE, score)
        return {**super().finish(network, progress), "score_sha256": weights_hash(rounded(score.unet, torch.float32))}

    def _save(self, network: nn.Module) -> None:
        super()._save(rounded(network, self.args.request.dtype))
