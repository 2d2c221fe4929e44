"""Losses and gradients of every parametrisation against the equations in float64."""

import pytest
import torch

from pecker_fast.robustness.relearn import _denoising
from pecker_fast.unlearning import ForgetRequest
from pecker_fast.unlearning.denoising import DenoisingOptions, DenoisingPhase
from pecker_fast.unlearning.esd import ESDPhase
from pecker_fast.unlearning.registry import method_class
from pecker_fast.unlearning.streams import Streams
from tests.diffusion.parametrisations import CONFIGS, schedule_of
from tests.diffusion.parametrisations import Oracle as Equations
from tests.unlearning.oracle import SHAPE, Oracle, UNet2DModel
from tests.unlearning.settings import setting_of
from tests.unlearning.test_equations import assert_grads, build, record_steps

T_MIN, T_MAX = 3, 35


class Network(Oracle):
    """An oracle's network behind the parametrisation ``kind``."""

    def __init__(self, kind: str, network) -> None:
        super().__init__(network)
        self.kind = kind

    def output(self, x_t, t, labels):
        equations, view = Equations(self.kind, t), (-1, 1, 1, 1)
        x = equations.inputs(x_t.double())
        times = equations.times.view(view)
        return self.w * x + self.v[labels].view(view) + self.s * times + self.u * torch.tanh(x)

    def x0(self, x_t, t, labels):
        return Equations(self.kind, t).x0(x_t.double(), self.output(x_t, t, labels))

    def sample(self, z, t_init, labels):
        equations = Equations(self.kind, torch.full((len(z),), t_init))
        x = equations.levels[1] * z.double()
        return equations.one_step(x, self.output(x, equations.t, labels))

    def loss(self, x0, eps, t, labels):
        equations = Equations(self.kind, t)
        x0, eps = x0.double(), eps.double()
        return equations.loss(x0, eps, self.output(equations.add_noise(x0, eps), t, labels)).mean()


def make_setting(kind: str, **options):
    request = ForgetRequest(4, (0,), 1)
    return setting_of(teacher=UNet2DModel(4), schedule=schedule_of(kind), request=request, seed=4, **options)


def t_init_of(kind: str) -> int:
    at = schedule_of(kind).one_step_at
    return 20 if at is None else at


@pytest.mark.parametrize("kind", CONFIGS)
def test_score_distillation(kind):
    setting, t_init = make_setting(kind), t_init_of(kind)
    method, phase, score_steps, steps = build("pecker", setting, t_init=t_init, t_min=T_MIN, t_max=T_MAX)
    phi, psi, theta = (Network(kind, n) for n in (setting.problem.teacher, method.score, method.generator))
    losses = phase.step(1)
    streams = Streams(torch.device("cpu"), 4, phase.name, 1, 0)
    batch = phase._draw(streams)
    r, labels, covers = batch.retained, batch.labels, batch.teacher_labels

    def drawn(part):
        z, eps = (streams.normal(f"{part} {name}", len(labels), SHAPE) for name in ("z", "eps"))
        return z, eps, streams.timesteps(f"{part} t", len(labels), T_MIN, T_MAX)

    z, eps, t = drawn("score")
    x = theta.sample(z, t_init, labels).detach()
    parts = slice(r), slice(r, None)
    retain, forget = (psi.loss(x[s], eps[s], t[s], labels[s]) for s in parts)
    assert_grads(score_steps[0]["grads"], psi.grads(0.8 * retain + 0.3 * forget))
    assert losses["loss_score_retain"].item() == pytest.approx(retain.item(), rel=1e-3)
    z, eps, t = drawn("generator")
    x = theta.sample(z, t_init, labels)

    def loss(s):
        x_t = Equations(kind, t[s]).add_noise(x[s], eps[s].double())
        real, fake = phi.x0(x_t, t[s], covers[s]), psi.x0(x_t, t[s], labels[s])
        omega = (real - x[s]).abs().mean((1, 2, 3), keepdim=True).detach().clamp(min=1e-5)
        # SiD's second form; the package computes the first.
        return ((-0.2 * (real - fake) ** 2 + (real - fake) * (fake - x[s])) / omega).sum((1, 2, 3)).mean()

    retain, forget = (loss(s) for s in parts)
    assert losses["loss_distill"].item() == pytest.approx(retain.item(), rel=1e-3, abs=1e-3)
    assert losses["loss_forget"].item() == pytest.approx(forget.item(), rel=1e-3, abs=1e-3)
    assert_grads(steps[0]["grads"], theta.grads(0.9 * retain))
    assert_grads(steps[0]["masked_grads"], theta.grads(0.2 * forget))


class Data:
    """Images with labels."""

    def __init__(self, count: int) -> None:
        self.images, self.labels = torch.rand(count, *SHAPE) * 2 - 1, torch.arange(count) % 4

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices):
        return self.images[indices]


@pytest.mark.parametrize("kind", CONFIGS)
def test_denoising(kind):
    setting, data = make_setting(kind), Data(6)
    options = DenoisingOptions(
        max_train_steps=1,
        train_batch_size=4,
        ema_decay=None,
        max_grad_norm=None,
        random_flip=False,
        condition_dropout=0,
    )
    network = UNet2DModel(4)
    phase = DenoisingPhase(setting.compute, network, setting.problem.schedule, data, options, name="train")
    oracle = Network(kind, network)
    streams = Streams(torch.device("cpu"), 4, "train", 0)
    loss = phase.backward(streams, 0)["loss"]
    x0, labels = phase.batches.take(0, setting.compute)
    eps = streams.normal("eps", 4, SHAPE)
    t = streams.timesteps("t", 4, 0, setting.problem.schedule.num_train_timesteps - 1)
    expected = oracle.loss(x0, eps, t, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert_grads({name: p.grad for name, p in network.named_parameters()}, oracle.grads(expected))


@pytest.mark.parametrize("kind", CONFIGS)
def test_relearning(kind):
    class Examined:
        schedule = schedule_of(kind)

    network, images, labels = UNet2DModel(4), torch.rand(3, *SHAPE), torch.tensor([0, 0, 2])
    streams = Streams(torch.device("cpu"), 8)
    t = streams.timesteps("denoising t", 3, 0, Examined.schedule.num_train_timesteps - 1)
    eps = streams.normal("denoising eps", 3, SHAPE)
    loss = _denoising(network, Examined, images, labels, streams)
    assert loss.item() == pytest.approx(Network(kind, network).loss(images, eps, t, labels).item(), rel=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_saliency(kind):
    setting, t_init = make_setting(kind), t_init_of(kind)
    method, phase, *_ = build("pecker", setting, t_init=t_init, t_min=T_MIN, t_max=T_MAX, saliency_batches=1)
    streams = Streams(torch.device("cpu"), 9, "saliency")
    masker = phase.masker
    images, labels = masker._samples(streams, method.generator)
    eps = streams.normal("eps", len(images), SHAPE)
    t = streams.timesteps("t", len(images), 0, setting.problem.schedule.num_train_timesteps - 1)
    network = method.generator if masker.options.saliency_network == "current" else setting.problem.teacher
    expected = Network(kind, network)
    assert_grads(masker.scores(streams, method.generator), expected.grads(expected.loss(images, eps, t, labels)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_esd(kind):
    """The path is that of DDIM in the schedule's levels, and the loss compares predictions."""
    setting = make_setting(kind)
    esd = method_class("esd")
    options = esd.Options(
        max_train_steps=1,
        train_batch_size=3,
        num_inference_steps=2,
        trajectory_steps=5,
        trajectory_guidance_scale=1.0,
        trajectory_network="teacher",
        negative_guidance=1.5,
        empty_prompt="cover",
        clip_sample=False,
    )
    network = UNet2DModel(4)
    phase = ESDPhase(setting, options, network)
    phase.start(None)
    steps: list = []
    record_steps(phase.optimizer, steps)
    loss = phase.step(0)["loss_forget"]
    streams = Streams(torch.device("cpu"), 4, "forget", 0)
    conditions = setting.problem.request.conditions("cpu")
    labels, covers = conditions.draw_forgotten(streams, 3)
    size = setting.problem.schedule.num_train_timesteps
    width = size // 5
    until, within = streams.timesteps("step", 3, 0, 4), streams.timesteps("t", 3, 0, width - 1)
    teacher, trained = Network(kind, setting.problem.teacher), Network(kind, network)
    rows = []
    for z, last, label in zip(streams.normal("z", 3, SHAPE), until.tolist(), labels, strict=True):
        x = z.double()[None]
        if kind not in ("epsilon", "v_prediction", "sample"):
            x = Equations(kind, torch.tensor([4 * width])).levels[1] * x
        for step in range(4, last, -1):
            now, after = (Equations(kind, torch.tensor([i * width])) for i in (step, step - 1))
            x0 = teacher.x0(x, now.t, label[None])
            x = after.add_noise(x0, (x - now.levels[0] * x0) / now.levels[1])
        rows.append(x[0].detach())
    x_t, t = torch.stack(rows), until * width + within

    def prediction(oracle, labels):
        """What ``predict`` returns: the noise of variance-preserving schedules, otherwise the output."""
        output, equations = oracle.output(x_t, t, labels), Equations(kind, t)
        if kind not in ("v_prediction", "sample"):
            return output
        a, b = equations.levels
        return (x_t - a * equations.x0(x_t, output)) / b

    empty = prediction(teacher, covers)
    target = (empty - 1.5 * (prediction(teacher, labels) - empty)).detach()
    expected = (prediction(trained, labels) - target).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert_grads(steps[0]["grads"], trained.grads(expected))
