"""Forgetting classes: the request, the networks, and how a run on them is measured, pictured and saved."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...checks import check_int
from ...data import LabelledImages
from ...diffusion import num_classes, pretrained_sampler, register_classes
from ...hashing import weights_hash
from ...metrics import Judge
from ...models import resolve, save_result
from ...parallel import World
from ...report import save_before_after, save_grid
from ...run_records import read_evaluations
from ...training.checkpoints import Checkpoints
from ...training.loop import Progress
from ...unlearning import ForgetRequest, Method, Problem, Setting, method_class
from ..arguments import ComputeArguments, DataArguments, UnlearnArguments, option_groups, with_options
from ..distilled import AUTO, initial_paths
from ..presets import class_preset, method_loop, method_options
from ..remembered import record_of
from ..task import SAME, Task
from .data import check_images, check_judge, dataset_of, find_judge, lacks_files, load_images
from .measure import RunEvaluation, summary
from .names import RANDOM, cover_of, labels_of, listed, names_in_network, proper_names, published_names

# Images of each class in the pictures of samples.
PICTURED = 10
# Other classes in the pictures of a run without a judge.
UNJUDGED = 6


@dataclass(frozen=True)
class ClassModelArguments:
    """Which network a run is on, and how the result is measured."""

    pretrained_model_name_or_path: str | None = None
    """The pretrained network: a diffusers folder, the folder of a pretraining run, a name on the Hugging Face hub, or a
    checkpoint of the public code of SFD, SalUn or Selective Amnesia (ckpt.pth). Default: the preset's."""
    checkpoint_state: Literal["auto", "ema", "model", "score"] = "auto"
    """Weights to read from such a checkpoint: averaged, live, or SFD's score network. auto: averaged if there are any.
    """
    judge: str | None = None
    """File of the classifier that evaluates. Default: that of the pretraining, otherwise the preset's."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of their labels. Default: those saved with the network, or the judge's."""
    samples_per_class: int = 100
    """Images of each class in an evaluation."""
    evaluate: bool = True
    """Measure the result, if there are a judge and real images."""


@dataclass(frozen=True)
class ClassRequestArguments(ClassModelArguments):
    """Which classes to forget, of which network, and how the result is measured."""

    forget_classes: tuple[str, ...] = ("0",)
    """Classes to forget, by number or name."""
    cover_class: str = "1"
    """Class to draw in their place, by number or name, or "random"."""
    distilled: str | None = None
    """Start from the networks in a folder of pecker-fast distil; auto: from those of the preset or beside the network,
    which are made if there are none. Default: auto if the method needs them."""
    initial_generator: str | None = None
    """One-step generator to start from; the pretrained network remains the teacher. Folder of a run (one that has
    forgotten something before, or was only distilled) or of its unet."""
    initial_score: str | None = None
    """Score network to start from, given in the same way."""
    forget_data: str | None = None
    """Folder of real images of the classes to forget, a subfolder for each class: for saliency_samples=data, and for
    salun in place of the training images."""


class ClassTask(Task):
    """Classes of a class-conditional network are forgotten."""

    same = (*SAME, "forget_classes", "cover_class", "samples_per_class", "judge", "checkpoint_state", "dataset_name")

    @staticmethod
    def defaults(preset_name: str, method: str) -> UnlearnArguments:
        values, kind = class_preset(preset_name), method_class(method)
        request = ClassRequestArguments(
            forget_classes=() if values.forget_class is None else (str(values.forget_class),),
            cover_class=RANDOM if values.cover_class is None else str(values.cover_class),
            samples_per_class=values.samples_per_class,
        )
        options, loop = method_options(preset_name, kind), method_loop(preset_name, kind)
        return UnlearnArguments(preset_name, method, options, request, DataArguments(), loop=loop)

    @staticmethod
    def describe(args: UnlearnArguments) -> dict[str, Any]:
        return {
            "method": args.method,
            "preset": args.preset,
            **dataclasses.asdict(args.request),
            "forget_classes": labels_of(args.request.forget_classes, args.request.class_names),
            "cover_class": cover_of(args.request.cover_class, args.request.class_names),
            "output_dir": str(args.folder),
            **args.output.describe(),
            **dataclasses.asdict(args.compute.resolved()),
            **dataclasses.asdict(args.resources),
            **dataclasses.asdict(args.loop),
            "options": dataclasses.asdict(args.options),
        }

    @staticmethod
    def settled(args: UnlearnArguments) -> UnlearnArguments:
        request, data = args.request, args.resources
        path = request.pretrained_model_name_or_path
        if path is None and request.distilled not in (None, AUTO):
            path = record_of(request.distilled).get("pretrained_model_name_or_path")
        record = record_of(path)
        judge = request.judge or record.get("judge")
        names = request.class_names or names_in_network(path) or record.get("class_names", ())
        if not names and judge is not None:
            names = Judge.names_in(judge)
        names = proper_names(names or published_names(args.preset, path))
        changes: dict[str, Any] = {"pretrained_model_name_or_path": path, "judge": judge, "class_names": names}
        if data.dataset_name is None:
            changes["dataset_name"] = record.get("dataset_name")
            changes["data_root"] = data.data_root or record.get("data_root")
        if "forget_classes" in option_groups(args):
            if not request.forget_classes:
                expected = f"some of {listed(names)}" if names else "at least one class"
                raise ValueError(f"forget_classes is empty, expected {expected}")
            changes["forget_classes"] = labels_of(request.forget_classes, names)
            cover = cover_of(request.cover_class, names)
            changes["cover_class"] = RANDOM if cover is None else cover
        return with_options(args, changes)

    @staticmethod
    def check(args: UnlearnArguments) -> None:
        args.options.check()
        args.loop.check()
        args.output.check()
        _check_own(args)

    @classmethod
    def rehearse(cls, args: UnlearnArguments, compute: ComputeArguments) -> list[str]:
        values, notes, request = class_preset(args.preset), [], args.request
        method, lack = method_class(args.method), lacks_files(args.resources, args.preset)
        network: nn.Module | None = None
        if request.pretrained_model_name_or_path is None and values.network is None:
            if values.dataset is not None:
                cls._check_request(args, values.unet.num_classes)
            notes.append(
                f"a run also needs pretrained_model_name_or_path: the preset {args.preset} comes without a network"
            )
        elif lack is not None and method.needs_data(args.options):
            network = resolve(request.pretrained_model_name_or_path, shipped=values.network).network
            cls._check_request(args, num_classes(network))
            return [lack]
        else:
            task = cls(args, compute, World())
            method(task.setting, args.options)
            network = task.setting.problem.teacher
            task._check_checkpoint()
        judge = find_judge(args.preset, request.judge) if request.evaluate else None
        if judge is not None and lack is not None:
            notes.append(lack)
        elif judge is not None and network is not None:
            size, channels = network.config["sample_size"], network.config["in_channels"]
            images = load_images(args.resources, args.preset, values.reference_split, size, channels)
            cls._check_reference(args, images, network, judge)
        return notes

    def _check_checkpoint(self) -> None:
        """Check that there is a checkpoint of this run to resume from, if it is to be resumed."""
        resume, folder = self.args.loop.resume_from_checkpoint, self.args.folder / "checkpoints"
        checkpoints = Checkpoints(folder, self.args.loop.checkpoints_total_limit, self.fingerprint())
        if resume is not None and not (resume == "latest" and not checkpoints.steps()):
            checkpoints.load(resume)

    @classmethod
    def _check_request(cls, args: UnlearnArguments, classes: int) -> None:
        """Check what to forget of a network with so many classes."""
        request = args.request
        names = request.class_names
        ForgetRequest(classes, labels_of(request.forget_classes, names), cover_of(request.cover_class, names))

    @staticmethod
    def _check_reference(args: UnlearnArguments, images: LabelledImages, network: nn.Module, judge: Judge) -> None:
        """Check that real images, the network and the judge fit each other."""
        name = dataset_of(args.resources, args.preset)
        check_images(images, name, network)
        check_judge(judge, args.request.judge, images, name)

    @staticmethod
    def estimate(args: UnlearnArguments) -> str | None:
        return None

    def __init__(self, args: UnlearnArguments, compute: ComputeArguments, world: World) -> None:
        self.args, request = args, args.request
        _check_own(args)
        model = resolve(
            request.pretrained_model_name_or_path,
            shipped=class_preset(args.preset).network,
            state=request.checkpoint_state,
        )
        network, self.source = model.network, model.source
        forget = self._request(network)
        self.hashes = {"pretrained_sha256": weights_hash(network)}
        paths, distilled = initial_paths(request)
        if distilled is not None:
            distilled.check_base(self.hashes["pretrained_sha256"])
        models = {name: resolve(path, name=name) for name, path in paths.items()}
        for name, other in models.items():
            if not other.schedule.agrees(model.schedule):
                raise ValueError(
                    f"{name} is {paths[name]!r}, whose scheduler ({other.schedule.title}) has other noise levels or "
                    f"predictions than that of the pretrained network ({model.schedule.title}): expected the same"
                )
        initial = {name: other.network for name, other in models.items()}
        self.hashes |= {f"{name}_sha256": weights_hash(x) for name, x in initial.items()}
        problem = Problem(
            network,
            model.schedule,
            forget,
            training_images=self._training_images(network, world),
            **initial,
            **self._forget_images(forget, network),
        )
        self._name_classes(problem)
        self.setting = Setting(problem, compute.as_compute(world))
        self.evaluation: RunEvaluation | None = None
        self.before: Tensor | None = None

    def _request(self, network: nn.Module) -> ForgetRequest:
        request = self.args.request
        names = request.class_names
        return ForgetRequest.of(network, labels_of(request.forget_classes, names), cover_of(request.cover_class, names))

    def _name_classes(self, problem: Problem) -> None:
        """Give the networks the names of their classes, so that they are saved with the result."""
        names, count = self.args.request.class_names, problem.request.num_classes
        if names and len(names) != count:
            raise ValueError(f"class_names is {listed(names)}, {len(names)} names, but the network has {count} classes")
        for network in (problem.teacher, problem.initial_generator, problem.initial_score):
            if names and network is not None:
                register_classes(network, count, names)

    def _training_images(self, network: nn.Module, world: World) -> LabelledImages | None:
        """The images that the network was trained on; None if the method needs none."""
        if not method_class(self.args.method).needs_data(self.args.options):
            return None
        # One process downloads what is missing.
        world.on_main(lambda: self._images("train", network))
        images = self._images("train", network)
        check_images(images, dataset_of(self.args.resources, self.args.preset), network)
        return images

    def _images(self, split: str, network: nn.Module) -> LabelledImages:
        size, channels = network.config["sample_size"], network.config["in_channels"]
        return load_images(self.args.resources, self.args.preset, split, size, channels)

    def _forget_images(self, request: ForgetRequest, network: nn.Module) -> dict[str, Tensor]:
        path, names = self.args.request.forget_data, self.args.request.class_names
        if path is None:
            return {}
        data, size = DataArguments(f"folder:{path}"), network.config["sample_size"]
        images = load_images(data, self.args.preset, "all", size, network.config["in_channels"])
        known = names or tuple(map(str, range(request.num_classes)))
        if set(images.class_names) <= set(known):
            # Folders of some classes only: their places among each other are no labels.
            labels = torch.tensor([known.index(name) for name in images.class_names])[images.labels]
            images = LabelledImages(images.images, labels, known)
        elif names and images.num_classes != request.num_classes:
            raise ValueError(
                f"forget_data {path} has the class folders {listed(images.class_names)}, expected some of "
                f"{listed(names)}"
            )
        images = images.of_classes(request.forget_classes)
        if len(images) == 0:
            raise ValueError(f"forget_data {path} has no images of the classes {list(request.forget_classes)}")
        return {"forget_images": images.tensor(), "forget_labels": images.labels}

    def fingerprint(self) -> dict[str, Any]:
        request, images = self.setting.problem.request, self.setting.problem.training_images
        return {
            "method": self.args.method,
            "options": dataclasses.asdict(self.args.options),
            **self.hashes,
            **({} if images is None else {"training_images": len(images)}),
            "forget_classes": list(request.forget_classes),
            "cover_class": request.cover_class,
            "seed": self.setting.compute.seed,
            "mixed_precision": self.setting.compute.mixed_precision,
        }

    def config(self) -> dict[str, Any]:
        return {"training_images": len(self.setting.problem.training_images or ())}

    def prepare(self, method: Method) -> None:
        args, values = self.args, class_preset(self.args.preset)
        self.method = method
        if not args.request.evaluate:
            return
        judge = find_judge(args.preset, args.request.judge)
        if judge is None:
            print(
                f"pecker-fast: no evaluation: the preset {args.preset} comes without a judge (--judge)", file=sys.stderr
            )
            return
        split, teacher = values.reference_split, self.setting.problem.teacher
        name = dataset_of(args.resources, args.preset)
        dataset = self._images(split, teacher)
        self._check_reference(args, dataset, teacher, judge)
        reference = {"dataset": name, "split": split}
        self.evaluation = RunEvaluation(self.setting, method, dataset, judge, args.request.samples_per_class, reference)

    def draw_before(self, before: Tensor | None) -> Tensor | None:
        self.before = before
        if self.evaluation is not None and before is None:
            self.before = self.evaluation.teacher_samples()
        return self.before

    @property
    def evaluates(self) -> bool:
        return self.evaluation is not None

    def evaluate(self, network: nn.Module, step: int) -> dict[str, Any] | None:
        return self.evaluation(network)

    def export(self, network: nn.Module, folder: Path) -> None:
        save_result(folder, network, self.setting.problem.schedule, self.method.sampler)

    def start(self) -> nn.Module:
        return self.setting.problem.initial_generator or self.setting.problem.teacher

    def finish(self, network: nn.Module, progress: Progress) -> dict[str, Any]:
        folder, evaluation = self.args.folder, self.evaluation
        self.export(network, folder)
        if evaluation is None:
            if self.args.request.evaluate:
                self._picture_unjudged(network)
            return {}
        start = time.perf_counter()
        # They end up on the CPU, so the time includes all work of the device.
        after = evaluation.samples(network)
        seconds = (time.perf_counter() - start) / len(after)
        records = read_evaluations(folder)
        self._picture(after)
        return {
            "seconds_per_image": seconds,
            **self._measured(records, after, progress),
            **evaluation.real_split,
            **evaluation.before(self.before),
            **evaluation.result(self.before, after),
            "protocol": evaluation.protocol(),
        }

    def _picture_unjudged(self, network: nn.Module) -> None:
        """Draw pictures of a run without a judge: the forgotten classes, their cover and a few others."""
        problem, compute = self.setting.problem, self.setting.compute
        request = problem.request
        cover = [] if request.cover_class is None else [request.cover_class]
        others = [c for c in range(request.num_classes) if c not in (*request.forget_classes, *cover)]
        classes = [*request.forget_classes, *cover, *others[:UNJUDGED]]
        labels = torch.tensor(classes).repeat_interleave(PICTURED)
        names = self.args.request.class_names or [f"class {label}" for label in range(request.num_classes)]
        teacher = problem.teacher
        samplers = (pretrained_sampler(problem.schedule, teacher), teacher), (self.method.sampler, network)
        with compute.autocast():
            before, after = (s.draw(x, problem.schedule, labels, compute.seed).float().cpu() for s, x in samplers)
        picture = self.args.folder / "samples" / "before_after.png"
        # A row for each class that is shown.
        rows = torch.arange(len(classes)).repeat_interleave(PICTURED)
        shown = [names[c] for c in classes]
        save_before_after(picture, before, after, rows, shown, highlight=range(len(request.forget_classes)))

    def _measured(self, records: list[dict[str, Any]], after: Tensor, progress: Progress) -> dict[str, Any]:
        """The figures of the result: those of the last of the run's evaluations, ``records``."""
        return summary(records, progress.step)

    def _picture(self, after: Tensor) -> None:
        request, evaluation = self.setting.problem.request, self.evaluation
        per_class = len(evaluation.labels) // request.num_classes
        shown = (torch.arange(len(evaluation.labels)) % per_class) < PICTURED
        labels, names, samples = evaluation.labels[shown], evaluation.judge.class_names, self.args.folder / "samples"
        for name, images in (("before", self.before), ("after", after)):
            save_grid(samples / f"{name}.png", images[shown], labels, names, highlight=request.forget_classes)
        picture = samples / "before_after.png"
        save_before_after(picture, self.before[shown], after[shown], labels, names, highlight=request.forget_classes)


def _check_own(args: UnlearnArguments) -> None:
    """Check what needs no network. ValueError if samples_per_class is below 1, or forget_data is of no use."""
    check_int("samples_per_class", args.request.samples_per_class, 1)
    path = args.request.forget_data
    if path is not None and not method_class(args.method).reads_forget_images(args.options):
        usable = "--saliency_samples data" if hasattr(args.options, "saliency_samples") else "--method salun"
        raise ValueError(
            f"forget_data is {path!r}, but {args.method} does not use it here: expected {usable}, or no forget_data"
        )
