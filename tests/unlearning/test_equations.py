"""Gradients of an iteration against the equations in float64, and which network receives which."""

import pytest
import torch

from pecker_fast.unlearning import method_class
from pecker_fast.unlearning.masking import Masker, SaliencyOptions
from pecker_fast.unlearning.streams import Streams
from tests.unlearning.oracle import SHAPE, Affine, Oracle, generator_loss, make_setting, noised, one_step, score_loss

COMMON = {
    "max_train_steps": 3,
    "train_batch_size": 5,
    "forget_batch_size": 3,
    "t_init": 250,
    "score_retain_weight": 0.8,
    "score_forget_weight": 0.3,
    "generator_retain_weight": 0.9,
    "generator_forget_weight": 0.2,
}


def record_steps(optimizer, taken: list) -> None:
    """Record the optimizer's gradients instead of taking steps."""

    def step(mask=None, masked_grads=None):
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in zip(names, params, strict=True)}
        forget = None if masked_grads is None else dict(zip(names, masked_grads, strict=True))
        taken.append({"grads": grads, "masked_grads": forget, "mask": mask})

    optimizer.step = step


def build(name: str, setting, **options):
    kind = method_class(name)
    values = {**COMMON, **options}
    if name == "pecker":
        values.setdefault("saliency_batch_size", 6)
    method = kind(setting, kind.Options(**values))
    # Different from the teacher, so that swapped networks are noticed.
    for network in (method.score, method.generator):
        with torch.no_grad():
            for param in network.parameters():
                param.add_(0.1 * torch.randn(param.shape))
    phase = method.phases[-1]
    phase.start(None)
    score_steps, generator_steps = [], []
    record_steps(phase.score_optimizer, score_steps)
    record_steps(phase.generator_optimizer, generator_steps)
    return method, phase, score_steps, generator_steps


def draws(setting, phase, iteration: int, micro: int = 0):
    """All random numbers of an iteration, drawn again."""
    streams = Streams(setting.compute.device, setting.compute.seed, phase.name, iteration, micro)
    batch = phase._draw(streams)
    count = len(batch.labels)
    parts = {}
    for part in ("score", "generator"):
        z = streams.normal(f"{part} z", count, SHAPE)
        eps = streams.normal(f"{part} eps", count, SHAPE)
        parts[part] = z, eps, streams.timesteps(f"{part} t", count, 38, 711)
    return batch, parts


def assert_grads(grads: dict, expected: dict) -> None:
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        actual = torch.zeros_like(value) if grads[name] is None else grads[name].double()
        assert (actual - value).abs().max() <= 2e-4 * scale, (name, actual, value)
    assert scale > 1e-3


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize(("name", "forget", "cover"), [("sfd", (0,), 1), ("pecker", (0, 2), None)])
def test_both_gradients_of_an_iteration(name, forget, cover, micros):
    setting = make_setting(forget, cover, seed=5)
    method, phase, score_steps, generator_steps = build(name, setting, gradient_accumulation_steps=micros)
    teacher, score, generator = (Oracle(n) for n in (setting.problem.teacher, method.score, method.generator))
    losses = phase.step(1)
    zeros = lambda oracle: {k: torch.zeros_like(v) for k, v in oracle.grads(oracle.w * 0).items()}  # noqa: E731
    expected = {"score": zeros(score), "retain": zeros(generator), "forget": zeros(generator)}
    values = dict.fromkeys(("loss_score_retain", "loss_score_forget", "loss_distill", "loss_forget"), 0.0)
    for micro in range(micros):
        batch, parts = draws(setting, phase, 1, micro)
        r, labels, covers = batch.retained, batch.labels, batch.teacher_labels
        assert r == 5 and len(labels) == 8
        assert not set(labels[:r].tolist()) & set(forget) and set(labels[r:].tolist()) <= set(forget)
        assert torch.equal(covers[:r], labels[:r]) and not set(covers[r:].tolist()) & set(forget)
        z, eps, t = parts["score"]
        x = one_step(generator, z, 250, labels).detach()
        retain, forgotten = (score_loss(score, x[s], eps[s], t[s], labels[s]) for s in (slice(r), slice(r, None)))
        add(expected["score"], score.grads((0.8 * retain + 0.3 * forgotten) / micros))
        values["loss_score_retain"] += retain.item() / micros
        values["loss_score_forget"] += forgotten.item() / micros
        z, eps, t = parts["generator"]
        x = one_step(generator, z, 250, labels)
        both = [
            generator_loss(teacher, score, x[s], eps[s], t[s], labels[s], covers[s], 1.2)
            for s in (slice(r), slice(r, None))
        ]
        add(expected["retain"], generator.grads(0.9 * both[0] / micros))
        add(expected["forget"], generator.grads(0.2 * both[1] / micros))
        values["loss_distill"] += both[0].item() / micros
        values["loss_forget"] += both[1].item() / micros
    assert set(losses) == set(values)
    for key, value in values.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-3, abs=1e-3), key
    (score_step,), (generator_step,) = score_steps, generator_steps
    assert_grads(score_step["grads"], expected["score"])
    if name == "sfd":
        assert generator_step["mask"] is None and generator_step["masked_grads"] is None
        total = {key: expected["retain"][key] + expected["forget"][key] for key in expected["retain"]}
        assert_grads(generator_step["grads"], total)
    else:
        assert generator_step["mask"] is phase.masker.mask
        assert_grads(generator_step["grads"], expected["retain"])
        assert_grads(generator_step["masked_grads"], expected["forget"])
    # No gradients of the teacher, nor of the score network in the generator's step.
    assert all(param.grad is None for param in setting.problem.teacher.parameters())
    assert all(param.grad is None for param in method.score.parameters())
    assert all(param.requires_grad for param in method.score.parameters())


def add(total: dict, more: dict) -> None:
    for name, value in more.items():
        total[name] = total[name] + value


def test_alternate_update_takes_the_forget_gradient_first_and_masked():
    setting = make_setting(seed=2)
    method, phase, _, steps = build("pecker", setting, update="alternate")
    teacher, score, generator = (Oracle(n) for n in (setting.problem.teacher, method.score, method.generator))
    phase.step(0)
    batch, parts = draws(setting, phase, 0)
    (z, eps, t), r = parts["generator"], batch.retained
    x = one_step(generator, z, 250, batch.labels)
    assert [step["mask"] is None for step in steps] == [False, True]
    for step, part, weight in zip(steps, (slice(r, None), slice(r)), (0.2, 0.9), strict=True):
        loss = generator_loss(
            teacher, score, x[part], eps[part], t[part], batch.labels[part], batch.teacher_labels[part], 1.2
        )
        assert_grads(step["grads"], generator.grads(weight * loss))


def test_regression_loss_adds_its_gradient():
    setting = make_setting(seed=3)
    weights = {"generator_retain_weight": 0.0, "generator_forget_weight": 0.0, "regression_weight": 0.7}
    _, phase, _, steps = build("sfd", setting, **weights)
    generator = Oracle(phase.generator)
    phase.step(0)
    batch, parts = draws(setting, phase, 0)
    z, r = parts["generator"][0], batch.retained
    drawn = one_step(generator, z[r:], 250, batch.labels[r:])
    cover = one_step(generator, z[r:], 250, batch.teacher_labels[r:]).detach()
    loss = 0.7 * (drawn - cover).square().sum((1, 2, 3)).mean()
    assert_grads(steps[0]["grads"], generator.grads(loss))


@pytest.mark.parametrize("which", ["current", "initial"])
def test_saliency_gradient(which):
    setting = make_setting((0, 3), 1, seed=4)
    generator = Affine()
    options = SaliencyOptions(saliency_batch_size=4, saliency_batches=3, saliency_network=which)
    masker = Masker(setting, options, t_init=250)
    start = Oracle(generator)
    masker.start(generator)
    with torch.no_grad():
        for param in generator.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    streams = Streams(setting.compute.device, setting.compute.seed, "saliency pool")
    labels = streams.choose("labels", 12, torch.tensor([0, 3]))
    images = one_step(start, streams.normal("z", 12, SHAPE), 250, labels).detach()
    network = Oracle(generator if which == "current" else setting.problem.teacher)
    streams = Streams(setting.compute.device, setting.compute.seed, "saliency", 7)
    eps, t = streams.normal("eps", 12, SHAPE), streams.timesteps("t", 12, 0, 999)
    error = eps.double() - network.eps(noised(images, eps, t), t, labels)
    loss = error.square().sum((1, 2, 3)).mean()
    grads = masker.scores(Streams(setting.compute.device, setting.compute.seed, "saliency", 7), generator)
    assert_grads(grads, network.grads(loss))
    assert all(p.grad is None for n in (generator, setting.problem.teacher) for p in n.parameters())
    assert not any(p.requires_grad for p in setting.problem.teacher.parameters())
    assert all(p.requires_grad for p in generator.parameters())


def test_dropout_is_on_only_where_a_network_learns():
    setting = make_setting(dropout=0.3)
    method, phase, _, _ = build("pecker", setting)
    for network in (setting.problem.teacher, method.score, method.generator):
        network.modes.clear()
    phase.step(0)
    assert setting.problem.teacher.modes == [False]
    assert method.score.modes == [True, False]
    # Samples for the score network, saliency, then the retained and the forgotten batch of its own step.
    assert method.generator.modes == [False, False, True, True]
