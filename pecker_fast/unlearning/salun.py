"""SalUn (Fan et al., arXiv 2310.12508): fine-tuning of the parameters that are salient for the class to forget.

1. "mask": over the images of the forgotten classes, gradients of the noise-prediction loss of the guided prediction are
   summed with their signs; a share of all entries, those of largest magnitude, are salient.
2. "forget": L = L_f + retain_weight L_r on salient entries; all others are frozen, exactly. L_r is the
   noise-prediction loss on retained classes. L_f is, for "rl" (random labels), the mean square of
   sg[eps_theta(x_t, t, cover)] - eps_theta(x_t, t, c_f), and for "ga" (gradient ascent) minus the noise-prediction
   loss.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS, predict, prediction_loss
from ..mask import SaliencyMask
from .denoising import Batches, NetworkOptions, NetworkPhase, drop_condition, flip, members_of
from .many_step import ManyStepMethod, SamplingOptions, check_guidance
from .masking import density_by_module, mask_from_state, mask_state
from .protocol import Phase
from .replay import Accumulation, Drawing, Pool, ReplayOptions
from .setting import Images, Setting
from .streams import Streams


@dataclass(frozen=True)
class SalUnOptions(SamplingOptions, ReplayOptions, NetworkOptions):
    """Options of SalUn. The defaults are those published for CIFAR-10."""

    eval_guidance_scale: float = 3.0
    """Guidance of the evaluation; 1 is none."""
    forget_batch_size: int | None = None
    """Images of forgotten classes in a step; as many as of retained ones by default."""
    images: Literal["real", "generated"] = "real"
    """Real images of the training set, or, without data, images that the teacher draws (replay_*)."""
    forget_loss: Literal["rl", "ga"] = "rl"
    """Random labels: the prediction for the cover class is the target; or gradient ascent."""
    retain_weight: float = 1e-3
    """Weight of the retained classes' loss. It is a sum over dimensions, that of "rl" a mean: at 32 pixels in colour,
    3072 dimensions, this is 3.07 of the mean."""
    condition_dropout: float = 0.1
    """Share of labels that become "no condition", if the network has that label; drawn anew for each prediction."""
    random_flip: bool = True
    """Whether images are mirrored at random in training."""
    density: float = 0.5
    """Share of all parameters that are trained, in (0, 1]."""
    saliency_guidance_scale: float = 3.0
    """Guidance of the prediction whose gradient is taken; 1 is none."""
    saliency_batch_size: int = 128
    """Images in a batch of that gradient."""
    saliency_max_grad_norm: float | None = 1.0
    """The gradient of each batch is clipped to this norm before it is added."""
    parity: bool = False
    """The published order: clip by the norm of all entries' gradients, not of the salient ones'."""

    @property
    def forget_samples(self) -> int:
        """Images of forgotten classes in a step."""
        return self.train_batch_size if self.forget_batch_size is None else self.forget_batch_size

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        self.check_sampling(num_train_timesteps)
        self.check_replay(num_train_timesteps)
        check_int("forget_batch_size", self.forget_samples, 1)
        check_int("saliency_batch_size", self.saliency_batch_size, 1)
        check_number("retain_weight", self.retain_weight)
        check_number("condition_dropout", self.condition_dropout, high=1.0)
        check_number("density", self.density, high=1.0, open_low=True)
        check_number("saliency_guidance_scale", self.saliency_guidance_scale)
        if self.saliency_max_grad_norm is not None:
            check_number("saliency_max_grad_norm", self.saliency_max_grad_norm, open_low=True)


class SaliencyPass(Accumulation):
    """One pass over the images of the forgotten classes that sums their signed gradients.

    Parameters
    ----------
    setting, options, network, pool
        Of the method.
    images : Images
        Those of the forgotten classes are taken.
    """

    name = "mask"

    def __init__(
        self, setting: Setting, options: SalUnOptions, images: Images, network: nn.Module, pool: Pool | None
    ) -> None:
        super().__init__(setting, network, pool, "sum")
        check_guidance(setting.problem.teacher, "saliency_guidance_scale", options.saliency_guidance_scale)
        setting.compute.world.check_shares("saliency_batch_size", options.saliency_batch_size)
        self.options, self.images = options, images
        self.members = members_of(images, setting.problem.request.forget_classes)
        self.iterations = -(-len(self.members) // options.saliency_batch_size)
        self.images_per_iteration = min(len(self.members), options.saliency_batch_size)

    def mask(self) -> SaliencyMask:
        """The salient entries, once the pass is complete."""
        return self.accumulator.mask(density=self.options.density)

    def step(self, iteration: int) -> dict[str, Tensor]:
        o, compute, schedule = self.options, self.setting.compute, self.setting.problem.schedule
        count = o.saliency_batch_size
        streams = Streams(compute.device, compute.seed, self.name, iteration)
        places = torch.arange(iteration * count, (iteration + 1) * count)
        rows = compute.world.share(count)
        # The last batch is filled up with images of weight 0, so that processes have equal shares.
        weights = (places < len(self.members)).float()
        weights *= count / weights.sum()
        indices = self.members[places % len(self.members)][rows]
        x0 = self.images.batch(indices).to(compute.device)
        labels = self.images.labels[indices].to(compute.device)
        eps = streams.normal("eps", count, x0.shape[1:])[rows]
        t = streams.antithetic_timesteps("t", count, schedule.num_train_timesteps)[rows]
        self.network.eval()
        with compute.regions("saliency"):
            with compute.autocast():
                x_t = schedule.add_noise(x0, eps, t)
                prediction = predict(self.network, schedule, x_t, t, labels, o.saliency_guidance_scale, self.null)
            target = schedule.target(x0, eps, t)
            loss = prediction_loss(target, prediction, weights[rows].to(compute.device))
            loss.backward()
            grads = [p.grad for p in self.network.parameters() if p.grad is not None]
            compute.world.average_(grads)
            if o.saliency_max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.network.parameters(), o.saliency_max_grad_norm)
            self.accumulator.add()
            self.network.zero_grad(set_to_none=True)
        return {"loss_saliency": loss.detach()}


class SalUnPhase(NetworkPhase):
    """Steps on the salient entries.

    Parameters
    ----------
    setting, options, network
        Of the method.
    images : tuple of Images
        Images of the forgotten classes, and images of the retained classes.
    pool : Pool, optional
        The teacher's images if the method has any; saved with the state.
    """

    def __init__(
        self,
        setting: Setting,
        options: SalUnOptions,
        images: tuple[Images, Images],
        network: nn.Module,
        pool: Pool | None,
    ) -> None:
        compute, request = setting.compute, setting.problem.request
        super().__init__(compute, network, setting.problem.schedule, options, name="forget", packed=True)
        compute.world.check_shares("forget_batch_size", options.forget_samples)
        self.pool = pool
        forgotten = {"classes": request.forget_classes, "name": "forget epoch"}
        self.forgotten = Batches(compute.seed, images[0], options.forget_samples, **forgotten)
        self.retained = Batches(compute.seed, images[1], options.train_batch_size, classes=request.retained_classes)
        self.conditions = request.conditions(compute.device)
        self.mask: SaliencyMask | None = None

    def start(self, previous: Phase | None) -> None:
        super().start(previous)
        with self.compute.regions("selection"):
            self.mask = previous.mask()

    def _predict(self, streams: Streams, purpose: str, x_t: Tensor, t: Tensor, labels: Tensor, count: int) -> Tensor:
        """The prediction with condition dropout."""
        o, world = self.options, self.compute.world
        labels = drop_condition(
            streams, labels, o.condition_dropout, self.null, count, world.share(count), f"{purpose} condition"
        )
        streams.seed_dropout(f"{purpose} dropout", world.rank)
        with self.compute.autocast():
            return predict(self.network, self.schedule, x_t, t, labels)

    def _noised(self, streams: Streams, purpose: str, batches: Batches, iteration: int) -> tuple[Tensor, ...]:
        """x_t, what is to be predicted there, t and labels of this process's images of an iteration."""
        compute, count = self.compute, batches.count
        rows = compute.world.share(count)
        with compute.regions("data"):
            x0, labels = batches.take(iteration, compute)
        if self.options.random_flip:
            x0 = flip(streams, x0, count, rows, f"{purpose} flip")
        eps = streams.normal(f"{purpose} eps", count, x0.shape[1:])[rows]
        t = streams.antithetic_timesteps(f"{purpose} t", count, self.schedule.num_train_timesteps)[rows]
        return self.schedule.add_noise(x0, eps, t), self.schedule.target(x0, eps, t), t, labels

    def backward(self, streams: Streams, iteration: int) -> dict[str, Tensor]:
        o, compute, count = self.options, self.compute, self.options.forget_samples
        self.network.train()
        x_t, true, t, labels = self._noised(streams, "forget", self.forgotten, iteration)
        with compute.regions("forget loss"):
            prediction = self._predict(streams, "forget", x_t, t, labels, count)
            if o.forget_loss == "rl":
                covers = streams.choose("cover labels", count, self.conditions.covers)[compute.world.share(count)]
                with torch.no_grad():
                    target = self._predict(streams, "cover", x_t, t, covers, count)
                forget = (target - prediction).square().mean()
            else:
                forget = -prediction_loss(true, prediction)
            forget.backward()
        x_t, true, t, labels = self._noised(streams, "retain", self.retained, iteration)
        with compute.regions("retain loss"):
            retain = prediction_loss(true, self._predict(streams, "retain", x_t, t, labels, o.train_batch_size))
            (o.retain_weight * retain).backward()
        return {"loss_forget": forget, "loss_retain": retain}

    def update(self) -> None:
        if self.options.parity:
            self.clip()
        else:
            self.mask.apply_(self.network)
            self.clip()
        self.optimizer.step(mask=self.mask)

    def last_mask(self) -> SaliencyMask | None:
        return self.mask

    def describe(self) -> dict[str, Any]:
        record = super().describe()
        if self.mask is None:
            return record
        return record | {
            "mask_density": self.mask.density,
            "mask_iou": None,
            "mask_touched_ever": self.mask.density,
            "mask_nan_count": self.mask.nan_count,
            "mask_density_by_module": density_by_module(self.mask),
        }

    def state_dict(self) -> dict[str, Any]:
        pool = None if self.pool is None else self.pool.images
        return {**super().state_dict(), "mask": mask_state(self.mask), "pool": pool}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.mask = mask_from_state(state["mask"], self.network, self.compute.device)
        if self.pool is not None:
            self.pool.load(state["pool"])


class SalUn(ManyStepMethod):
    """Saliency unlearning: the salient half of the parameters is fine-tuned, the rest is frozen.

    With images="generated" the teacher draws the training images, and no data is needed. If the problem has images of
    what is to be forgotten (forget_data), they replace the training images of the forgotten classes.
    """

    name = "salun"
    Options = SalUnOptions

    def __init__(self, setting: Setting, options: SalUnOptions) -> None:
        super().__init__(setting, options)
        problem = setting.problem
        self.network = setting.trainable(problem.teacher)
        pool = None
        if options.images == "generated":
            pool = Pool.of(setting, options)
            self.phases.append(Drawing(setting, options, pool, self.network))
        retained = problem.training_images if pool is None else pool
        forgotten = retained
        if problem.forget_images is not None:
            forgotten = Pool(problem.forget_labels, problem.forget_images)
        self.phases.append(SaliencyPass(setting, options, forgotten, self.network, pool))
        self.phases.append(SalUnPhase(setting, options, (forgotten, retained), self.network, pool))

    @classmethod
    def reads_forget_images(cls, options: Any) -> bool:
        return True

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        return options.images == "real"
