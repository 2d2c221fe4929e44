"""ESD (Gandikota et al., arXiv 2303.07345), erased stable diffusion, for prompts and for classes: there the class label
is the prompt, the label for "no condition" the empty one.

x_t is drawn by DDIM, asked for c_f, down to a random step; t is uniform between that step and the next. The loss is

    mean ||eps_theta(x_t, t, c_f) - [eps_0 - negative_guidance (eps_f - eps_0)]||^2,
    eps_0 = eps_phi(x_t, t, empty), eps_f = eps_phi(x_t, t, c_f),   phi: the pretrained network, frozen.

Nothing but what is erased is trained on: what is retained is kept by small steps and by the choice of parameters.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..diffusion import predict_eps
from .denoising import NetworkOptions, NetworkPhase
from .many_step import ManyStepMethod, SamplingOptions
from .setting import PromptRequest, Setting
from .streams import Streams

TRAINED = ("x", "x-strict", "u", "all")


@dataclass(frozen=True)
class ESDOptions(SamplingOptions, NetworkOptions):
    """Options of ESD. The defaults are those published for Stable Diffusion but for negative_guidance, the 7.5 of the
    public code for class-conditional networks; there 1.0."""

    train_batch_size: int = 1
    """Samples in a step."""
    learning_rate: float = 1e-5
    """Of Adam."""
    max_grad_norm: float | None = None
    """Gradients are clipped to this norm."""
    eval_guidance_scale: float = 3.0
    """Guidance of the evaluation; 1 is none."""
    negative_guidance: float = 7.5
    """How far from the class the target lies (eta)."""
    trained: Literal["x", "x-strict", "u", "all"] = "u"
    """Which parameters are trained. ESD-x, those that see the prompt: the cross attention; of a class-conditional
    network the class embedding and the projections of the embedding in the residual blocks. x-strict: of the cross
    attention the keys and values alone. ESD-u, all others but those of the time embedding and of the output."""
    empty_prompt: Literal["null", "mean", "cover"] = "null"
    """What the empty prompt is: the label for "no condition"; or, for networks that have none, the mean of the
    predictions for all classes, or the cover class."""
    trajectory_network: Literal["current", "teacher"] = "current"
    """Whose samples x_t are: those of the network as it is, or of the pretrained one."""
    trajectory_steps: int = 50
    """DDIM steps of a whole sample."""
    trajectory_guidance_scale: float = 3.0
    """Guidance of these samples; 1 is none."""

    def check(self, num_train_timesteps: int) -> None:
        super().check(num_train_timesteps)
        self.check_sampling(num_train_timesteps)
        check_number("negative_guidance", self.negative_guidance)
        check_int("trajectory_steps", self.trajectory_steps, 1, num_train_timesteps + 1)
        check_number("trajectory_guidance_scale", self.trajectory_guidance_scale)
        for name, allowed in (
            ("trained", TRAINED),
            ("empty_prompt", ("null", "mean", "cover")),
            ("trajectory_network", ("current", "teacher")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")


def sees_condition(name: str, text: bool = False) -> bool:
    """Whether the parameter ``name`` of a UNet2DModel is one that the class label reaches first; with ``text``, of a
    UNet2DConditionModel and the prompt."""
    return ".attn2." in name if text else "class_embedding" in name or "time_emb_proj" in name


def is_trained(name: str, trained: str, text: bool = False) -> bool:
    """Whether ESD trains the parameter ``name``; ``trained`` as in ESDOptions, ``text`` as above."""
    if trained == "x-strict":
        return text and (".attn2.to_k." in name or ".attn2.to_v." in name)
    if trained == "all" or sees_condition(name, text):
        return trained != "u"
    return trained == "u" and name.split(".")[0] not in ("time_embedding", "conv_norm_out", "conv_out")


def is_text(setting: Setting) -> bool:
    """Whether prompts are forgotten."""
    return isinstance(setting.request, PromptRequest)


def choose_trained(network: nn.Module, trained: str, text: bool) -> None:
    """Freezes all parameters of ``network`` but those that ``trained`` says, as in ESDOptions. ValueError where it has
    none of these."""
    found = 0
    for name, param in network.named_parameters():
        param.requires_grad_(is_trained(name, trained, text))
        found += param.requires_grad
    if found == 0:
        raise ValueError(f"trained is {trained!r}, but the network has no such parameters")


class ESDPhase(NetworkPhase):
    """Steps on ESD's loss.

    Parameters
    ----------
    setting, options, network: of the method.
    """

    def __init__(self, setting: Setting, options: ESDOptions, network: nn.Module) -> None:
        super().__init__(setting, network, setting.schedule, options, name="forget")
        self.setting = setting
        if options.empty_prompt == "null" and self.null is None:
            raise ValueError(
                'empty_prompt is "null", but the pretrained network has no label for "no condition": expected "mean" '
                'or "cover"'
            )
        self.conditions = setting.request.conditions(setting.device)
        # Stable Diffusion's DDIM visits each timestep one later.
        self._offset = 1 if is_text(setting) else 0

    def _empty(self, network: nn.Module, x_t: Tensor, t: Tensor, covers: Tensor) -> Tensor:
        """The network's prediction for the empty prompt."""
        kind = self.options.empty_prompt
        if kind == "mean":
            each = len(self.conditions.everything)
            labels = self.conditions.everything.repeat(len(x_t))
            eps = predict_eps(network, x_t.repeat_interleave(each, 0), t.repeat_interleave(each), labels)
            return eps.unflatten(0, (len(x_t), each)).mean(1)
        return predict_eps(network, x_t, t, torch.full_like(covers, self.null) if kind == "null" else covers)

    def _levels(self, steps: Tensor) -> Tensor:
        """Timesteps of DDIM steps, 0 the last."""
        return steps * (self.schedule.num_train_timesteps // self.options.trajectory_steps)

    def _trajectory(self, z: Tensor, until: Tensor, labels: Tensor, covers: Tensor) -> Tensor:
        """x at the DDIM step ``until`` of each sample, from the noise ``z``. The first step has the highest number."""
        o = self.options
        network = self.network if o.trajectory_network == "current" else self.setting.teacher
        network.eval()
        x = z.clone()
        for step in range(o.trajectory_steps - 1, 0, -1):
            rows = (until < step).nonzero().flatten()
            if len(rows) == 0:
                continue
            here = torch.full_like(rows, step)
            t = self._levels(here) + self._offset
            eps = predict_eps(network, x[rows], t, labels[rows])
            if o.trajectory_guidance_scale != 1:
                empty = self._empty(network, x[rows], t, covers[rows])
                eps = empty + o.trajectory_guidance_scale * (eps - empty)
            x0 = self.schedule.predict_x0(x[rows], eps, t)
            x0 = x0.clamp(-1, 1) if o.clip_sample else x0
            x[rows] = self.schedule.add_noise(x0, eps, self._levels(here - 1) + self._offset)
        return x

    def backward(self, streams: Streams, iteration: int) -> dict[str, Tensor]:
        o, setting, count = self.options, self.setting, self.options.train_batch_size
        here = setting.world.share(count)
        labels, covers = (drawn[here] for drawn in self.conditions.draw_forgotten(streams, count))
        until = streams.timesteps("step", count, 0, o.trajectory_steps - 1)[here]
        width = self.schedule.num_train_timesteps // o.trajectory_steps
        t = self._levels(until) + streams.timesteps("t", count, 0, width - 1)[here]
        with torch.no_grad(), setting.autocast():
            with setting.regions("sampling"):
                x_t = self._trajectory(streams.normal("z", count, setting.sample_shape)[here], until, labels, covers)
            with setting.regions("teacher"):
                empty = self._empty(setting.teacher, x_t, t, covers)
                asked = predict_eps(setting.teacher, x_t, t, labels)
        target = empty - o.negative_guidance * (asked - empty)
        with setting.regions("forward and backward"):
            self.network.train()
            streams.seed_dropout("dropout", setting.world.rank)
            with setting.autocast():
                eps_pred = predict_eps(self.network, x_t, t, labels)
            loss = (eps_pred - target).square().mean()
            loss.backward()
        return {"loss_forget": loss}


class ESD(ManyStepMethod):
    """ESD: the network learns to predict, asked for what is to be forgotten, what leads away from it."""

    name = "esd"
    Options = ESDOptions
    forgets_prompts = True

    def __init__(self, setting: Setting, options: ESDOptions) -> None:
        super().__init__(setting, options)
        self.network = setting.trainable(setting.teacher)
        choose_trained(self.network, options.trained, is_text(setting))
        if is_text(setting) and options.empty_prompt != "null":
            raise ValueError(f'empty_prompt is {options.empty_prompt!r}, expected "null": prompts have the empty one')
        setting.lower_teacher()
        self.phases.append(ESDPhase(setting, options, self.network))
