"""SalUn (Fan et al., arXiv 2310.12508): fine-tuning of the parameters that are salient for the class to forget.

1. "mask": over the images of what is to be forgotten, gradients of the noise-prediction loss of the guided prediction
   are summed with their signs; the entries of largest magnitude, a share of all, are salient.
2. "forget": L = L_f + retain_weight L_r on salient entries; all others are frozen, exactly. L_r is the
   noise-prediction loss on retained classes. L_f is, for "rl" (random labels), the mean square of
   sg[eps_theta(x_t, t, cover)] - eps_theta(x_t, t, c_f), and for "ga" (gradient ascent) less the noise-prediction loss.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..diffusion import noise_prediction_loss, predict_eps
from ..mask import SaliencyMask
from .denoising import Batches, NetworkOptions, NetworkPhase, drop_condition, flip, members_of
from .many_step import ManyStepMethod, SamplingOptions, check_guidance
from .masking import density_by_module
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
    """Random labels: the cover class's prediction is the target; or gradient ascent."""
    retain_weight: float = 1e-3
    """Weight of the retained classes' loss. It is a sum over dimensions, that of "rl" a mean: at 32 pixels in colour,
    3072 dimensions, this is 3.07 of the mean."""
    condition_dropout: float = 0.1
    """Share of labels that become "no condition", where the network has that label; drawn apart for each prediction."""
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
    """The published order: the norm that is clipped is of all entries' gradients, not of the salient ones'."""

    @property
    def forget_samples(self) -> int:
        """Images of forgotten classes in a step."""
        return self.train_batch_size if self.forget_batch_size is None else self.forget_batch_size

    def check(self, num_train_timesteps: int) -> None:
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
        if self.images not in ("real", "generated"):
            raise ValueError(f'images is {self.images!r}, expected "real" or "generated"')
        if self.forget_loss not in ("rl", "ga"):
            raise ValueError(f'forget_loss is {self.forget_loss!r}, expected "rl" or "ga"')


class SaliencyPass(Accumulation):
    """One pass over the images to forget: the signed gradients, summed.

    Parameters
    ----------
    setting, options, network, pool: of the method.
    images: those of the classes to forget are taken.
    """

    name = "mask"

    def __init__(
        self, setting: Setting, options: SalUnOptions, images: Images, network: nn.Module, pool: Pool | None
    ) -> None:
        super().__init__(setting, network, pool, "sum")
        check_guidance(setting.teacher, "saliency_guidance_scale", options.saliency_guidance_scale)
        setting.world.check_shares("saliency_batch_size", options.saliency_batch_size)
        self.options, self.images = options, images
        self.members = members_of(images, setting.request.forget_classes)
        self.iterations = -(-len(self.members) // options.saliency_batch_size)
        self.images_per_iteration = min(len(self.members), options.saliency_batch_size)

    def mask(self) -> SaliencyMask:
        """The salient entries, once the pass is complete."""
        return self.accumulator.mask(density=self.options.density)

    def step(self, iteration: int) -> dict[str, Tensor]:
        o, setting, count = self.options, self.setting, self.options.saliency_batch_size
        streams = Streams(setting.device, setting.seed, self.name, iteration)
        places = torch.arange(iteration * count, (iteration + 1) * count)
        here = setting.world.share(count)
        # The last batch is filled up, so that processes have equal shares, with images of weight 0.
        weights = (places < len(self.members)).float()
        weights *= count / weights.sum()
        indices = self.members[places % len(self.members)][here]
        x0 = self.images.batch(indices).to(setting.device)
        labels = self.images.labels[indices].to(setting.device)
        eps = streams.normal("eps", count, x0.shape[1:])[here]
        t = streams.antithetic_timesteps("t", count, setting.schedule.num_train_timesteps)[here]
        self.network.eval()
        with setting.regions("saliency"):
            with setting.autocast():
                x_t = setting.schedule.add_noise(x0, eps, t)
                eps_pred = predict_eps(self.network, x_t, t, labels, o.saliency_guidance_scale, self.null)
            loss = noise_prediction_loss(eps, eps_pred, weights[here].to(setting.device))
            loss.backward()
            grads = [p.grad for p in self.network.parameters() if p.grad is not None]
            setting.world.average_(grads)
            if o.saliency_max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.network.parameters(), o.saliency_max_grad_norm)
            self.accumulator.add()
            self.network.zero_grad(set_to_none=True)
        return {"loss_saliency": loss.detach()}


class SalUnPhase(NetworkPhase):
    """Steps on the salient entries.

    Parameters
    ----------
    setting, options, network: of the method.
    images: those of retained classes are taken, and those of the classes to forget.
    pool: where images are drawn; it is kept with the state.
    """

    def __init__(
        self,
        setting: Setting,
        options: SalUnOptions,
        images: tuple[Images, Images],
        network: nn.Module,
        pool: Pool | None,
    ) -> None:
        super().__init__(setting, network, setting.schedule, options, name="forget", packed=True)
        setting.world.check_shares("forget_batch_size", options.forget_samples)
        self.setting, self.pool = setting, pool
        request = setting.request
        common = {"classes": request.forget_classes, "name": "forget epoch"}
        self.forgotten = Batches(setting.seed, images[0], options.forget_samples, **common)
        self.retained = Batches(setting.seed, images[1], options.train_batch_size, classes=request.retained_classes)
        self.conditions = request.conditions(setting.device)
        self.mask: SaliencyMask | None = None

    def start(self, previous: Phase | None) -> None:
        super().start(previous)
        with self.setting.regions("selection"):
            self.mask = previous.mask()

    def _predict(self, streams: Streams, purpose: str, x_t: Tensor, t: Tensor, labels: Tensor, count: int) -> Tensor:
        """The prediction with some labels left out."""
        o, world = self.options, self.setting.world
        labels = drop_condition(
            streams, labels, o.condition_dropout, self.null, count, world.share(count), f"{purpose} condition"
        )
        streams.seed_dropout(f"{purpose} dropout", world.rank)
        with self.setting.autocast():
            return predict_eps(self.network, x_t, t, labels)

    def _noised(self, streams: Streams, purpose: str, batches: Batches, iteration: int) -> tuple[Tensor, ...]:
        """x_t, its noise, t and labels of this process's images of an iteration."""
        setting, count = self.setting, batches.count
        here = setting.world.share(count)
        with setting.regions("data"):
            x0, labels = batches.take(iteration, setting)
        if self.options.random_flip:
            x0 = flip(streams, x0, count, here, f"{purpose} flip")
        eps = streams.normal(f"{purpose} eps", count, x0.shape[1:])[here]
        t = streams.antithetic_timesteps(f"{purpose} t", count, self.schedule.num_train_timesteps)[here]
        return self.schedule.add_noise(x0, eps, t), eps, t, labels

    def backward(self, streams: Streams, iteration: int) -> dict[str, Tensor]:
        o, setting, count = self.options, self.setting, self.options.forget_samples
        self.network.train()
        x_t, eps, t, labels = self._noised(streams, "forget", self.forgotten, iteration)
        with setting.regions("forget loss"):
            eps_pred = self._predict(streams, "forget", x_t, t, labels, count)
            if o.forget_loss == "rl":
                covers = streams.choose("cover labels", count, self.conditions.covers)[setting.world.share(count)]
                with torch.no_grad():
                    target = self._predict(streams, "cover", x_t, t, covers, count)
                forget = (target - eps_pred).square().mean()
            else:
                forget = -noise_prediction_loss(eps, eps_pred)
            forget.backward()
        x_t, eps, t, labels = self._noised(streams, "retain", self.retained, iteration)
        with setting.regions("retain loss"):
            retain = noise_prediction_loss(eps, self._predict(streams, "retain", x_t, t, labels, o.train_batch_size))
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
        said = super().describe()
        if self.mask is None:
            return said
        return said | {
            "mask_density": self.mask.density,
            "mask_iou": None,
            "mask_touched_ever": self.mask.density,
            "mask_nan_count": self.mask.nan_count,
            "mask_density_by_module": density_by_module(self.mask),
        }

    def state_dict(self) -> dict[str, Any]:
        pool = None if self.pool is None else self.pool.images
        return {**super().state_dict(), "mask": self.mask.words, "nan_count": self.mask.nan_count, "pool": pool}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        names, params = zip(*self.network.named_parameters(), strict=True)
        words, nans = state["mask"].to(self.setting.device), torch.tensor(state["nan_count"])
        self.mask = SaliencyMask(words, [param.shape for param in params], names, nan_count=nans)
        if self.pool is not None:
            self.pool.load(state["pool"])


class SalUn(ManyStepMethod):
    """Saliency unlearning: the salient half of the parameters is fine-tuned, the rest is frozen.

    With images="generated" the teacher draws the images that are trained on, and no data is needed. Where the request
    names images of what is to be forgotten (forget_data), those are the forgotten classes' images.
    """

    name = "salun"
    Options = SalUnOptions

    def __init__(self, setting: Setting, options: SalUnOptions) -> None:
        super().__init__(setting, options)
        self.network = setting.trainable(setting.teacher)
        pool = None
        if options.images == "generated":
            pool = Pool.of(setting, options)
            self.phases.append(Drawing(setting, options, pool, self.network))
        retained = setting.training_images if pool is None else pool
        forgotten = retained
        if setting.forget_images is not None:
            forgotten = Pool(setting.forget_labels, setting.forget_images)
        self.phases.append(SaliencyPass(setting, options, forgotten, self.network, pool))
        self.phases.append(SalUnPhase(setting, options, (forgotten, retained), self.network, pool))

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        return options.images == "real"
