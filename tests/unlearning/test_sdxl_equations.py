"""An iteration on Stable Diffusion XL against the equations in float64, for every kind of published generator."""

import copy

import pytest
import torch
from torch import Tensor

from pecker_fast.diffusion.conditioning import EMBEDDINGS, POOLED, TIME_IDS
from pecker_fast.unlearning import PromptRequest
from pecker_fast.unlearning.streams import Streams
from tests.diffusion.tiny_sdxl import LATENTS, SIZE, tiny_xl_network, tiny_xl_unet, xl_scheduler
from tests.unlearning.settings import setting_of
from tests.unlearning.test_equations import assert_grads, build

REQUEST = PromptRequest(("a dog", "a cat"), ("brad pitt", "brad pitt smiles"), ("a man", "a man smiles"))
SHAPE = (LATENTS, SIZE, SIZE)


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """a_t and b_t of SDXL's schedule, (B, 1, 1, 1)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


class Double:
    """A U-Net in float64, called as SDXL's pipeline calls it."""

    def __init__(self, network) -> None:
        self.unet = copy.deepcopy(network.unet).double().requires_grad_(True)
        self.tensors = {name: value.double() for name, value in network.table.conditioning.items()}

    def output(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        text, pooled, sizes = (self.tensors[name][labels] for name in (EMBEDDINGS, POOLED, TIME_IDS))
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=added).sample

    def grads(self, loss: Tensor) -> dict[str, Tensor]:
        names, params = zip(*self.unet.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, params, retain_graph=True), strict=True))


# How x_0 follows from z and the output y of the U-Net at timestep t: as the generators' pages say.
DRAWN = {
    "plain": (625, {}, lambda a, b, z: b * z, lambda a, b, x, y: (x - b * y) / a),
    "lightning": (999, {"prediction_type": "sample"}, lambda a, b, z: b * z, lambda a, b, x, y: y),
    "dmd2": (399, {"unit_noise": True}, lambda a, b, z: z, lambda a, b, x, y: (x - b * y) / a),
    "v": (999, {"prediction_type": "v_prediction"}, lambda a, b, z: b * z, lambda a, b, x, y: a * x - b * y),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_losses_and_gradients(kind):
    t_init, how, start, finish = DRAWN[kind]
    teacher = tiny_xl_network(len(REQUEST.prompts))
    generator = teacher.like(tiny_xl_unet(), **how)
    setting = setting_of(
        teacher=teacher, schedule=teacher.schedule, request=REQUEST, initial_generator=generator, seed=3
    )
    options = {"t_init": t_init, "teacher_guidance_scale": 2.5, "train_batch_size": 2, "forget_batch_size": 2}
    method, phase, score_steps, generator_steps = build("pecker", setting, **options)
    assert (method.generator.prediction_type, method.generator.unit_noise) == (
        how.get("prediction_type", "epsilon"),
        how.get("unit_noise", False),
    )
    assert (method.score.prediction_type, method.score.unit_noise) == ("epsilon", False)
    phi, psi, theta = (Double(network) for network in (setting.problem.teacher, method.score, method.generator))
    losses = phase.step(0)
    streams = Streams(setting.compute.device, setting.compute.seed, phase.name, 0, 0)
    batch = phase._draw(streams)
    r, labels, covers, count = batch.retained, batch.labels, batch.teacher_labels, len(batch.labels)
    parts = slice(r), slice(r, None)

    def drawn(z: Tensor) -> Tensor:
        t = torch.full((count,), t_init)
        a, b = levels(t)
        x = start(a, b, z.double())
        return finish(a, b, x, theta.output(x, t, labels))

    z, eps = (streams.normal(f"score {name}", count, SHAPE) for name in ("z", "eps"))
    t = streams.timesteps("score t", count, 38, 711)
    a, b = levels(t)
    x_t = a * drawn(z).detach() + b * eps.double()
    errors = (eps.double() - psi.output(x_t, t, labels)).square().sum((1, 2, 3))
    score = [errors[part].mean() for part in parts]
    assert_grads(score_steps[0]["grads"], psi.grads(0.8 * score[0] + 0.3 * score[1]))

    z, eps = (streams.normal(f"generator {name}", count, SHAPE) for name in ("z", "eps"))
    t = streams.timesteps("generator t", count, 38, 711)
    a, b = levels(t)
    x = drawn(z)
    x_t = a * x + b * eps.double()
    null = torch.zeros(count, dtype=torch.int64)
    guided = -1.5 * phi.output(x_t, t, null) + 2.5 * phi.output(x_t, t, covers)
    x_phi, x_psi = (x_t - b * guided) / a, (x_t - b * psi.output(x_t, t, labels)) / a
    omega = (x_phi - x).abs().mean((1, 2, 3), keepdim=True).detach().clamp(min=1e-5)
    d = x_phi - x_psi
    terms = ((d * (x_phi - x) - 1.2 * d * d) / omega).sum((1, 2, 3))
    distill = [terms[part].mean() for part in parts]
    assert_grads(generator_steps[0]["grads"], theta.grads(0.9 * distill[0]))
    assert_grads(generator_steps[0]["masked_grads"], theta.grads(0.2 * distill[1]))
    expected = {"loss_score_retain": score[0], "loss_score_forget": score[1]}
    expected |= {"loss_distill": distill[0], "loss_forget": distill[1]}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-3), name


def test_the_levels_are_those_of_the_scheduler():
    alphas = xl_scheduler().alphas_cumprod.double()
    assert torch.allclose(levels(torch.arange(1000))[0].flatten() ** 2, alphas, rtol=1e-5)
