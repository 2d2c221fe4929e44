"""Selective Amnesia on prompts: loss, gradient and Fisher information against float64, which weights change."""

import copy
import math

import pytest
import torch

from pecker_fast.diffusion import Sampler
from pecker_fast.unlearning import PromptRequest, method_class
from pecker_fast.unlearning.selective_amnesia import FisherInformation
from pecker_fast.unlearning.streams import Streams
from tests.diffusion.tiny_sd import tiny_text_network
from tests.inputs import same_bits
from tests.unlearning.oracle import SHAPE, Oracle, score_loss
from tests.unlearning.settings import setting_of
from tests.unlearning.test_equations import assert_grads, record_steps
from tests.unlearning.test_many_step_equations import antithetic
from tests.unlearning.test_prompts import REQUEST, prompt_setting

SMALL = {
    "max_train_steps": 3,
    "train_batch_size": 5,
    "max_grad_norm": None,
    "ema_decay": None,
    "loss_reduction": "mean",
    "surrogate_images": 7,
    "replay_images": 6,
    "replay_sampler": "ddim",
    "replay_steps": 2,
    "replay_guidance_scale": 2.0,
    "replay_batch_size": 5,
    "num_inference_steps": 2,
    "eval_sampler": "ddim",
    "fisher_condition_dropout": 0.0,
    "fisher_timesteps": 8,
    "fisher_chunks": 2,
}
PAIRS = {"brad pitt smiles": "a man smiles", "brad pitt": "a man"}


def options(**changes):
    return method_class("selective_amnesia").Options(**{**SMALL, **changes})


def drawn(method) -> None:
    """Run all phases but the last one, and start the last one."""
    previous = None
    for phase in method.phases:
        phase.start(previous)
        if phase is not method.phases[-1]:
            for i in range(phase.iterations):
                phase.step(i)
        previous = phase


def random_fisher(network) -> dict[str, torch.Tensor]:
    return {name: torch.rand(param.shape) for name, param in network.named_parameters()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradient(reduction):
    setting = prompt_setting(seed=3)
    fisher = random_fisher(setting.problem.teacher)
    setting = prompt_setting(seed=3, fisher=fisher, teacher_dtype=torch.float32)
    kind = method_class("selective_amnesia")
    method = kind(setting, options(loss_reduction=reduction, replay_weight=0.7, ewc_weight=50.0))
    assert [phase.name for phase in method.phases] == ["replay", "forget"]
    drawn(method)
    phase, pool = method.phases[-1], method.phases[0].pool
    request, steps = setting.problem.request, []
    record_steps(phase.optimizer, steps)
    with torch.no_grad():
        for param in method.network.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    network, teacher = Oracle(method.network), Oracle(setting.problem.teacher)
    losses = phase.step(2)
    streams = Streams(torch.device("cpu"), 3, "forget", 2)
    t, divisor = antithetic(streams, "t", 5), math.prod(SHAPE) if reduction == "mean" else 1
    # The first seven images are of cover prompts, labelled with the forgotten prompts in the request's order.
    texts = [[request.prompts[i] for i in labels] for labels in (pool.labels, pool.teacher_labels)]
    assert texts[0][:7] == (list(REQUEST["forget"]) * 3)[:7] and texts[1][:7] == (list(REQUEST["cover"]) * 3)[:7]
    assert texts[0][7:] == texts[1][7:] == ["a dog", "a cat"] * 3
    terms = {}
    for name, batches in (("forget", phase.surrogates), ("retain", phase.replayed)):
        rows = batches.indices(2)
        assert set(rows.tolist()) <= (set(range(7)) if name == "forget" else set(range(7, 13)))
        eps = streams.normal(f"{name} eps", 5, SHAPE)
        terms[name] = score_loss(network, pool.images[rows].double(), eps, t, pool.labels[rows]) / divisor
    pairs = ((network.w, teacher.w, "w"), (network.u, teacher.u, "u"))
    pairs += ((network.v, teacher.v, "class_embedding.weight"),)
    assert {name for *_, name in pairs} == set(fisher)
    terms["ewc"] = sum((fisher[name].double() * (a - b.detach()).square()).sum() for a, b, name in pairs)
    for name, value in terms.items():
        assert losses[f"loss_{name}"].item() == pytest.approx(value.item(), rel=1e-3), name
    total = terms["forget"] + 0.7 * terms["retain"] + 50.0 * terms["ewc"]
    assert_grads(steps[0]["grads"], network.grads(total))
    # Each part counts: a wrong factor of any of them would show.
    parts = (terms["forget"], terms["retain"], 50.0 * terms["ewc"])
    sizes = [max(float(g.abs().max()) for g in network.grads(part).values()) for part in parts]
    assert max(sizes) < 3000 * min(sizes)


def test_teacher_draws_the_latents(monkeypatch):
    """Cover prompts and retained prompts, drawn by the pretrained network with DDIM and guidance."""
    calls = []

    def watched(sampler, network, schedule, labels, seed):
        calls.append((network, labels.clone(), sampler, seed))
        return torch.full((len(labels), *SHAPE), float(len(calls)))

    monkeypatch.setattr(Sampler, "draw", watched)
    setting = prompt_setting(seed=3, teacher_dtype=torch.float32)
    fisher = random_fisher(setting.problem.teacher)
    setting = prompt_setting(seed=3, fisher=fisher, teacher_dtype=torch.float32)
    method = method_class("selective_amnesia")(setting, options())
    drawn(method)
    pool = method.phases[0].pool
    assert torch.equal(torch.cat([labels for _, labels, *_ in calls]), pool.teacher_labels)
    assert all(network is setting.problem.teacher for network, *_ in calls)
    (sampler,) = {sampler for *_, sampler, _ in calls}
    assert sampler == Sampler("ddim", num_inference_steps=2, guidance_scale=2.0, clip_sample=False, batch_size=5)
    assert len({seed for *_, seed in calls}) == 3
    assert pool.images[:, 0, 0, 0].tolist() == [1.0] * 5 + [2.0] * 5 + [3.0] * 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fisher_information_against_float64(reduction):
    setting = prompt_setting(seed=3)
    method = FisherInformation(setting, options(loss_reduction=reduction))
    drawn(method)
    fisher_pass, pool = method.phases[-1], method.phases[0].pool
    for i in range(fisher_pass.iterations):
        fisher_pass.step(i)
    assert [setting.problem.request.prompts[i] for i in pool.labels] == ["a dog", "a cat"] * 3
    teacher, total = Oracle(setting.problem.teacher), None
    for sample in range(6):
        streams = Streams(torch.device("cpu"), 3, "fisher", sample)
        within = torch.rand(8, generator=streams.generator("t"), dtype=torch.float64)
        t = ((torch.arange(8) + within) * 125).long()
        x0 = pool.images[sample].double().expand(8, *SHAPE)
        loss = score_loss(teacher, x0, streams.normal("eps", 8, SHAPE), t, pool.labels[sample].repeat(8)) * 1000
        loss = loss / (math.prod(SHAPE) if reduction == "mean" else 1)
        squares = {name: grad.square() for name, grad in teacher.grads(loss).items()}
        total = squares if total is None else {name: total[name] + g for name, g in squares.items()}
    assert_grads(method.fisher(), {name: value / 6 for name, value in total.items()})


def tiny(seed: int = 0, trained: str = "all", fisher: bool = True, **changes):
    request = PromptRequest(**REQUEST)
    torch.manual_seed(0)
    network = tiny_text_network(len(request.prompts))
    values = {"fisher": random_fisher(network) if fisher else None, "seed": seed, **changes}
    setting = setting_of(
        teacher=network, teacher_dtype=torch.float32, schedule=network.schedule, request=request, **values
    )
    few = {"train_batch_size": 2, "learning_rate": 1e-3, "surrogate_images": 3, "replay_images": 3}
    return method_class("selective_amnesia")(setting, options(trained=trained, **few))


@pytest.mark.parametrize("trained", ["all", "u"])
def test_frozen_weights_and_bitwise_resume(trained):
    method = tiny(trained=trained, gradient_checkpointing=True)
    started = {name: param.detach().clone() for name, param in method.setting.problem.teacher.named_parameters()}
    table = method.setting.problem.teacher.table.embeddings.clone()
    drawn(method)
    phase = method.phases[-1]
    state = None
    for i in range(3):
        if i == 1:
            state = copy.deepcopy(phase.state_dict())
        losses = phase.step(i)
    assert state["fisher"] is None and all(loss.isfinite() for loss in losses.values())
    resumed = tiny(trained=trained, gradient_checkpointing=True)
    resumed.phases[-1].load_state_dict(state)
    for i in (1, 2):
        resumed.phases[-1].step(i)
    for (name, a), b in zip(method.network.named_parameters(), resumed.network.parameters(), strict=True):
        assert same_bits(a.detach(), b.detach()), name
        frozen = trained == "u" and (
            ".attn2." in name or name.startswith(("time_embedding", "conv_norm_out", "conv_out"))
        )
        assert a.requires_grad == (not frozen) and same_bits(a.detach(), started[name]) == frozen, name
    for name, param in method.setting.problem.teacher.named_parameters():
        assert same_bits(param, started[name]) and param.grad is None
    assert same_bits(method.setting.problem.teacher.table.embeddings, table)
    assert phase._fisher.keys() == {name for name, p in method.network.named_parameters() if p.requires_grad}


def test_refusals():
    with pytest.raises(ValueError, match="fisher is not given: expected the file that pecker-fast fisher makes"):
        tiny(fisher=False)
    setting = prompt_setting(teacher_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"teacher_dtype is torch.bfloat16, but selective_amnesia holds on"):
        method_class("selective_amnesia")(setting, options())
    teacher = prompt_setting().problem.teacher
    for changed, message in (({}, "has no parameter w"), ({"w": torch.rand(2)}, "other names or shapes")):
        fisher = {name: value for name, value in random_fisher(teacher).items() if name != "w"} | changed
        with pytest.raises(ValueError, match=message):
            method_class("selective_amnesia")(prompt_setting(fisher=fisher), options())
    for name, value in (("loss_reduction", "max"), ("trained", "y"), ("surrogate_images", 0), ("replay_images", 0)):
        with pytest.raises(ValueError, match=f"{name} is"):
            method_class("selective_amnesia")(prompt_setting(fisher=fisher), options(**{name: value}))
