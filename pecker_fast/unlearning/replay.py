"""Images that the teacher draws of every class, for methods without training data; and phases before the training,
which leave the network unchanged."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS, Sampler, null_label
from ..saliency import SaliencyAccumulator
from .many_step import SamplerName, check_guidance
from .protocol import Phase
from .setting import Setting
from .streams import derived_seed


@dataclass(frozen=True)
class ReplayOptions:
    """How the teacher draws images to train on. The defaults are those of Selective Amnesia."""

    replay_images_per_class: int = 500
    """Images of each class that the teacher draws, once, to train on."""
    replay_sampler: SamplerName = "ddpm"
    """Sampler of these images."""
    replay_steps: int = NUM_TRAIN_TIMESTEPS
    """Steps of this sampler."""
    replay_guidance_scale: float = 3.0
    """Guidance of this sampler; 1 is none."""
    replay_batch_size: int = 250
    """Images that are drawn at a time."""

    def check_replay(self, num_train_timesteps: int) -> None:
        """Check these options. ValueError or TypeError, naming the option, if one is out of range."""
        check_int("replay_images_per_class", self.replay_images_per_class, 1)
        check_int("replay_steps", self.replay_steps, 1, num_train_timesteps + 1)
        check_number("replay_guidance_scale", self.replay_guidance_scale)
        check_int("replay_batch_size", self.replay_batch_size, 1)


class Pool:
    """``Images`` in memory; they may be yet to be drawn.

    Parameters
    ----------
    labels : Tensor
        Shape (N,), int64, on the CPU.
    images : Tensor
        Shape (N, C, H, W), float32, on the CPU.
    teacher_labels : Tensor, optional
        Shape (N,), int64, on the CPU. Labels that the teacher draws the images of; ``labels`` by default.
    """

    def __init__(self, labels: Tensor, images: Tensor, teacher_labels: Tensor | None = None) -> None:
        self.labels, self.images = labels, images
        self.teacher_labels = labels if teacher_labels is None else teacher_labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Tensor:
        """The images at ``indices``."""
        return self.images[indices]

    @classmethod
    def of(cls, setting: Setting, options: ReplayOptions) -> "Pool":
        """An empty pool for as many images of each class as the options say; classes take turns."""
        labels = torch.arange(setting.problem.request.num_classes).repeat(options.replay_images_per_class)
        return cls(labels, torch.zeros(len(labels), *setting.problem.sample_shape))

    def load(self, images: Tensor) -> None:
        """Fill the pool from a state. ValueError if the state has another shape."""
        if images.shape != self.images.shape:
            raise ValueError(f"the state has images {tuple(images.shape)}, expected {tuple(self.images.shape)}")
        self.images.copy_(images)


class Preparation(Phase):
    """A phase that computes something of the network before it is trained.

    Parameters
    ----------
    setting : Setting
        Of the method.
    network : nn.Module
        Left unchanged.
    pool : Pool, optional
        The teacher's images if the method has any; saved with the state.
    """

    is_preparation = True

    def __init__(self, setting: Setting, network: nn.Module, pool: Pool | None) -> None:
        self.setting, self.network, self.pool = setting, network, pool

    def start(self, previous: Phase | None) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def results(self) -> Iterable[Tensor]:
        """The results so far."""

    def trained_parameters(self) -> Iterable[Tensor]:
        # They have to be finite for the run to continue.
        return self.results()

    def state_dict(self) -> dict[str, Any]:
        return {"pool": None if self.pool is None else self.pool.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.pool is not None:
            self.pool.load(state["pool"])

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        self.network.eval()
        yield self.network


class Drawing(Preparation):
    """The teacher fills a pool, one batch an iteration. Every process draws all of it.

    Parameters
    ----------
    setting : Setting
        Of the method.
    options : ReplayOptions and SamplingOptions
        How images are drawn.
    pool : Pool
        Filled in place.
    network : nn.Module
        Of the method.
    """

    name = "replay"

    def __init__(self, setting: Setting, options: Any, pool: Pool, network: nn.Module) -> None:
        super().__init__(setting, network, pool)
        check_guidance(setting.problem.teacher, "replay_guidance_scale", options.replay_guidance_scale)
        self.options = options
        self.sampler = Sampler(
            options.replay_sampler,
            num_inference_steps=options.replay_steps,
            guidance_scale=options.replay_guidance_scale,
            clip_sample=options.clip_sample,
            batch_size=options.replay_batch_size,
        )
        self.iterations = -(-len(pool) // options.replay_batch_size)
        self.images_per_iteration = min(len(pool), options.replay_batch_size)

    def step(self, iteration: int) -> dict[str, Tensor]:
        problem, compute, count = self.setting.problem, self.setting.compute, self.options.replay_batch_size
        rows = slice(iteration * count, (iteration + 1) * count)
        seed = derived_seed(compute.seed, self.name, iteration)
        with compute.regions("sampling"), compute.autocast():
            images = self.sampler.draw(problem.teacher, problem.schedule, self.pool.teacher_labels[rows], seed)
        # The same bits on every process.
        compute.world.average_([images])
        self.pool.images[rows] = images.cpu()
        return {}

    def results(self) -> Iterable[Tensor]:
        return [self.pool.images]


class Accumulation(Preparation):
    """A phase that sums gradients of the network in ``accumulator``.

    Parameters
    ----------
    setting, network, pool
        As of ``Preparation``.
    reduce : {"sum", "sq_sum"}
        As of ``SaliencyAccumulator``.
    """

    def __init__(self, setting: Setting, network: nn.Module, pool: Pool | None, reduce: str) -> None:
        super().__init__(setting, network, pool)
        self.null = null_label(network)
        self.accumulator = SaliencyAccumulator(network, reduce)

    def start(self, previous: Phase | None) -> None:
        self.accumulator.reset()

    def results(self) -> Iterable[Tensor]:
        return self.accumulator.scores.values()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scores": self.accumulator.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        load_scores(self.accumulator.scores, state["scores"])


def load_scores(scores: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Fill ``scores`` from a state, in place. ValueError if the state is another network's."""
    if {name: score.shape for name, score in state.items()} != {name: score.shape for name, score in scores.items()}:
        raise ValueError("the state is of another network: its scores have other names or shapes")
    for name, score in state.items():
        scores[name].copy_(score)
