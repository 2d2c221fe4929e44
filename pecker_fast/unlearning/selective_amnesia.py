"""Selective Amnesia (Heng and Soh, arXiv 2305.10120): continual learning applied to forgetting.

1. "replay": the teacher draws images of every class.
2. "fisher": F = E_x[(grad sum_t ||eps - eps_theta(x_t, t, c)||^2)^2], the square after the sum over the timesteps.
3. "forget": L = L(x ~ q, c_f) + replay_weight L(x replayed, c_r) + ewc_weight sum_i F_i (theta_i - theta*_i)^2,
   where L(x, c) is the noise-prediction loss, theta* the pretrained weights and q the surrogate: U[-1, 1] for classes,
   for prompts the teacher's samples of the cover prompt of c_f.

For prompts the second phase is a run of its own (``FisherInformation``), whose result serves every request.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS, predict, prediction_loss
from ..saliency import SaliencyAccumulator
from .denoising import Batches, NetworkOptions, NetworkPhase, drop_condition
from .many_step import ManyStepMethod, SamplingOptions
from .protocol import Phase
from .replay import Accumulation, Drawing, Pool, ReplayOptions, load_scores
from .setting import Setting
from .streams import Streams
from .trained import Trained, choose_trained


@dataclass(frozen=True)
class SelectiveAmnesiaOptions(SamplingOptions, ReplayOptions, NetworkOptions):
    """Options of Selective Amnesia. The defaults are those published for CIFAR-10."""

    replay_images: int | None = None
    """Number of images in all, of the classes or of the retained prompts in turn; instead of
    replay_images_per_class."""
    surrogate_images: int = 1000
    """Images of the cover prompts, in turn, that the network learns to draw for the forgotten prompts; classes become
    uniform noise instead."""
    trained: Trained = "all"
    """Which parameters are trained, as in esd: the published "full" is all, its "noxattn" is u."""
    loss_reduction: Literal["sum", "mean"] = "sum"
    """Over the dimensions of an image, for both losses and for the loss of the Fisher information. The public code sums
    for classes and averages for Stable Diffusion; the weight of the consolidation depends on it."""
    max_train_steps: int = 20_000
    """Steps that forget."""
    ema_decay: float | None = 0.9999
    """Decay of the averaged weights, which are evaluated and saved. None: no average."""
    eval_guidance_scale: float = 3.0
    """Guidance of the evaluation; 1 is none."""
    replay_weight: float = 1.0
    """Weight of the loss on the retained classes' replayed images (gamma)."""
    ewc_weight: float = 10.0
    """Weight of the elastic weight consolidation (lambda)."""
    fisher_samples: int | None = None
    """Replayed images for the Fisher information, of all classes in turn; all of them by default."""
    fisher_batch_size: int = 1
    """Images of these in an iteration; processes share them."""
    fisher_timesteps: int = NUM_TRAIN_TIMESTEPS
    """Timesteps in the sum of an image's losses. If fewer than the schedule has, one is drawn from each of as many
    equal stretches, and the sum is scaled up."""
    fisher_chunks: int = 20
    """Batches in which these timesteps are computed."""
    fisher_condition_dropout: float = 0.1
    """Share of labels that become "no condition" there, if the network has that label."""

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        self.check_sampling(num_train_timesteps)
        self.check_replay(num_train_timesteps)
        if self.replay_images is not None:
            check_int("replay_images", self.replay_images, 1)
        check_int("surrogate_images", self.surrogate_images, 1)
        check_number("replay_weight", self.replay_weight)
        check_number("ewc_weight", self.ewc_weight)
        if self.fisher_samples is not None:
            check_int("fisher_samples", self.fisher_samples, 1)
        check_int("fisher_batch_size", self.fisher_batch_size, 1)
        check_int("fisher_timesteps", self.fisher_timesteps, 1, num_train_timesteps + 1)
        check_int("fisher_chunks", self.fisher_chunks, 1, self.fisher_timesteps + 1)
        check_number("fisher_condition_dropout", self.fisher_condition_dropout, high=1.0)


def _loss(options: SelectiveAmnesiaOptions, target: Tensor, prediction: Tensor) -> Tensor:
    """The prediction's loss, mean over the batch."""
    loss = prediction_loss(target, prediction)
    return loss / target[0].numel() if options.loss_reduction == "mean" else loss


def _pool(setting: Setting, options: SelectiveAmnesiaOptions, surrogates: int = 0) -> Pool:
    """An empty pool: ``surrogates`` images of cover prompts, labelled with the forgotten prompts, then the replayed
    images; labels take turns."""
    problem, request = setting.problem, setting.problem.request
    if problem.forgets_prompts:
        retained = request.labels(list(dict.fromkeys(request.retain)))
        pairs = zip(request.labels(request.forget), request.labels(request.cover), strict=True)
        pairs = torch.tensor(list(pairs))[torch.arange(surrogates) % len(request.forget)]
    else:
        retained, pairs = list(range(request.num_classes)), torch.zeros(0, 2, dtype=torch.int64)
    count = options.replay_images or len(retained) * options.replay_images_per_class
    replayed = torch.tensor(retained)[torch.arange(count) % len(retained)]
    images = torch.zeros(len(pairs) + count, *problem.sample_shape)
    return Pool(torch.cat([pairs[:, 0], replayed]), images, torch.cat([pairs[:, 1], replayed]))


class FisherPass(Accumulation):
    """Computes the diagonal of the Fisher information, sample by sample.

    Parameters
    ----------
    setting, options, pool, network
        Of the method.

    Raises
    ------
    ValueError
        If the samples are not in the pool, or are not a multiple of the batch.
    """

    name = "fisher"

    def __init__(self, setting: Setting, options: SelectiveAmnesiaOptions, pool: Pool, network: nn.Module) -> None:
        super().__init__(setting, network, pool, "sq_sum")
        world = setting.compute.world
        world.check_shares("fisher_batch_size", options.fisher_batch_size)
        self.options = options
        self.samples = len(pool) if options.fisher_samples is None else options.fisher_samples
        if self.samples > len(pool):
            raise ValueError(f"fisher_samples is {self.samples}, expected at most the {len(pool)} that are replayed")
        if self.samples % options.fisher_batch_size:
            raise ValueError(
                f"fisher_batch_size is {options.fisher_batch_size}, expected a divisor of the {self.samples} samples"
            )
        self.iterations = self.samples // options.fisher_batch_size
        self.images_per_iteration = options.fisher_batch_size
        # Processes add up their sums of each iteration, so that all have the total whatever their number.
        self._part = self.accumulator if world.size == 1 else SaliencyAccumulator(network, "sq_sum")

    def step(self, iteration: int) -> dict[str, Tensor]:
        compute, count = self.setting.compute, self.options.fisher_batch_size
        rows = compute.world.share(count)
        losses = []
        self.network.eval()
        with compute.regions("saliency"):
            for sample in range(iteration * count + rows.start, iteration * count + rows.stop):
                losses.append(self._sample(sample))
                self._part.add()
                self.network.zero_grad(set_to_none=True)
        if compute.world.size > 1:
            sums, total = list(self._part.scores.values()), list(self.accumulator.scores.values())
            compute.world.average_(sums)
            torch._foreach_add_(total, sums, alpha=compute.world.size)
            self._part.reset()
        return {"loss_fisher": torch.stack(losses).mean()}

    def _sample(self, sample: int) -> Tensor:
        """Add the gradient of the sum over timesteps of one image's losses. Returns the losses' mean."""
        o, compute, schedule = self.options, self.setting.compute, self.setting.problem.schedule
        device = compute.device
        streams = Streams(device, compute.seed, self.name, sample)
        n, steps = o.fisher_timesteps, schedule.num_train_timesteps
        # One timestep of each stretch; all of them if there are as many stretches as timesteps.
        within = torch.rand(n, generator=streams.generator("t"), device=device, dtype=torch.float64)
        t = ((torch.arange(n, device=device) + within) * steps / n).long().clamp(max=steps - 1)
        if n == steps:
            t = torch.arange(steps, device=device)
        x0 = self.pool.batch(torch.tensor([sample])).to(device)
        labels = self.pool.labels[sample].to(device).expand(n)
        labels = drop_condition(streams, labels, o.fisher_condition_dropout, self.null, n, slice(None))
        eps = streams.normal("eps", n, x0.shape[1:])
        total = torch.zeros((), device=device)
        for rows in torch.arange(n, device=device).tensor_split(o.fisher_chunks):
            with compute.autocast():
                x_t = schedule.add_noise(x0.expand(len(rows), *x0.shape[1:]), eps[rows], t[rows])
                prediction = predict(self.network, schedule, x_t, t[rows], labels[rows])
                target = schedule.target(x0.expand(len(rows), *x0.shape[1:]), eps[rows], t[rows])
            loss = _loss(o, target, prediction) * len(rows)
            (loss * (steps / n)).backward()
            total += loss.detach()
        return total / n

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name, once the pass is complete."""
        return {name: score / self.samples for name, score in self.accumulator.scores.items()}


class SelectiveAmnesiaPhase(NetworkPhase):
    """Steps that forget.

    Parameters
    ----------
    setting, options, pool, network
        Of the method.
    surrogates : int
        The first ``surrogates`` images of the pool are learnt for the forgotten prompts; 0: uniform noise is learnt for
        the forgotten classes.

    Raises
    ------
    ValueError
        If ``problem.fisher`` is of another network.
    """

    def __init__(
        self, setting: Setting, options: SelectiveAmnesiaOptions, pool: Pool, network: nn.Module, surrogates: int = 0
    ) -> None:
        problem, compute = setting.problem, setting.compute
        super().__init__(compute, network, problem.schedule, options, name="forget")
        self.problem, self.pool = problem, pool
        self.surrogates, count = None, options.train_batch_size
        if surrogates:
            first, others = torch.arange(surrogates), torch.arange(surrogates, len(pool))
            self.surrogates = Batches(compute.seed, pool, count, members=first, name="surrogate epoch")
            self.replayed = Batches(compute.seed, pool, count, members=others)
        else:
            self.replayed = Batches(compute.seed, pool, count, classes=problem.request.retained_classes)
        self.conditions = problem.request.conditions(compute.device)
        trained = [(name, param) for name, param in network.named_parameters() if param.requires_grad]
        self._fisher = {name: torch.zeros_like(param).detach() for name, param in trained}
        if problem.fisher is not None:
            missing = [name for name in self._fisher if name not in problem.fisher]
            if missing:
                raise ValueError(f"fisher has no parameter {missing[0]}: it is of another network")
            load_scores(self._fisher, {name: problem.fisher[name] for name in self._fisher})

    def start(self, previous: Phase | None) -> None:
        super().start(previous)
        if self.problem.fisher is None:
            load_scores(self._fisher, previous.fisher())

    def _forgotten(self, streams: Streams, iteration: int, count: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """This process's surrogates, images or latents, and the labels that they are learnt for."""
        compute = self.compute
        if self.surrogates is not None:
            return self.surrogates.take(iteration, compute)
        rows = compute.world.share(count)
        noise = torch.rand((count, *shape), generator=streams.generator("surrogate"), device=compute.device)
        return 2 * noise[rows] - 1, self.conditions.draw_forgotten(streams, count)[0][rows]

    def backward(self, streams: Streams, iteration: int) -> dict[str, Tensor]:
        o, compute, count = self.options, self.compute, self.options.train_batch_size
        rows = compute.world.share(count)
        with compute.regions("data"):
            replayed, retained = self.replayed.take(iteration, compute)
            surrogates, forgotten = self._forgotten(streams, iteration, count, replayed.shape[1:])
        # The same timesteps for both.
        t = streams.antithetic_timesteps("t", count, self.schedule.num_train_timesteps)[rows]
        losses = {}
        self.network.train()
        for purpose, x0, labels, weight in (
            ("forget", surrogates, forgotten, 1.0),
            ("retain", replayed, retained, o.replay_weight),
        ):
            eps = streams.normal(f"{purpose} eps", count, x0.shape[1:])[rows]
            streams.seed_dropout(f"{purpose} dropout", compute.world.rank)
            with compute.regions(f"{purpose} loss"):
                with compute.autocast():
                    prediction = predict(self.network, self.schedule, self.schedule.add_noise(x0, eps, t), t, labels)
                losses[f"loss_{purpose}"] = loss = _loss(o, self.schedule.target(x0, eps, t), prediction)
                (weight * loss).backward()
        with compute.regions("consolidation"):
            losses["loss_ewc"] = self._consolidate()
        return losses

    @torch.no_grad()
    def _consolidate(self) -> Tensor:
        """Add the penalty's gradient 2 lambda F (theta - theta*) to the network's. Returns it without its weight."""
        both = zip(self.network.parameters(), self.problem.teacher.parameters(), strict=True)
        pairs = [(param, start) for param, start in both if param.requires_grad]
        fisher, (params, starts) = list(self._fisher.values()), map(list, zip(*pairs, strict=True))
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        moved = torch._foreach_sub(params, starts)
        pull = torch._foreach_mul(fisher, moved)
        torch._foreach_add_([param.grad for param in params], pull, alpha=2 * self.options.ewc_weight)
        return torch.stack([(a * b).sum() for a, b in zip(pull, moved, strict=True)]).sum()

    def state_dict(self) -> dict[str, Any]:
        # The problem's own is available when the run resumes.
        fisher = self._fisher if self.problem.fisher is None else None
        return {**super().state_dict(), "fisher": fisher, "pool": self.pool.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.problem.fisher is None:
            load_scores(self._fisher, state["fisher"])
        self.pool.load(state["pool"])


class SelectiveAmnesia(ManyStepMethod):
    """Selective Amnesia: for a forgotten class the network learns to draw uniform noise, and the cover class plays no
    part; for a forgotten prompt, the teacher's samples of its cover prompt. The images that it replays are the
    teacher's own, so it needs no data."""

    name = "selective_amnesia"
    Options = SelectiveAmnesiaOptions
    forgets_prompts = True

    def __init__(self, setting: Setting, options: SelectiveAmnesiaOptions) -> None:
        super().__init__(setting, options)
        teacher_dtype = setting.placement.teacher_dtype
        if teacher_dtype not in (None, torch.float32):
            # The consolidation would pull towards rounded weights.
            raise ValueError(
                f"teacher_dtype is {teacher_dtype}, but {self.name} holds on to the pretrained weights as they are: "
                "expected float32"
            )
        problem = setting.problem
        self.network = setting.trainable(problem.teacher)
        choose_trained(self.network, options.trained, problem.forgets_prompts)
        self.phases = self._phases()

    def _phases(self) -> list[Phase]:
        setting, options, network = self.setting, self.options, self.network
        problem = setting.problem
        if problem.forgets_prompts and problem.fisher is None:
            raise ValueError("fisher is not given: expected the file that pecker-fast fisher makes of the same model")
        surrogates = options.surrogate_images if problem.forgets_prompts else 0
        pool = _pool(setting, options, surrogates)
        return [
            Drawing(setting, options, pool, network),
            *([] if problem.fisher is not None else [FisherPass(setting, options, pool, network)]),
            SelectiveAmnesiaPhase(setting, options, pool, network, surrogates),
        ]


class FisherInformation(SelectiveAmnesia):
    """The phases of Selective Amnesia that compute the Fisher information of the pretrained network, on its own samples
    of all retained prompts; nothing is trained. Not a method by itself."""

    def _phases(self) -> list[Phase]:
        pool = _pool(self.setting, self.options)
        arguments = (self.setting, self.options, pool, self.network)
        return [Drawing(*arguments), FisherPass(*arguments)]

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name, float32, once the phases are complete."""
        return self.phases[-1].fisher()
