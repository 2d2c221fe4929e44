"""Losses, gradients, masks and updates of the many-step methods, against float64 and the published order of
operations."""

import copy

import pytest
import torch
from torch import nn

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.unlearning import ForgetRequest, method_class
from pecker_fast.unlearning.replay import Pool
from pecker_fast.unlearning.streams import Streams
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits
from tests.unlearning.oracle import SHAPE, Oracle, UNet2DModel, levels, noised, score_loss
from tests.unlearning.settings import setting_of
from tests.unlearning.test_equations import assert_grads, record_steps
from tests.unlearning.test_methods import build as build_tiny
from tests.unlearning.test_methods import run, weights

NULL = 4
REPLAY = {"replay_images_per_class": 3, "replay_steps": 2, "replay_batch_size": 5, "replay_guidance_scale": 2.0}


class Watched(Pool):
    """Images that record the indices read."""

    def __init__(self, classes: int = 4, each: int = 5) -> None:
        labels = torch.arange(classes).repeat(each)
        super().__init__(labels, 2 * torch.rand(len(labels), *SHAPE) - 1)
        self.read = []

    def batch(self, indices):
        self.read.append(indices.clone())
        return super().batch(indices)


def make(name: str, *, forget=(0,), cover: int | None = 1, null: bool = True, seed: int = 3, **options):
    """A method on networks that float64 can follow. Its last phase has started on weights other than the teacher's, and
    its steps record their gradients."""
    images = Watched()
    request = ForgetRequest(4, tuple(forget), cover)
    teacher = UNet2DModel(null=null)
    setting = setting_of(
        teacher=teacher, schedule=NoiseSchedule.linear(), request=request, seed=seed, training_images=images
    )
    kind = method_class(name)
    method = kind(
        setting, kind.Options(**{"max_train_steps": 3, "train_batch_size": 5, "max_grad_norm": None, **options})
    )
    previous = None
    for phase in method.phases[:-1]:
        phase.start(previous)
        for i in range(phase.iterations):
            phase.step(i)
        previous = phase
    phase = method.phases[-1]
    phase.start(previous)
    with torch.no_grad():
        for param in method.network.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    images.read.clear()
    steps = []
    record_steps(phase.optimizer, steps)
    return method, phase, images, steps


def antithetic(streams: Streams, name: str, count: int) -> torch.Tensor:
    first = streams.timesteps(name, -(-count // 2), 0, 999)
    return torch.cat([first, 999 - first])[:count]


def dropped(streams: Streams, name: str, labels: torch.Tensor, share: float) -> torch.Tensor:
    draw = torch.rand(len(labels), generator=streams.generator(name))
    return torch.tensor([NULL if d < share else label for d, label in zip(draw.tolist(), labels.tolist(), strict=True)])


def flipped(streams: Streams, name: str, images: torch.Tensor) -> torch.Tensor:
    draw = torch.rand(len(images), generator=streams.generator(name)).tolist()
    return torch.stack([image.flip(-1) if d < 0.5 else image for d, image in zip(draw, images, strict=True)])


@pytest.mark.parametrize(("kind", "forget", "cover"), [("rl", (0,), 1), ("rl", (0, 2), None), ("ga", (3,), 1)])
def test_salun_loss_and_gradient(kind, forget, cover):
    method, phase, images, steps = make(
        "salun", forget=forget, cover=cover, forget_batch_size=6, forget_loss=kind, retain_weight=0.3, parity=True,
        condition_dropout=0.4, saliency_batch_size=4,
    )  # fmt: skip
    network = Oracle(method.network)
    losses = phase.step(2)
    streams = Streams(torch.device("cpu"), 3, "forget", 2)
    indices = images.read
    assert [len(part) for part in indices] == [6, 5]
    both = {}
    for purpose, part, count in (("forget", indices[0], 6), ("retain", indices[1], 5)):
        x0 = flipped(streams, f"{purpose} flip", images.images[part]).double()
        eps, t = streams.normal(f"{purpose} eps", count, SHAPE), antithetic(streams, f"{purpose} t", count)
        both[purpose] = x0, eps, t, images.labels[part]
    x0, eps, t, labels = both["forget"]
    assert set(labels.tolist()) == set(forget)
    condition = dropped(streams, "forget condition", labels, 0.4)
    if kind == "rl":
        covers = streams.choose("cover labels", 6, torch.tensor([1, 3] if cover is None else [cover]))
        x_t = noised(x0, eps, t)
        target = network.eps(x_t, t, dropped(streams, "cover condition", covers, 0.4)).detach()
        forgot = (target - network.eps(x_t, t, condition)).square().mean()
    else:
        forgot = -score_loss(network, x0, eps, t, condition)
    x0, eps, t, labels = both["retain"]
    assert not set(labels.tolist()) & set(forget)
    retain = score_loss(network, x0, eps, t, dropped(streams, "retain condition", labels, 0.4))
    assert losses["loss_forget"].item() == pytest.approx(forgot.item(), rel=1e-4)
    assert losses["loss_retain"].item() == pytest.approx(retain.item(), rel=1e-4)
    (step,) = steps
    assert step["mask"] is phase.mask
    assert_grads(step["grads"], network.grads(forgot + 0.3 * retain))


@pytest.mark.parametrize("limit", [None, 1.0])
def test_salun_saliency_is_the_sum_of_clipped_guided_gradients(limit):
    method, _, images, _ = make(
        "salun", saliency_batch_size=4, saliency_guidance_scale=2.5, saliency_max_grad_norm=limit, density=0.5
    )
    actual = method.phases[0].accumulator.scores
    teacher = Oracle(method.setting.problem.teacher)
    members = (images.labels == 0).nonzero().flatten()
    total, norms = None, []
    # Five images in batches of four: the last one alone is the mean of its batch.
    for i, part in enumerate((members[:4], members[4:])):
        streams = Streams(torch.device("cpu"), 3, "mask", i)
        eps, t = streams.normal("eps", 4, SHAPE)[: len(part)], antithetic(streams, "t", 4)[: len(part)]
        x_t = noised(images.images[part].double(), eps, t)
        cond, null = (teacher.eps(x_t, t, torch.full((len(part),), label)) for label in (0, NULL))
        # w = 1.5: (1 + w) eps_c - w eps_null.
        error = eps.double() - (2.5 * cond - 1.5 * null)
        grads = teacher.grads(error.square().sum((1, 2, 3)).mean())
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        norms.append(norm.item())
        if limit is not None:
            grads = {name: g * min(1.0, limit / norm.item()) for name, g in grads.items()}
        total = grads if total is None else {name: total[name] + g for name, g in grads.items()}
    assert min(norms) > 1
    assert_grads(actual, total)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_salun_mask_is_that_of_the_double_argsort(density):
    method = build_tiny("salun", teacher=tiny_unet(null_label=True), density=density)
    run(method)
    scores = torch.cat([score.flatten() for score in method.phases[0].accumulator.scores.values()])
    order = (-scores.abs()).argsort()
    published = order.argsort() < int(len(scores) * density)
    mask = method.phases[-1].mask
    mine = torch.cat([mask[name].flatten() for name, _ in method.network.named_parameters()])
    # Ties at the threshold could go either way: a continuous gradient has none but zeros.
    assert torch.equal(mine, published) and mask.density == pytest.approx(density, abs=1e-3)


@pytest.mark.parametrize("parity", [True, False])
def test_salun_steps_are_adam_on_masked_gradients_and_freeze_the_rest(parity):
    """The published order by hand: backward, clip by norm, multiply by the mask, torch's Adam. Ours clips by the norm
    of the masked gradient."""
    teacher = tiny_unet(null_label=True)
    options = {"parity": parity, "max_grad_norm": 0.05, "density": 0.3, "ema_decay": None}
    method, again = (build_tiny("salun", teacher=teacher, **options) for _ in range(2))
    before = weights(method.network)
    run(method)
    first, last = again.phases
    first.start(None)
    for i in range(first.iterations):
        first.step(i)
    last.start(first)
    params = list(again.network.parameters())
    masks = [last.mask[name].float() for name, _ in again.network.named_parameters()]
    adam = torch.optim.Adam(params, lr=1e-3)
    for i in range(last.iterations):
        adam.zero_grad()
        last.backward(Streams(torch.device("cpu"), 0, "forget", i), i)
        if parity:
            assert nn.utils.clip_grad_norm_(params, 0.05) > 0.05
        for param, mask in zip(params, masks, strict=True):
            param.grad *= mask
        if not parity:
            assert nn.utils.clip_grad_norm_(params, 0.05) > 0.05
        adam.step()
    for param, other, old, mask in zip(method.network.parameters(), params, before, masks, strict=True):
        assert same_bits(param.detach()[mask == 0], old[mask == 0])
        assert (param - other).abs().max() <= 2e-5, "a step is 1e-3"
    moved = sum(int((a != b).sum()) for a, b in zip(weights(method.network), before, strict=True))
    assert moved > 0.9 * last.mask.count


def test_selective_amnesia_loss_and_gradient():
    method, phase, _, steps = make(
        "selective_amnesia", forget=(0, 2), cover=None, replay_weight=0.7, ewc_weight=1e-6, fisher_timesteps=7,
        fisher_chunks=2, **REPLAY,
    )  # fmt: skip
    network, teacher = Oracle(method.network), Oracle(method.setting.problem.teacher)
    fisher = {name: value.double() for name, value in method.phases[1].fisher().items()}
    assert min(float(value.max()) for value in fisher.values()) > 0
    losses = phase.step(1)
    streams = Streams(torch.device("cpu"), 3, "forget", 1)
    pool = method.phases[0].pool
    assert 0 < pool.images.abs().max() <= 1
    part = phase.replayed.indices(1)
    assert set(pool.labels[part].tolist()) <= {1, 3}
    t = antithetic(streams, "t", 5)
    noise = 2 * torch.rand((5, *SHAPE), generator=streams.generator("surrogate")).double() - 1
    forgotten = streams.choose("forget labels", 5, torch.tensor([0, 2]))
    forgot = score_loss(network, noise, streams.normal("forget eps", 5, SHAPE), t, forgotten)
    retain = score_loss(
        network, pool.images[part].double(), streams.normal("retain eps", 5, SHAPE), t, pool.labels[part]
    )
    pairs = ((network.w, teacher.w, "w"), (network.u, teacher.u, "u"))
    pairs += ((network.v, teacher.v, "class_embedding.weight"),)
    penalty = sum((fisher[name] * (a - b.detach()).square()).sum() for a, b, name in pairs)
    for name, value in (("loss_forget", forgot), ("loss_retain", retain), ("loss_ewc", penalty)):
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-3), name
    assert_grads(steps[0]["grads"], network.grads(forgot + 0.7 * retain + 1e-6 * penalty))
    # Both parts matter: a wrong factor of either would show.
    sizes = [
        max(float(g.abs().max()) for g in network.grads(part).values()) for part in (forgot + retain, 1e-6 * penalty)
    ]
    assert max(sizes) < 300 * min(sizes)


@pytest.mark.parametrize(("timesteps", "chunks"), [(1000, 3), (40, 4)])
def test_fisher_is_the_square_of_the_gradient_of_the_sum_over_timesteps(timesteps, chunks):
    method, *_ = make(
        "selective_amnesia", fisher_samples=6, fisher_batch_size=2, fisher_timesteps=timesteps, fisher_chunks=chunks,
        fisher_condition_dropout=0.2, **REPLAY,
    )  # fmt: skip
    teacher, pool = Oracle(method.setting.problem.teacher), method.phases[0].pool
    total = None
    for sample in range(6):
        streams = Streams(torch.device("cpu"), 3, "fisher", sample)
        t = torch.arange(1000)
        if timesteps < 1000:
            within = torch.rand(timesteps, generator=streams.generator("t"), dtype=torch.float64)
            t = ((torch.arange(timesteps) + within) * 1000 / timesteps).long()
            assert (t // (1000 // timesteps)).tolist() == list(range(timesteps))
        labels = dropped(streams, "condition", pool.labels[sample].repeat(timesteps), 0.2)
        eps = streams.normal("eps", timesteps, SHAPE)
        x0 = pool.images[sample].double().expand(timesteps, *SHAPE)
        loss = score_loss(teacher, x0, eps, t, labels) * 1000
        squares = {name: grad.square() for name, grad in teacher.grads(loss).items()}
        total = squares if total is None else {name: total[name] + g for name, g in squares.items()}
    assert_grads(method.phases[1].fisher(), {name: value / 6 for name, value in total.items()})


@pytest.mark.parametrize("kind", ["current", "teacher"])
@pytest.mark.parametrize("empty", ["null", "mean", "cover"])
def test_esd_loss_and_gradient(kind, empty):
    method, phase, _, steps = make(
        "esd", forget=(0, 2), cover=None, empty_prompt=empty, trajectory_network=kind, trajectory_steps=8,
        trajectory_guidance_scale=2.0, negative_guidance=1.5, trained="all", null=empty == "null",
        eval_guidance_scale=1.0,
    )  # fmt: skip
    network, teacher = Oracle(method.network), Oracle(method.setting.problem.teacher)
    losses = phase.step(4)
    streams = Streams(torch.device("cpu"), 3, "forget", 4)
    labels = streams.choose("forget labels", 5, torch.tensor([0, 2]))
    covers = streams.choose("cover labels", 5, torch.tensor([1, 3]))
    until, within = streams.timesteps("step", 5, 0, 7), streams.timesteps("t", 5, 0, 124)

    def empty_eps(oracle, x, t, covers):
        if empty == "mean":
            return sum(oracle.eps(x, t, torch.full_like(t, c)) for c in range(4)) / 4
        return oracle.eps(x, t, torch.full_like(t, NULL) if empty == "null" else covers)

    drawn = []
    walker = network if kind == "current" else teacher
    for z, last, label, cover in zip(streams.normal("z", 5, SHAPE), until, labels, covers, strict=True):
        x, label, cover = z.double()[None], label[None], cover[None]
        for step in range(7, int(last), -1):
            t, following = torch.tensor([step * 125]), torch.tensor([step * 125 - 125])
            (a, b), (a2, b2) = levels(t), levels(following)
            none = empty_eps(walker, x, t, cover)
            eps = none + 2.0 * (walker.eps(x, t, label) - none)
            x = a2 * (x - b * eps) / a + b2 * eps
        drawn.append(x[0].detach())
    x_t, t = torch.stack(drawn), until * 125 + within
    none, cond = empty_eps(teacher, x_t, t, covers), teacher.eps(x_t, t, labels)
    target = (none - 1.5 * (cond - none)).detach()
    loss = (network.eps(x_t, t, labels) - target).square().mean()
    assert losses["loss_forget"].item() == pytest.approx(loss.item(), rel=1e-3)
    assert_grads(steps[0]["grads"], network.grads(loss))


def test_esd_trained_parameters():
    for kind in ("x", "u", "all"):
        method = build_tiny("esd", teacher=tiny_unet(null_label=True), trained=kind)
        before = weights(method.network)
        run(method)
        conditional, outside = {id(p) for p in method.network.class_embedding.parameters()}, set()
        for module in method.network.modules():
            if hasattr(module, "time_emb_proj"):
                conditional |= {id(p) for p in module.time_emb_proj.parameters()}
        for part in (method.network.time_embedding, method.network.conv_norm_out, method.network.conv_out):
            outside |= {id(p) for p in part.parameters()}
        for (name, param), old in zip(method.network.named_parameters(), before, strict=True):
            member = {"x": id(param) in conditional, "u": id(param) not in conditional | outside, "all": True}[kind]
            assert param.requires_grad == member and same_bits(param.detach(), old) == (not member), (kind, name)


def test_retrain_never_sees_the_class_and_starts_afresh():
    images = Watched()
    images.images = images.images[:, :1].repeat(1, 1, 3, 3)[:, :, :8, :8]
    teacher = tiny_unet(num_classes=4, null_label=True)
    request = ForgetRequest.of(teacher, [1, 2], None)
    setting = setting_of(teacher=teacher, schedule=NoiseSchedule.linear(), request=request, training_images=images)
    kind = method_class("retrain")
    method = kind(setting, kind.Options(max_train_steps=9, train_batch_size=4, condition_dropout=0.0))
    start = copy.deepcopy(method.network)
    assert all(
        a.shape == b.shape and (a.ndim == 1 or not torch.equal(a, b))
        for a, b in zip(start.parameters(), teacher.parameters(), strict=True)
    )
    phase = method.phases[0]
    phase.start(None)
    for i in range(9):
        phase.step(i)
    indices = torch.cat(images.read)
    assert set(images.labels[indices].tolist()) == {0, 3}
    # Whole epochs: 36 reads of ten images.
    assert (
        sorted(indices.bincount(minlength=20)[torch.isin(images.labels, torch.tensor([0, 3]))].tolist())
        == [3] * 4 + [4] * 6
    )
    rows, first = method.network.class_embedding.weight.detach(), start.class_embedding.weight.detach()
    assert same_bits(rows[[1, 2, 4]], first[[1, 2, 4]]) and not torch.equal(rows[[0, 3]], first[[0, 3]])
