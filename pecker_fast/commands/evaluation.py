"""Evaluation of a run while it is under way and at its end."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data import LabelledImages
from ..diffusion import sample_ddim
from ..metrics import Evaluator, Judge
from ..unlearning import ForgetRequest, Method, Phase, Setting

DDIM_STEPS = 50


class RunEvaluation:
    """Samples and measures networks on fixed labels and noise, so that curves show the network's change alone.

    Parameters
    ----------
    setting, method: of the run.
    dataset, judge: real images and the classifier.
    samples_per_class: images of each class.
    """

    def __init__(
        self, setting: Setting, method: Method, dataset: LabelledImages, judge: Judge, samples_per_class: int
    ) -> None:
        request: ForgetRequest = setting.request
        if judge.num_classes != request.num_classes:
            raise ValueError(
                f"the judge knows {judge.num_classes} classes, the pretrained network {request.num_classes}"
            )
        self.setting, self.method, self.judge = setting, method, judge
        judge.model.to(setting.device)
        self.labels = torch.arange(request.num_classes).repeat_interleave(samples_per_class)
        self.evaluator = Evaluator(dataset, judge, request.forget_classes, request.cover_class)
        retained = samples_per_class * len(request.retained_classes)
        self.real_split = {
            "frechet_real_split": self.evaluator.real_split_frechet(retained),
            "frechet_real_split_stratified": self.evaluator.real_split_frechet(retained, stratified=True),
        }

    def samples(self, network: nn.Module) -> Tensor:
        """Images (N, C, H, W) on the CPU of the labels."""
        return self.method.sample(network, self.labels, seed=self.setting.seed).float().cpu()

    def __call__(self, phase: Phase, step: int) -> dict[str, Any]:
        """What goes into evaluation.jsonl."""
        with phase.averaged() as network:
            return self.evaluator(self.samples(network), self.labels)

    def teacher_samples(self) -> Tensor:
        """Images (N, C, H, W) that the pretrained network draws of the labels by DDIM, on the CPU."""
        with self.setting.autocast():
            return sample_ddim(
                self.setting.teacher, self.setting.schedule, self.labels, DDIM_STEPS, seed=self.setting.seed
            ).cpu()

    def before(self, images: Tensor) -> dict[str, Any]:
        """How well the pretrained network drew, and above all what is to be forgotten."""
        measured = self.evaluator(images, self.labels)
        probabilities, _ = self.judge(images)
        forgotten = torch.isin(self.labels, torch.tensor(self.setting.request.forget_classes))
        right = probabilities.argmax(1)[forgotten] == self.labels[forgotten]
        return {
            "before_forget_accuracy": 100 * right.double().mean().item(),
            "before_retain_accuracy": measured["retain_accuracy"],
            "before_frechet_distance": measured["frechet_distance"],
            "before_diversity": measured["diversity"],
        }


def summary(records: list[dict[str, Any]], iterations: int) -> dict[str, Any]:
    """The last evaluation, and the least UA of the evaluations in the last half of the run."""
    if not records:
        return {}
    last = {name: value for name, value in records[-1].items() if name not in ("step", "images", "seconds")}
    late = [record["ua"] for record in records if record["step"] > iterations / 2 and record["ua"] is not None]
    return {**last, "ua_last_half_min": min(late) if late else None}
