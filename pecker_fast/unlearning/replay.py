"""Images that the teacher draws of every class, for methods that do without the training set; and what precedes
training: phases that leave the network as it is."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_number
from ..diffusion import Sampler, null_label
from ..saliency import SaliencyAccumulator
from .many_step import SAMPLERS, check_guidance
from .protocol import Phase
from .setting import Setting
from .streams import derived_seed


@dataclass(frozen=True)
class ReplayOptions:
    """How the teacher draws images to train on. The defaults are those of Selective Amnesia."""

    replay_images_per_class: int = 500
    """Images of each class that the teacher draws, once, to train on."""
    replay_sampler: Literal["ddpm", "ddim"] = "ddpm"
    """How it draws them."""
    replay_steps: int = 1000
    """In how many steps."""
    replay_guidance_scale: float = 3.0
    """With what guidance; 1 is none."""
    replay_batch_size: int = 250
    """So many at a time."""

    def check_replay(self, num_train_timesteps: int) -> None:
        """Raises ValueError or TypeError, naming the option, where one is out of range."""
        check_int("replay_images_per_class", self.replay_images_per_class, 1)
        check_choice("replay_sampler", self.replay_sampler, SAMPLERS)
        check_int("replay_steps", self.replay_steps, 1, num_train_timesteps + 1)
        check_number("replay_guidance_scale", self.replay_guidance_scale)
        check_int("replay_batch_size", self.replay_batch_size, 1)


class Preparation(Phase):
    """A phase that computes something on the network before it is trained.

    Parameters
    ----------
    setting: of the method.
    network: left as it is.
    pool: what the teacher draws, where the method has that; kept with the state.
    """

    is_preparation = True

    def __init__(self, setting: Setting, network: nn.Module, pool: "Pool | None") -> None:
        self.setting, self.network, self.pool = setting, network, pool

    def start(self, previous: Phase | None) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def results(self) -> Iterable[Tensor]:
        """What has been computed so far."""

    def trained_parameters(self) -> Iterable[Tensor]:
        # What has to be finite for the run to go on.
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


class Pool:
    """``Images`` in memory, such as those that are yet to be drawn.

    Parameters
    ----------
    labels: int64 (N,), on the CPU.
    images: float32 (N, C, H, W), on the CPU.
    asked: int64 (N,), on the CPU: what the teacher is asked about when it draws them; the labels by default.
    """

    def __init__(self, labels: Tensor, images: Tensor, asked: Tensor | None = None) -> None:
        self.labels, self.images = labels, images
        self.asked = labels if asked is None else asked

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    @classmethod
    def of(cls, setting: Setting, options: ReplayOptions) -> "Pool":
        """Room for as many images of each class as the options say; classes take turns."""
        labels = torch.arange(setting.request.num_classes).repeat(options.replay_images_per_class)
        return cls(labels, torch.zeros(len(labels), *setting.sample_shape))

    def load(self, images: Tensor) -> None:
        """Fills it from a state. ValueError where that is of another shape."""
        if images.shape != self.images.shape:
            raise ValueError(f"the state has images {tuple(images.shape)}, expected {tuple(self.images.shape)}")
        self.images.copy_(images)


class Drawing(Preparation):
    """The teacher fills a pool, a batch an iteration. Every process draws all of it.

    Parameters
    ----------
    setting: of the method.
    options: how images are drawn; ``clip_sample`` is that of SamplingOptions.
    pool: filled in place.
    network: of the method.
    """

    name = "replay"

    def __init__(self, setting: Setting, options: Any, pool: Pool, network: nn.Module) -> None:
        super().__init__(setting, network, pool)
        check_guidance(setting.teacher, "replay_guidance_scale", options.replay_guidance_scale)
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
        o, setting = self.options, self.setting
        rows = slice(iteration * o.replay_batch_size, (iteration + 1) * o.replay_batch_size)
        with setting.regions("sampling"), setting.autocast():
            seed = derived_seed(setting.seed, self.name, iteration)
            images = self.sampler.draw(setting.teacher, setting.schedule, self.pool.asked[rows], seed)
        # The same bits everywhere.
        setting.world.average_([images])
        self.pool.images[rows] = images.cpu()
        return {}

    def results(self) -> Iterable[Tensor]:
        return [self.pool.images]


class Accumulation(Preparation):
    """A phase that sums gradients of the network; they end up in ``accumulator``.

    Parameters
    ----------
    setting, network, pool: as of Preparation.
    reduce: "sum" or "sq_sum", as SaliencyAccumulator has it.
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


def load_scores(scores: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Fills ``scores`` from a state. ValueError where that is of another network."""
    if {name: score.shape for name, score in given.items()} != {name: score.shape for name, score in scores.items()}:
        raise ValueError("the state is of another network: its scores have other names or shapes")
    for name, score in given.items():
        scores[name].copy_(score)
