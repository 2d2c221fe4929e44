"""Measuring the networks of a run while it trains and at its end, and the protocol of a measurement."""

from typing import Any

import torch
from torch import Tensor, nn

from ...data import LabelledImages
from ...diffusion import pretrained_sampler
from ...hashing import weights_hash
from ...metrics import Evaluator, Judge, percentage_of_unlearning
from ...unlearning import ForgetRequest, Method, Setting

# How the real images are split into two samples.
REAL_SPLIT = {"repeats": 8, "seed": 0}


def split_count(evaluator: Evaluator, retained: int) -> int | None:
    """The size of each of two samples of real images: ``retained``, the number of generated images of retained classes,
    or half of the real images if there are not enough. None for fewer than two."""
    count = min(retained, len(evaluator.real.retained_labels) // 2)
    return count if count >= 2 else None


def real_split(evaluator: Evaluator, retained: int, stratified: bool = False) -> float | None:
    """The Fréchet distance between two samples of real images of this size: the best that generated images can get."""
    count = split_count(evaluator, retained)
    return None if count is None else evaluator.real_split_frechet(count, stratified=stratified, **REAL_SPLIT)


def protocol_of(
    evaluator: Evaluator, samples: dict[str, Any], reference: dict[str, Any], retained: int
) -> dict[str, Any]:
    """Describe how something was measured, as JSON.

    Parameters
    ----------
    evaluator : Evaluator
        What measured it.
    samples : dict
        How the images were drawn, with their seed.
    reference : dict
        Which real images they were compared with.
    retained : int
        Number of generated images of retained classes.
    """
    judge, real = evaluator.judge, evaluator.real
    return {
        "samples": samples,
        "judge": {
            "name": judge.name,
            "accuracy": judge.accuracy,
            "recipe": judge.recipe,
            "config": judge.model.config,
            "sha256": weights_hash(judge.model),
        },
        "feature_extractor": judge.feature_extractor,
        "forget_classes": list(real.forget_classes),
        "cover_class": real.cover_class,
        "reference": {**reference, "classes": "retained"},
        "real_images": len(real.retained_labels),
        "real_split": {"images": split_count(evaluator, retained), **REAL_SPLIT},
        "pixels": "float32, cut to [-1, 1]",
    }


class RunEvaluation:
    """Samples networks with fixed labels and noise, so that curves show nothing but the network's change.

    Parameters
    ----------
    setting, method
        Of the run.
    dataset : LabelledImages
        Real images.
    judge : Judge
        The classifier.
    samples_per_class : int
        Images of each class.
    reference : dict
        Which real images ``dataset`` has, for the protocol.

    Raises
    ------
    ValueError
        If the judge has another number of classes than the network.
    """

    def __init__(
        self,
        setting: Setting,
        method: Method,
        dataset: LabelledImages,
        judge: Judge,
        samples_per_class: int,
        reference: dict[str, Any],
    ) -> None:
        request: ForgetRequest = setting.problem.request
        if judge.num_classes != request.num_classes:
            raise ValueError(f"the judge has {judge.num_classes} classes, the pretrained network {request.num_classes}")
        self.setting, self.method, self.judge = setting, method, judge
        judge.model.to(setting.compute.device)
        self.labels = torch.arange(request.num_classes).repeat_interleave(samples_per_class)
        self.evaluator = Evaluator(dataset, judge, request.forget_classes, request.cover_class)
        self.samples_per_class, self.reference = samples_per_class, reference
        self.retained = samples_per_class * len(request.retained_classes)
        self.real_split = {
            "frechet_real_split": real_split(self.evaluator, self.retained),
            "frechet_real_split_stratified": real_split(self.evaluator, self.retained, stratified=True),
        }

    def protocol(self) -> dict[str, Any]:
        """How the run was measured, for metrics.json."""
        teacher = pretrained_sampler(self.setting.problem.schedule, self.setting.problem.teacher)
        how = "in one step" if teacher.kind == "one_step" else f"by {teacher.num_inference_steps} steps of DDIM"
        how += "" if teacher.guidance_scale is None else f" with guidance {teacher.guidance_scale:g}"
        samples = {
            **self.method.sampler.summary(),
            "t_init": getattr(self.method.options, "t_init", None),
            "samples_per_class": self.samples_per_class,
            "seed": self.setting.compute.seed,
            "before": f"the pretrained network {how}, same seed",
        }
        return protocol_of(self.evaluator, samples, self.reference, self.retained)

    def samples(self, network: nn.Module) -> Tensor:
        """Images (N, C, H, W) of a network of the run, on the CPU."""
        problem, compute = self.setting.problem, self.setting.compute
        with compute.autocast():
            images = self.method.sampler.draw(network, problem.schedule, self.labels, compute.seed)
        return images.float().cpu()

    def __call__(self, network: nn.Module) -> dict[str, Any]:
        """The figures of a network of the run, for evaluation.jsonl."""
        return self.evaluator(self.samples(network), self.labels)

    def teacher_samples(self) -> Tensor:
        """Images (N, C, H, W) of the pretrained network as ``pretrained_sampler`` draws them, on the CPU."""
        problem, compute = self.setting.problem, self.setting.compute
        with compute.autocast():
            sampler = pretrained_sampler(problem.schedule, problem.teacher)
            images = sampler.draw(problem.teacher, problem.schedule, self.labels, compute.seed)
        return images.cpu()

    def before(self, images: Tensor) -> dict[str, Any]:
        """The figures of the pretrained network's images, its accuracy on the classes to forget among them."""
        measured = self.evaluator(images, self.labels)
        probabilities, _ = self.judge(images)
        forgotten = torch.isin(self.labels, torch.tensor(self.setting.problem.request.forget_classes))
        right = probabilities.argmax(1)[forgotten] == self.labels[forgotten]
        return {
            "before_forget_accuracy": 100 * right.double().mean().item() if len(right) else None,
            "before_retain_accuracy": measured["retain_accuracy"],
            "before_frechet_distance": measured["frechet_distance"],
            "before_diversity": measured["diversity"],
            "before_forgotten_share": measured["forgotten_share"],
        }

    def result(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        """What metrics.json has of the images before and after the run beside the figures of the evaluations.

        "forgotten_share", "u_frechet_distance", "pul" and "by_class": ``class_figures`` of the images after it, with
        the "accuracy_before" of each class.
        """
        earlier, first = self.evaluator.with_classes(before, self.labels)
        figures, classes = self.evaluator.with_classes(after, self.labels)
        for row, old in zip(classes["classes"], first["classes"], strict=True):
            row["accuracy_before"] = old["accuracy"]
        return {
            "forgotten_share": figures["forgotten_share"],
            "u_frechet_distance": figures["u_frechet_distance"],
            "pul": percentage_of_unlearning(earlier["forgotten_share"], figures["forgotten_share"]),
            "by_class": classes,
        }


def summary(records: list[dict[str, Any]], iterations: int) -> dict[str, Any]:
    """The last evaluation of a run, and the lowest UA of the evaluations in its second half."""
    if not records:
        return {}
    last = {name: value for name, value in records[-1].items() if name not in ("step", "images", "seconds")}
    late = [record["ua"] for record in records if record["step"] > iterations / 2 and record["ua"] is not None]
    return {**last, "ua_last_half_min": min(late) if late else None}
