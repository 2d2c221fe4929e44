"""Where the forget gradient may go: the salient entries of the generator (PECKER, Eq. 8-10)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_int, check_literals, check_number
from ..diffusion import OneStepGenerator, predict, prediction_loss, pretrained_sampler
from ..mask import SaliencyMask
from ..saliency import saliency_mask
from ..sharding import is_sharded, like, part_of
from .gradients import add_gradients
from .setting import Setting
from .streams import Streams, derived_seed


@dataclass(frozen=True)
class SaliencyOptions:
    """How salient entries are found."""

    density: float | None = 0.5
    """Share of all parameters that the forget gradient may reach, in (0, 1]."""
    threshold: float | None = None
    """Instead of a density: the least magnitude of a salient gradient (sum over dimensions, mean over samples)."""
    mask_refresh_steps: int = 10
    """Iterations between masks; 0: one mask for the whole run."""
    saliency_network: Literal["current", "initial"] = "current"
    """Network whose gradient is taken: the current generator, or the pretrained weights."""
    saliency_samples: Literal["initial", "current", "teacher", "data"] = "initial"
    """Samples of forgotten classes on which it is taken: drawn once by the starting generator, anew by the current one,
    once by the teacher with DDIM, or real images (forget_data)."""
    saliency_batch_size: int = 128
    """Samples in a batch of the saliency gradient."""
    saliency_batches: int = 1
    """Batches whose gradients are averaged before magnitudes are taken."""
    saliency_score: Literal["gradient", "magnitude", "random"] = "gradient"
    """What is ranked: magnitudes of that gradient; for comparison, of the parameters themselves, or random numbers,
    new ones for every mask."""

    def check_saliency(self) -> None:
        """Check these options. ValueError or TypeError, naming the option, if one is out of range."""
        check_literals(self)
        if (self.density is None) == (self.threshold is None):
            raise ValueError(f"density is {self.density}, threshold {self.threshold}; expected exactly one, not None")
        if self.density is not None:
            check_number("density", self.density, high=1.0, open_low=True)
        else:
            check_number("threshold", self.threshold)
        check_int("mask_refresh_steps", self.mask_refresh_steps, 0)
        check_int("saliency_batch_size", self.saliency_batch_size, 1)
        check_int("saliency_batches", self.saliency_batches, 1)
        if self.saliency_score == "random" and self.density is None:
            raise ValueError('saliency_score is "random", which needs a density: random numbers have no threshold')


def module_of(name: str) -> str:
    """The part of a U-Net that a parameter belongs to: "down_blocks.0", "mid_block", "conv_in"..."""
    parts = name.split(".")
    return ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])


def density_by_module(mask: SaliencyMask) -> dict[str, float]:
    """Share of salient entries in each part of the network, in the order of the parameters. Waits for the device."""
    return _shares(mask.names, mask.tensor_counts(), mask.numels)


def _shares(names: Sequence[str], counts: Sequence[int], numels: Sequence[int]) -> dict[str, float]:
    """``density_by_module`` from each parameter's number of salient entries and of all entries."""
    salient: dict[str, int] = {}
    numel: dict[str, int] = {}
    for name, count, entries in zip(names, counts, numels, strict=True):
        part = module_of(name)
        salient[part] = salient.get(part, 0) + count
        numel[part] = numel.get(part, 0) + entries
    return {part: salient[part] / max(1, numel[part]) for part in salient}


def random_scores(streams: Streams, network: nn.Module) -> dict[str, Tensor]:
    """A random number in (0, 1] for each entry of the network's parameters: a zero would never be salient."""
    return {
        name: 1 - torch.rand(param.shape, generator=streams.generator(f"random {name}"), device=param.device)
        for name, param in network.named_parameters()
    }


def mask_state(mask: SaliencyMask) -> dict[str, Any]:
    """What a checkpoint has of a mask. Waits for the device."""
    return {"words": mask.words, "threshold": mask.threshold, "nan_count": mask.nan_count}


def mask_from_state(state: dict[str, Any] | Tensor, network: nn.Module, device: torch.device) -> SaliencyMask:
    """The mask over ``network``'s parameters that ``mask_state`` described; older checkpoints have its words alone."""
    state = {"words": state} if isinstance(state, Tensor) else state
    names, params = zip(*network.named_parameters(), strict=True)
    threshold = state.get("threshold")
    return SaliencyMask(
        state["words"].to(device),
        [param.shape for param in params],
        names,
        threshold=None if threshold is None else torch.tensor(threshold, device=device),
        nan_count=torch.tensor(state.get("nan_count", 0), device=device),
    )


class BaseMasker(ABC):
    """The masks of a run: computes one when it is due, and keeps what the log reports of it.

    Parameters
    ----------
    setting : Setting
        Of the run.
    density, threshold : float or None
        Share of all entries that a mask has, or the least score of its entries: exactly one of the two.
    refresh_steps : int
        Iterations between masks; 0: one mask for the whole run.

    Attributes
    ----------
    mask : SaliencyMask or None
        The current mask.
    share : float
        Share of all entries that a mask has at most.
    """

    # Masks that are kept: the current one, the previous one, and the union of all.
    MASKS = 3

    def __init__(
        self, setting: Setting, *, density: float | None, threshold: float | None = None, refresh_steps: int = 0
    ) -> None:
        self.problem, self.compute = setting.problem, setting.compute
        self.density, self.threshold, self.refresh_steps = density, threshold, refresh_steps
        self.share = 1.0 if density is None else density
        self.mask: SaliencyMask | None = None
        self._sharded = setting.placement.fsdp
        self._previous: SaliencyMask | None = None
        self._ever: SaliencyMask | None = None

    def start(self, generator: nn.Module) -> None:
        """Drop earlier masks; ``generator`` is the generator as it is when the phase starts."""
        self.mask = self._previous = self._ever = None

    @abstractmethod
    def ranking(self, streams: Streams, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a mask ranks.

        Parameters
        ----------
        streams : Streams
            Random numbers of this mask.
        network : nn.Module
            The network whose entries are ranked. Is not changed.

        Returns
        -------
        scores : dict of str to Tensor
            A score for each entry, by parameter name.
        options : dict
            Further arguments of ``saliency_mask``: what the scores are relative to.
        """

    def rehearse(self, streams: Streams, network: nn.Module) -> None:
        """Take as much memory as a new mask does, for an estimate of memory: what comes before its selection."""
        self.ranking(streams, network)

    def is_due(self, iteration: int) -> bool:
        """Whether a new mask is due before the generator's step of this iteration."""
        every = self.refresh_steps
        return self.mask is None or (every > 0 and iteration % every == 0)

    def refresh(self, iteration: int, network: nn.Module) -> None:
        """Compute a new mask of the network if it is due, without waiting for the device. Leaves no gradient behind."""
        if not self.is_due(iteration):
            return
        streams = Streams(self.compute.device, self.compute.seed, "saliency", iteration)
        mask = self.select(streams, network)
        with self.compute.regions("selection"):
            self._previous, self.mask = self.mask, mask
            self._ever = self.mask if self._ever is None else self._ever | self.mask

    def select(self, streams: Streams, network: nn.Module) -> SaliencyMask:
        """Compute a mask of the network; arguments as of ``ranking``."""
        with self.compute.regions("saliency"):
            scores, options = self.ranking(streams, network)
        with self.compute.regions("selection"):
            limit = {"threshold": self.threshold} if self.density is None else {"density": self.density}
            return saliency_mask(self._shared_out(scores, network), **limit, **options)

    def _shared_out(self, scores: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """``scores`` sharded as the network's parameters are; every process may have all of them."""
        if not self._sharded:
            return scores
        return {
            name: scores[name] if is_sharded(scores[name]) else like(part_of(scores[name], param), param)
            for name, param in network.named_parameters()
        }

    def describe(self) -> dict[str, Any]:
        """The mask's entries of a line of the log. Waits for the device."""
        if self.mask is None:
            return {}
        mask = self.mask
        before = mask if self._previous is None else self._previous
        counts = [mask.nan_count, self._ever.count, (mask & before).count, (mask | before).count]
        counts += [*mask.tensor_counts(), *mask.numels]
        if self._sharded:
            # Over all processes, each of which counts its own part.
            counts = self.compute.world.totals(counts)
        (nans, ever, both, either), by_tensor = counts[:4], counts[4:]
        salient, numels = by_tensor[: len(mask)], by_tensor[len(mask) :]
        return {
            "mask_density": sum(salient) / sum(numels),
            "mask_iou": None if self._previous is None else (both / either if either else 1.0),
            "mask_touched_ever": ever / sum(numels),
            "mask_nan_count": nans,
            "mask_density_by_module": _shares(mask.names, salient, numels),
        }

    def whole_mask(self, network: nn.Module) -> SaliencyMask | None:
        """The current mask over all entries of the network."""
        return self._whole(self.mask, network)

    def _whole(self, mask: SaliencyMask | None, network: nn.Module) -> SaliencyMask | None:
        if mask is None or not self._sharded:
            return mask
        return mask.whole(list(network.parameters()))

    def state_dict(self, network: nn.Module) -> dict[str, Any]:
        """State to resume from, with masks over all entries of the network."""
        masks = {"mask": self.mask, "previous": self._previous, "ever": self._ever}
        whole = {name: self._whole(mask, network) for name, mask in masks.items()}
        return {name: None if mask is None else mask_state(mask) for name, mask in whole.items()}

    def load_state_dict(self, state: dict[str, Any], network: nn.Module) -> None:
        """Resume from a state; ``network`` is the network whose parameters the masks cover."""

        def load(name: str) -> SaliencyMask | None:
            if state[name] is None:
                return None
            mask = mask_from_state(state[name], network, self.compute.device)
            return mask.part(list(network.parameters())) if self._sharded else mask

        self.mask, self._previous, self._ever = load("mask"), load("previous"), load("ever")


class Masker(BaseMasker):
    """The masks of PECKER: the entries with the largest noise-prediction gradient on what is to be forgotten.

    Parameters
    ----------
    setting : Setting
        Of the run.
    options : SaliencyOptions
        How saliency is taken.
    t_init : int
        Timestep of the generator that draws the samples.

    Raises
    ------
    ValueError
        If the options do not fit the setting.
    """

    def __init__(self, setting: Setting, options: SaliencyOptions, t_init: int) -> None:
        options.check_saliency()
        if options.saliency_samples == "data" and setting.problem.forget_images is None:
            raise ValueError('saliency_samples is "data", but there are no images of what is to be forgotten')
        setting.compute.world.check_shares("saliency_batch_size", options.saliency_batch_size)
        limits = {"density": options.density, "threshold": options.threshold}
        super().__init__(setting, **limits, refresh_steps=options.mask_refresh_steps)
        self.options = options
        self.one_step = OneStepGenerator(setting.problem.schedule, t_init)
        self._pool: tuple[Tensor, Tensor] | None = None
        self._forgotten = setting.problem.request.conditions(setting.compute.device).forgotten

    @property
    def samples(self) -> int:
        """Samples that one mask is taken on."""
        return self.options.saliency_batch_size * self.options.saliency_batches

    def start(self, generator: nn.Module) -> None:
        """Drop earlier masks, and draw the samples that are drawn once from the generator as it is."""
        super().start(generator)
        self._pool = None
        if self.options.saliency_score != "gradient":
            return
        streams = Streams(self.compute.device, self.compute.seed, "saliency pool")
        if self.options.saliency_samples == "initial":
            self._pool = self._draw(streams, generator)
        elif self.options.saliency_samples == "teacher":
            labels = streams.choose("labels", self.samples, self._forgotten)
            seed = derived_seed(self.compute.seed, "saliency teacher")
            with self.compute.autocast():
                sampler = pretrained_sampler(self.problem.schedule, self.problem.teacher)
                images = sampler.draw(self.problem.teacher, self.problem.schedule, labels, seed)
            self._pool = images, labels

    @torch.no_grad()
    def _draw(self, streams: Streams, generator: nn.Module) -> tuple[Tensor, Tensor]:
        labels = streams.choose("labels", self.samples, self._forgotten)
        z = streams.normal("z", self.samples, self.problem.sample_shape)
        generator.eval()
        with self.compute.autocast():
            batch = self.options.saliency_batch_size
            images = [self.one_step(generator, *part) for part in zip(z.split(batch), labels.split(batch), strict=True)]
        return torch.cat(images), labels

    def _samples(self, streams: Streams, generator: nn.Module) -> tuple[Tensor, Tensor]:
        if self._pool is not None:
            return self._pool
        if self.options.saliency_samples == "current":
            return self._draw(streams, generator)
        images, labels = self.problem.forget_images, self.problem.forget_labels
        index = torch.randint(len(images), (self.samples,), generator=Streams("cpu", *streams.place).generator("data"))
        return images[index].to(self.compute.device), labels[index].to(self.compute.device)

    def ranking(self, streams: Streams, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.scores(streams, network), {}

    def scores(self, streams: Streams, generator: nn.Module) -> dict[str, Tensor]:
        """g_s by parameter name, the gradient of E ||eps - eps_theta(x_t, t, c_f)||^2 (Eq. 8, 9), mean over batches; or
        what ``saliency_score`` says instead. The generator is not changed."""
        o = self.options
        network = generator if o.saliency_network == "current" else self.problem.teacher
        if o.saliency_score == "gradient":
            return self._gradient(streams, generator, network)
        if o.saliency_score == "random":
            return random_scores(streams, network)
        return {name: param.detach() for name, param in network.named_parameters()}

    def _gradient(self, streams: Streams, generator: nn.Module, network: nn.Module) -> dict[str, Tensor]:
        compute, schedule, o = self.compute, self.problem.schedule, self.options
        images, labels = self._samples(streams, generator)
        eps = streams.normal("eps", self.samples, images.shape[1:])
        t = streams.timesteps("t", self.samples, 0, schedule.num_train_timesteps - 1)
        x_t, target = schedule.add_noise(images, eps, t), schedule.target(images, eps, t)
        network.eval()
        names, params = zip(*network.named_parameters(), strict=True)
        frozen = not params[0].requires_grad
        network.requires_grad_(True)
        grads: list[Tensor] | None = None
        try:
            for batch in torch.arange(self.samples, device=compute.device).split(o.saliency_batch_size):
                part = batch[compute.world.share(o.saliency_batch_size)]
                with compute.autocast():
                    prediction = predict(network, schedule, x_t[part], t[part], labels[part])
                loss = prediction_loss(target[part], prediction) / o.saliency_batches
                grads = add_gradients(loss, params, grads)
        finally:
            network.requires_grad_(not frozen)
        # Averaged before the selection, so that every process has the same mask. FSDP has averaged its own gradients.
        if not is_sharded(grads[0]):
            compute.world.average_(grads)
        return dict(zip(names, grads, strict=True))

    def state_dict(self, network: nn.Module) -> dict[str, Any]:
        images, labels = self._pool or (None, None)
        return super().state_dict(network) | {"pool_images": images, "pool_labels": labels}

    def load_state_dict(self, state: dict[str, Any], network: nn.Module) -> None:
        super().load_state_dict(state, network)
        images, labels = state["pool_images"], state["pool_labels"]
        self._pool = None if images is None else (images.to(self.compute.device), labels.to(self.compute.device))
