"""Measuring networks that draw images of classes: forgetting, and the quality of everything else."""

import contextlib
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...checks import check_int
from ...data import LabelledImages
from ...diffusion import class_names, null_label, num_classes
from ...hashing import weights_hash
from ...metrics import Evaluator, Judge, Uint8Images, check_inception_weights, image_quality, to_uint8
from ...models import resolve
from ...unlearning import ForgetRequest
from ..arguments import DataArguments, device_of
from ..evaluate import EvaluateArguments
from ..presets import class_preset
from ..remembered import USUAL, record_of
from ..samples import CHUNK, SampleCache
from .data import check_images, check_judge, dataset_of, find_judge, load_images
from .measure import protocol_of, real_split
from .names import cover_of, labels_of


@dataclass(frozen=True, kw_only=True)
class ClassEvaluation(EvaluateArguments):
    """Options of an evaluation of a class-conditional network."""

    preset: str | None = None
    """digits, digits16, mnist, images, cifar10 or stl10. Default: that of the run, otherwise digits."""
    forget_classes: tuple[str, ...] | None = None
    """Forgotten classes, by number or name. Default: those of the run, otherwise none."""
    cover_class: str | None = None
    """Class drawn in their place, by number or name, or "random". Default: that of the run."""
    samples_per_class: int | None = None
    """Images of each class. Default: as published (cifar10 5000, stl10 1300), digits 100."""
    sampler: Literal["auto", "one_step", "ddim", "ddpm"] = "auto"
    """auto: as the run or pipeline draws (in one step at its t_init, or by the run's sampler), otherwise DDIM."""
    t_init: int | None = None
    """Timestep of the one-step sampler. Default: that of the run."""
    num_inference_steps: int | None = None
    """Steps of ddim and ddpm. Default: those of the run, otherwise 50."""
    judge: str | None = None
    """File of the classifier. Default: the run's, otherwise the preset's."""
    inception_weights: str | None = None
    """File of Inception's weights, for FID, sFID, IS, KID, precision and recall. Without it precision and recall are
    computed from the judge's features, under other names."""
    dataset_name: str | None = None
    """digits, mnist, cifar10, stl10 or folder:<path>. Default: the run's, otherwise the preset's."""
    data_root: str | None = None
    """Folder with the files of cifar10 or stl10."""
    batch_size: int = 256
    """Images in a call of the network."""
    seed: int = 0
    """Seed of the samples."""
    features_dir: str | None = None
    """Folder for Inception's features, which several runs can share. Default: evaluation/features beside the result."""

    key: ClassVar = "evaluation"
    runs_measure: ClassVar = True

    def measure(self, target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        config, device = self.config or record_of(self.path), device_of(self.device)
        check_int("seed", self.seed, 0)
        if self.features_dir is not None and self.inception_weights is None:
            raise ValueError(f"features_dir is {self.features_dir!r}, but there are no inception_weights to use it")
        preset_name = self.preset or config.get("preset", USUAL)
        values = class_preset(preset_name)
        model = resolve(self.path, shipped=values.network)
        network, classes = model.network, num_classes(model.network)
        path = self.judge or config.get("judge")
        names = class_names(network) or tuple(config.get("class_names") or (Judge.names_in(path) if path else ()))
        forgotten = tuple(config.get("forget_classes", ()))
        if self.forget_classes is not None:
            forgotten = labels_of(self.forget_classes, names)
        cover = config.get("cover_class") if self.cover_class is None else cover_of(self.cover_class, names)
        if forgotten:
            ForgetRequest(classes, forgotten, cover)
        if self.inception_weights is not None:
            check_inception_weights(self.inception_weights)
        usual = values.final_samples_per_class or values.samples_per_class
        count = usual if self.samples_per_class is None else self.samples_per_class
        if count < 2:
            raise ValueError(f"samples_per_class is {count}, expected at least 2")
        judge = find_judge(preset_name, path)
        if judge is None:
            raise ValueError(
                f"judge is not given, and the preset {preset_name} comes without one: expected a classifier"
            )
        data = DataArguments(self.dataset_name or config.get("dataset_name"), self.data_root or config.get("data_root"))
        size, channels = network.config["sample_size"], network.config["in_channels"]
        name = dataset_of(data, preset_name)
        real = load_images(data, preset_name, values.reference_split, size, channels)
        check_images(real, name, network, "the network")
        check_judge(judge, path, real, name)
        judge.model.to(device)
        evaluator = Evaluator(real, judge, forgotten, cover if forgotten else None)
        sampler = model.sampler(self.sampler, self.t_init, self.num_inference_steps, self.batch_size)
        labels = torch.arange(classes).repeat_interleave(count)
        described = {
            "pretrained_sha256": weights_hash(network),
            **sampler.describe(),
            "samples_per_class": count,
            "num_classes": classes,
            "null_label": null_label(network),
            "seed": self.seed,
            "chunk": CHUNK,
        }
        network, schedule = network.to(device), model.schedule.to(device)

        def draw(labels: Tensor, seed: int) -> Tensor:
            return sampler.draw(network, schedule, labels, seed)

        cache = SampleCache(target.parent / "evaluation", described, draw, CHUNK)
        images = cache.samples(labels, self.seed, self.progress_bar)
        measured, by_class = evaluator.with_classes(images, labels)
        figures: dict[str, Any] = {"pretrained": model.source, **measured}
        retained = torch.isin(labels, torch.tensor(forgotten, dtype=torch.int64)).logical_not()
        figures["frechet_real_split"] = real_split(evaluator, int(retained.sum()))
        reference = {"dataset": name, "split": values.reference_split}
        protocol = protocol_of(evaluator, described, reference, int(retained.sum()))
        real = real.of_classes([label for label in range(classes) if label not in forgotten])
        features = Path(self.features_dir or cache.folder.parent / "features")
        everything = images if forgotten else None
        quality = self._quality(images[retained], real, judge, device, features, everything)
        if quality is not None:
            protocol["image_quality"] = quality.pop("protocol")
            figures |= quality
        return {**figures, "by_class": by_class}, protocol

    def _quality(
        self,
        images: Tensor,
        real: LabelledImages,
        judge: Judge,
        device: torch.device,
        features: Path,
        everything: Tensor | None,
    ) -> dict[str, Any] | None:
        """``image_quality`` of images of the retained classes, and of those of all classes if some are forgotten.

        In Inception's features if its weights are given and otherwise in the judge's. None if torch-fidelity is
        missing and only the judge's features were wanted.
        """
        extractor: dict[str, Any] = {"weights": self.inception_weights}
        if self.inception_weights is None:
            if find_spec("torch_fidelity") is None:
                print(
                    "pecker-fast: no precision and recall: torch-fidelity is not installed (pip install "
                    "'pecker-fast[eval]')",
                    file=sys.stderr,
                )
                return None
            from ...metrics.extractors import register_judge

            extractor = {"feature_extractor": register_judge(judge)}
        # torch-fidelity computes on the current GPU.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return image_quality(
                Uint8Images(to_uint8(images)),
                Uint8Images(lambda i: to_uint8(real.batch(torch.tensor([i])))[0], len(real)),
                cuda=device.type == "cuda",
                batch_size=min(self.batch_size, 64),
                verbose=self.progress_bar,
                cache=features,
                everything=None if everything is None else Uint8Images(to_uint8(everything)),
                **extractor,
            )
