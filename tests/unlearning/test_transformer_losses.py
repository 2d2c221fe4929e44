"""Score distillation of transformers with flow matching against the equations in float64."""

import copy

import pytest
import torch

from pecker_fast.diffusion import PromptTable, TextConditioned
from pecker_fast.diffusion.conditioning import EMBEDDINGS, Conditioning
from pecker_fast.models import schedule_from_config
from pecker_fast.unlearning.streams import Streams
from tests.models.tiny_transformers import LATENTS, SIZE, WIDTH, sana_transformer, sd3_transformer
from tests.unlearning.test_equations import record_steps
from tests.unlearning.test_prompts import make_text

PROMPTS, TOKENS = 8, 6
SCHEDULERS = {
    "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "sana-sprint": {"_class_name": "SCMScheduler"},
}


def build(kind: str) -> TextConditioned:
    schedule = schedule_from_config(SCHEDULERS[kind])
    if kind == "sd3":
        embeddings = {EMBEDDINGS: torch.randn(PROMPTS, TOKENS, 2 * WIDTH)}
        embeddings["pooled_projections"] = torch.randn(PROMPTS, 2 * WIDTH)
        return TextConditioned(sd3_transformer(), PromptTable(Conditioning(embeddings)), schedule)
    mask = torch.ones(PROMPTS, TOKENS)
    mask[::2, 4:] = 0
    embeddings = {EMBEDDINGS: torch.randn(PROMPTS, TOKENS, WIDTH), "encoder_attention_mask": mask}
    embeddings["guidance"] = torch.full((PROMPTS,), 0.45)
    return TextConditioned(sana_transformer(), PromptTable(Conditioning(embeddings)), schedule)


class Exact:
    """A network in float64: its velocity at x_s, with guidance, from its own formula."""

    def __init__(self, kind: str, network: TextConditioned) -> None:
        self.kind, self.module, self.table = kind, copy.deepcopy(network.unet).double(), network.table

    def sigma(self, t):
        if self.kind == "sd3":
            s = (t.double() + 1) / 1000
            s = 3 * s / (1 + 2 * s)
        else:
            angle = (t.double() + 1) / 1000 * torch.pi / 2
            s = angle.sin() / (angle.sin() + angle.cos())
        return s.view(-1, 1, 1, 1)

    def _velocity(self, x, t, labels):
        times = self.sigma(t).flatten() * (1000 if self.kind == "sd3" else 1)
        condition = self.table[labels].to(dtype=torch.float64).keywords()
        return self.module(hidden_states=x, timestep=times, **condition, return_dict=False)[0]

    def velocity(self, x, t, labels, scale=1.0):
        conditional = self._velocity(x, t, labels)
        if scale == 1:
            return conditional
        null = self._velocity(x, t, torch.zeros_like(labels))
        return null + scale * (conditional - null)

    def x0(self, x, t, labels, scale=1.0):
        return x - self.sigma(t) * self.velocity(x, t, labels, scale)


@pytest.mark.parametrize(("kind", "scale"), [("sd3", 4.5), ("sana-sprint", 1.0)])
def test_losses_and_gradients(kind, scale):
    teacher = build(kind)
    guidance = dict.fromkeys(("score_guidance_scale", "score_eval_guidance_scale", "teacher_guidance_scale"), scale)
    options = {"t_init": 999, "gradient_accumulation_steps": 1, "condition_dropout": 0.0, **guidance}
    options |= {"negative_roles": (False, False, False), "alpha": 1.0}
    method = make_text("sfd", teacher, **options)
    for network in (method.score, method.generator):
        with torch.no_grad():
            for param in network.parameters():
                param.add_(0.02 * torch.randn(param.shape))
    phase = method.phases[-1]
    phase.start(None)
    score_steps, steps = [], []
    record_steps(phase.score_optimizer, score_steps)
    record_steps(phase.generator_optimizer, steps)
    losses = phase.step(0)
    phi, psi, theta = (Exact(kind, n) for n in (method.setting.problem.teacher, method.score, method.generator))
    compute, o = method.setting.compute, method.options
    streams = Streams(compute.device, compute.seed, phase.name, 0, 0)
    batch = phase._draw(streams)
    r, labels, covers = batch.retained, batch.labels, batch.teacher_labels
    parts = slice(r), slice(r, None)

    def drawn(part):
        z, eps = (streams.normal(f"{part} {n}", len(labels), (LATENTS, SIZE, SIZE)).double() for n in ("z", "eps"))
        return z, eps, streams.timesteps(f"{part} t", len(labels), o.t_min, o.t_max)

    # The generator at pure noise, s = 1: x = z - v.
    z, eps, t = drawn("score")
    last = torch.full((len(z),), 999)
    x = (z - theta.velocity(z, last, labels)).detach()
    s = psi.sigma(t)
    error = (eps - x) - psi.velocity((1 - s) * x + s * eps, t, labels, scale)
    terms = error.square().sum((1, 2, 3))
    score = [terms[part].mean() for part in parts]
    assert losses["loss_score_retain"].item() == pytest.approx(score[0].item(), rel=1e-3)
    assert losses["loss_score_forget"].item() == pytest.approx(score[1].item(), rel=1e-3)
    compare(score_steps[0], psi, o.score_retain_weight * score[0] + o.score_forget_weight * score[1])
    z, eps, t = drawn("generator")
    x, s = z - theta.velocity(z, last, labels), psi.sigma(t)
    x_t = (1 - s) * x + s * eps
    real, fake = phi.x0(x_t, t, covers, scale), psi.x0(x_t, t, labels, scale)
    omega = (real - x).abs().mean((1, 2, 3), keepdim=True).detach()
    terms = ((real - fake) * (fake - x) / omega).sum((1, 2, 3))
    distil, forget = (terms[part].mean() for part in parts)
    assert losses["loss_distill"].item() == pytest.approx(distil.item(), rel=2e-3, abs=1e-3)
    assert losses["loss_forget"].item() == pytest.approx(forget.item(), rel=2e-3, abs=1e-3)
    compare(steps[0], theta, o.generator_retain_weight * distil + o.generator_forget_weight * forget)


def compare(step: dict, network: Exact, loss) -> None:
    """Gradients of an optimizer's step against those of the loss in float64."""
    names, params = zip(*network.module.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    scale = max(float(grad.abs().max()) for grad in expected if grad is not None)
    assert scale > 1e-3
    for name, grad in zip(names, expected, strict=True):
        actual = step["grads"][name]
        actual = torch.zeros(()) if actual is None else actual.double()
        grad = torch.zeros(()) if grad is None else grad
        assert (actual - grad).abs().max() <= 2e-3 * scale, name
