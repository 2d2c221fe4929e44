"""ESD (Gandikota et al., arXiv 2303.07345), erased stable diffusion, for prompts and for classes. For classes the class
label is the prompt, and the label for "no condition" is the empty prompt.

x_t is a DDIM sample of c_f down to a random step; t is uniform between that step and the next. The loss is

    mean ||eps_theta(x_t, t, c_f) - [eps_0 - negative_guidance (eps_f - eps_0)]||^2,
    eps_0 = eps_phi(x_t, t, empty), eps_f = eps_phi(x_t, t, c_f),   phi: the pretrained network, frozen.

Training sees forgotten conditions only: small steps and the choice of parameters preserve the others.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS, predict
from .denoising import NetworkOptions, NetworkPhase
from .many_step import ManyStepMethod, SamplingOptions
from .setting import Setting
from .streams import Streams
from .trained import Trained, choose_trained


@dataclass(frozen=True)
class ESDOptions(SamplingOptions, NetworkOptions):
    """Options of ESD. The defaults are those published for Stable Diffusion but for negative_guidance, the 7.5 of the
    public code for class-conditional networks; there 1.0."""

    train_batch_size: int = 1
    """Samples in a step."""
    learning_rate: float = 1e-5
    """Learning rate of Adam."""
    max_grad_norm: float | None = None
    """Gradients are clipped to this norm."""
    eval_guidance_scale: float = 3.0
    """Guidance of the evaluation; 1 is none."""
    negative_guidance: float = 7.5
    """How far from the class the target lies (eta)."""
    trained: Trained = "u"
    """Which parameters are trained. ESD-x, those that see the prompt: the cross attention; of a class-conditional
    network the class embedding and the projections of the embedding in the residual blocks. x-strict: of the cross
    attention the keys and values alone. ESD-u, all others but those of the time embedding and of the output."""
    empty_prompt: Literal["null", "mean", "cover"] = "null"
    """The empty prompt: the label for "no condition"; or, for networks without it, the mean of the predictions for all
    classes, or the cover class."""
    trajectory_network: Literal["current", "teacher"] = "current"
    """Network whose samples x_t are: the current one, or the pretrained one."""
    trajectory_steps: int = 50
    """DDIM steps of a whole sample."""
    trajectory_guidance_scale: float = 3.0
    """Guidance of these samples; 1 is none."""

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        self.check_sampling(num_train_timesteps)
        check_number("negative_guidance", self.negative_guidance)
        check_int("trajectory_steps", self.trajectory_steps, 1, num_train_timesteps + 1)
        check_number("trajectory_guidance_scale", self.trajectory_guidance_scale)


class ESDPhase(NetworkPhase):
    """Steps on ESD's loss.

    Parameters
    ----------
    setting, options, network
        Of the method.

    Raises
    ------
    ValueError
        If the empty prompt is the null label and the network has none.
    """

    def __init__(self, setting: Setting, options: ESDOptions, network: nn.Module) -> None:
        problem = setting.problem
        super().__init__(setting.compute, network, problem.schedule, options, name="forget")
        self.problem = problem
        if options.empty_prompt == "null" and self.null is None:
            raise ValueError(
                'empty_prompt is "null", but the pretrained network has no label for "no condition": expected "mean" '
                'or "cover"'
            )
        self.conditions = problem.request.conditions(self.compute.device)
        # Stable Diffusion's DDIM is one timestep late.
        self._offset = 1 if problem.forgets_prompts else 0

    def _empty(self, network: nn.Module, x_t: Tensor, t: Tensor, covers: Tensor) -> Tensor:
        """The network's prediction for the empty prompt."""
        empty_prompt = self.options.empty_prompt
        if empty_prompt == "mean":
            each = len(self.conditions.everything)
            labels = self.conditions.everything.repeat(len(x_t))
            eps = predict(network, self.schedule, x_t.repeat_interleave(each, 0), t.repeat_interleave(each), labels)
            return eps.unflatten(0, (len(x_t), each)).mean(1)
        labels = torch.full_like(covers, self.null) if empty_prompt == "null" else covers
        return predict(network, self.schedule, x_t, t, labels)

    def _levels(self, steps: Tensor) -> Tensor:
        """Timesteps of DDIM steps; step 0 is the last."""
        return steps * (self.schedule.num_train_timesteps // self.options.trajectory_steps)

    def _trajectory(self, z: Tensor, until: Tensor, labels: Tensor, covers: Tensor) -> Tensor:
        """x at the DDIM step ``until`` of each sample, from the noise ``z``. The first step has the largest number."""
        o = self.options
        network = self.network if o.trajectory_network == "current" else self.problem.teacher
        network.eval()
        first = self._levels(torch.full((len(z),), o.trajectory_steps - 1, device=z.device)) + self._offset
        x = self.schedule.start(z, first)
        for step in range(o.trajectory_steps - 1, 0, -1):
            rows = (until < step).nonzero().flatten()
            if len(rows) == 0:
                continue
            steps = torch.full_like(rows, step)
            t = self._levels(steps) + self._offset
            prediction = predict(network, self.schedule, x[rows], t, labels[rows])
            if o.trajectory_guidance_scale != 1:
                empty = self._empty(network, x[rows], t, covers[rows])
                prediction = empty + o.trajectory_guidance_scale * (prediction - empty)
            x0, eps = self.schedule.split(x[rows], prediction, t)
            x0 = x0.clamp(-1, 1) if o.clip_sample else x0
            x[rows] = self.schedule.add_noise(x0, eps, self._levels(steps - 1) + self._offset)
        return x

    def backward(self, streams: Streams, iteration: int) -> dict[str, Tensor]:
        o, compute, problem, count = self.options, self.compute, self.problem, self.options.train_batch_size
        rows = compute.world.share(count)
        labels, covers = (values[rows] for values in self.conditions.draw_forgotten(streams, count))
        until = streams.timesteps("step", count, 0, o.trajectory_steps - 1)[rows]
        width = self.schedule.num_train_timesteps // o.trajectory_steps
        t = self._levels(until) + streams.timesteps("t", count, 0, width - 1)[rows]
        with torch.no_grad(), compute.autocast():
            with compute.regions("sampling"):
                z = streams.normal("z", count, problem.sample_shape)[rows]
                x_t = self._trajectory(z, until, labels, covers)
            with compute.regions("teacher"):
                empty = self._empty(problem.teacher, x_t, t, covers)
                conditional = predict(problem.teacher, self.schedule, x_t, t, labels)
        target = empty - o.negative_guidance * (conditional - empty)
        with compute.regions("forward and backward"):
            self.network.train()
            streams.seed_dropout("dropout", compute.world.rank)
            with compute.autocast():
                prediction = predict(self.network, self.schedule, x_t, t, labels)
            loss = (prediction - target).square().mean()
            loss.backward()
        return {"loss_forget": loss}


class ESD(ManyStepMethod):
    """ESD: for a forgotten condition, the network learns a prediction that leads away from it."""

    name = "esd"
    Options = ESDOptions
    forgets_prompts = True

    def __init__(self, setting: Setting, options: ESDOptions) -> None:
        super().__init__(setting, options)
        problem = setting.problem
        self.network = setting.trainable(problem.teacher)
        choose_trained(self.network, options.trained, problem.forgets_prompts)
        if problem.forgets_prompts and options.empty_prompt != "null":
            raise ValueError(f'empty_prompt is {options.empty_prompt!r}, expected "null": prompts have the empty one')
        setting.lower_teacher()
        self.phases.append(ESDPhase(setting, options, self.network))
