"""Whole small runs of every method, on random weights."""

import copy
from dataclasses import fields

import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.unlearning import ForgetRequest, method_class, method_names
from pecker_fast.unlearning.replay import Pool
from pecker_fast.unlearning.streams import Streams
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits
from tests.unlearning.settings import setting_of

SMALL = {"max_train_steps": 6, "train_batch_size": 4, "forget_batch_size": 3, "t_init": 250}
SMALL |= {
    "saliency_batch_size": 5,
    "saliency_chunks": 2,
    "mask_refresh_steps": 2,
    "num_inference_steps": 3,
    "trajectory_steps": 4,
}
SMALL |= {"replay_images_per_class": 3, "replay_steps": 2, "replay_batch_size": 4}
SMALL |= {"fisher_samples": 6, "fisher_timesteps": 6, "fisher_chunks": 2}
FAST = {"score_learning_rate": 1e-3, "generator_learning_rate": 1e-3, "learning_rate": 1e-3, "ema_decay": 0.5}


def training_images(classes: int = 3, each: int = 4) -> Pool:
    """Images of each class in turn, with features of their class."""
    labels = torch.arange(classes).repeat(each)
    generator = torch.Generator().manual_seed(0)
    images = 0.2 * torch.rand((len(labels), 1, 8, 8), generator=generator) + 0.3 * labels.view(-1, 1, 1, 1) - 0.5
    return Pool(labels, images)


def build(name: str, *, cover: int | None = 1, seed: int = 0, teacher=None, forget_images=None, **options):
    unet = copy.deepcopy(teacher) if teacher is not None else tiny_unet()
    request = ForgetRequest.of(unet, [0], cover)
    data = {"training_images": training_images()}
    if forget_images is not None:
        data |= dict(zip(("forget_images", "forget_labels"), forget_images, strict=True))
    setting = setting_of(teacher=unet, schedule=NoiseSchedule.linear(), request=request, seed=seed, **data)
    kind = method_class(name)
    known = {item.name for item in fields(kind.Options)}
    common = {key: value for key, value in {**SMALL, **FAST}.items() if key in known}
    return kind(setting, kind.Options(**{**common, **kind.defaults, **options}))


def run(method, until: int | None = None):
    previous = None
    for phase in method.phases:
        phase.start(previous)
        for i in range(phase.iterations if until is None else until):
            losses = phase.step(i)
        previous = phase
    return losses


def weights(network) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def trained(method) -> list[torch.Tensor]:
    """The weights that a method trains."""
    names = [name for name in ("score", "generator", "network") if hasattr(method, name)]
    return [weight for name in names for weight in weights(getattr(method, name))]


VARIANTS = [
    ("sfd", {}),
    ("sfd", {"two_stage": True, "first_stage_steps": 3}),
    ("sfd", {"regression_weight": 0.5, "gradient_accumulation_steps": 2, "lr_scheduler": "linear"}),
    ("pecker", {}),
    ("relabel", {"t_init": None}),
    ("pecker", {"update": "alternate", "mask_refresh_steps": 0}),
    ("pecker", {"mask_scope": "all", "saliency_network": "initial"}),
    ("pecker", {"mask_scope": "all", "mask_refresh_steps": 0, "adam_beta1": 0.9}),
    ("pecker", {"saliency_samples": "current", "saliency_batches": 2, "density": None, "threshold": 0.5}),
    ("pecker", {"saliency_samples": "teacher", "ema_decay": None, "max_grad_value": None, "adam_beta1": 0.9}),
    ("pecker", {"saliency_score": "magnitude", "mask_refresh_steps": 2}),
    ("pecker", {"saliency_score": "random", "density": 0.3, "mask_refresh_steps": 2}),
    ("pecker+", {"gradient_accumulation_steps": 2}),
    ("patch", {}),
    (
        "patch",
        {"density": 0.5, "score_density": 0.5, "saliency_score": "gradient", "act_on": ("body",), "adam_beta1": 0.9},
    ),
    ("sfd", {"destroy": "reset", "destroy_share": 0.5}),
    ("patch", {"destroy": "noise", "score_density": 0.5, "destroy_share": 0.05, "destroy_score": "random"}),
    ("patch", {"destroy": "shrink", "destroy_within": "all", "destroy_dense": True, "adam_beta1": 0.9}),
    ("retrain", {"lr_scheduler": "cosine"}),
    ("salun", {}),
    ("salun", {"forget_loss": "ga", "parity": True, "images": "generated", "ema_decay": None}),
    ("selective_amnesia", {}),
    ("selective_amnesia", {"fisher_batch_size": 2, "replay_sampler": "ddim", "adam_beta1": 0.0}),
    ("esd", {}),
    ("esd", {"trained": "x", "empty_prompt": "mean", "trajectory_network": "teacher", "ema_decay": None}),
    ("esd", {"trained": "all", "empty_prompt": "cover", "clip_sample": True}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_runs_repeat_and_resume_bit_for_bit(name, options):
    # One block, because each variant runs three times.
    teacher = tiny_unet(dropout=0.1, null_label=True, block_out_channels=(4,), attention_resolutions=(8,))
    pretrained = weights(teacher)
    method = build(name, teacher=teacher, **options)
    start = trained(method)
    losses = run(method)
    assert all(loss.isfinite() for loss in losses.values()) and all(phase.is_finite() for phase in method.phases)
    with method.phases[-1].averaged() as one:
        assert not one.training
        averaged = weights(one)
        labels = torch.tensor([0, 1, 2, 1])
        images = method.sampler.draw(one, method.setting.problem.schedule, labels, 3)
    assert images.shape == (4, 1, 8, 8) and images.abs().max() <= 1
    assert method.sampler.summary()["sampling_steps"] == (3 if hasattr(method, "network") else 1)
    # Again, but stopped after the third iteration of a phase and resumed by another object.
    for stopped in range(len(method.phases)):
        again, resumed = (build(name, teacher=teacher, **options) for _ in range(2))
        previous = None
        for phase in again.phases[: stopped + 1]:
            phase.start(previous)
            for i in range(phase.iterations if phase is not again.phases[stopped] else min(3, phase.iterations)):
                phase.step(i)
            previous = phase
        state = copy.deepcopy(previous.state_dict())
        torch.manual_seed(12345)
        for index, phase in enumerate(resumed.phases[stopped:], stopped):
            if index == stopped:
                phase.load_state_dict(state)
            else:
                phase.start(resumed.phases[index - 1])
            for i in range(3 if index == stopped else 0, phase.iterations):
                phase.step(i)
        assert all(same_bits(a, b) for a, b in zip(trained(method), trained(resumed), strict=True))
        with resumed.phases[-1].averaged() as two:
            assert all(same_bits(a, b) for a, b in zip(averaged, weights(two), strict=True))
        assert method.phases[-1].describe() == resumed.phases[-1].describe()
        masks = [each.phases[-1].last_mask() for each in (method, resumed)]
        assert masks[0] is masks[1] is None or (
            masks[0].equal(masks[1]) and masks[0].threshold == masks[1].threshold is not None
        )
    assert all(same_bits(a, b) for a, b in zip(pretrained, weights(method.setting.problem.teacher), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(start, trained(method), strict=True)]
    # ESD-x trains a few parameters only, relabel edits one.
    assert any(moved) if options.get("trained") == "x" or name == "relabel" else sum(moved) > len(moved) / 2


def test_initial_networks():
    teacher, generator, score = tiny_unet(), tiny_unet(), tiny_unet()
    request, kind = ForgetRequest.of(teacher, [0], 1), method_class("sfd")
    common = {"teacher": teacher, "schedule": NoiseSchedule.linear(), "request": request}
    setting = setting_of(initial_generator=generator, initial_score=score, **common)
    method = kind(setting, kind.Options(train_batch_size=4, forget_batch_size=3, t_init=250))
    starts = ((method.generator, generator), (method.score, score), (setting.problem.teacher, teacher))
    for network, start in starts:
        assert all(same_bits(a, b) for a, b in zip(weights(network), weights(start), strict=True))
    before = weights(generator)
    run(method, until=1)
    assert not same_bits(weights(method.generator)[0], before[0])
    assert all(same_bits(a, b) for a, b in zip(before, weights(generator), strict=True))
    with pytest.raises(ValueError, match="initial_score is a network of another architecture"):
        setting_of(initial_score=torch.nn.Linear(2, 2), **common)


def test_another_seed_gives_another_run():
    teacher = tiny_unet()
    a, b = build("pecker", teacher=teacher, seed=1), build("pecker", teacher=teacher, seed=2)
    run(a), run(b)
    assert not torch.equal(weights(a.generator)[0], weights(b.generator)[0])


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"split_batches": True}])
def test_forget_gradient_moves_only_salient_entries(options):
    method = build("pecker", generator_retain_weight=0.0, mask_refresh_steps=0, density=0.2, **options)
    before = weights(method.generator)
    run(method)
    phase = method.phases[0]
    mask = phase.masker.mask
    assert mask.density == pytest.approx(0.2, abs=0.01)
    moved = 0
    for (name, param), old in zip(method.generator.named_parameters(), before, strict=True):
        outside = ~mask[name]
        assert same_bits(param.detach()[outside], old[outside]), name
        moved += int((param.detach() != old).sum())
    assert moved > 0.5 * mask.count


def test_mask_scope_all_freezes_the_rest():
    method = build("pecker", mask_scope="all", mask_refresh_steps=0, density=0.3, adam_beta1=0.9)
    before = weights(method.generator)
    run(method)
    mask = method.phases[0].masker.mask
    for (name, param), old in zip(method.generator.named_parameters(), before, strict=True):
        assert same_bits(param.detach()[~mask[name]], old[~mask[name]]), name
    # One mask throughout: only its entries have moments.
    moments = [state["exp_avg_sq"] for state in method.phases[0].generator_optimizer.state.values()]
    assert sum(moment.numel() for moment in moments) == mask.count
    assert method.phases[0].generator_optimizer.sparsity_stats()["touched_ever"] <= 0.31


def test_full_density_is_sfd():
    # Zero magnitudes are never salient; all others are, so the gradients add up to SFD's.
    teacher = tiny_unet(dropout=0.0)
    sfd = build("sfd", teacher=teacher)
    pecker = build("pecker", teacher=teacher, density=1.0)
    a, b = run(sfd, until=1), run(pecker, until=1)
    for name in a:
        assert a[name].item() == pytest.approx(b[name].item(), rel=1e-4, abs=1e-4), name
    assert pecker.phases[0].masker.mask.density > 0.95


def test_masks_are_refreshed_when_they_are_due_and_logged():
    method = build("pecker", mask_refresh_steps=3)
    phase = method.phases[0]
    phase.start(None)
    masks = []
    for i in range(6):
        phase.step(i)
        masks.append(phase.masker.mask)
    assert masks[0] is masks[1] is masks[2] and masks[3] is masks[5] and masks[0] is not masks[3]
    record = phase.describe()
    assert record["mask_iou"] == masks[0].iou(masks[3]) and record["mask_density"] == pytest.approx(0.5, abs=0.01)
    assert record["mask_touched_ever"] == (masks[0] | masks[3]).density
    salient = sum(int(masks[3][name].sum()) for name in masks[3].names if name.startswith("down_blocks.0."))
    entries = sum(p.numel() for name, p in method.generator.named_parameters() if name.startswith("down_blocks.0."))
    assert record["mask_density_by_module"]["down_blocks.0"] == pytest.approx(salient / entries)


def test_two_stages_hand_over_the_average_and_keep_the_teacher():
    method = build("sfd", two_stage=True, first_stage_steps=3)
    first, second = method.phases
    assert [first.name, second.name] == ["distil", "forget"]
    first.start(None)
    for i in range(3):
        losses = first.step(i)
    # All classes are retained in the first stage.
    drawn = [label for i in range(20) for label in first._draw(Streams(torch.device("cpu"), i)).labels.tolist()]
    assert set(losses) == {"loss_score_retain", "loss_distill"} and set(drawn) == {0, 1, 2}
    score = weights(method.score)
    with first.averaged() as network:
        averaged = weights(network)
    second.start(first)
    assert all(same_bits(a, b) for a, b in zip(averaged, weights(method.generator), strict=True))
    assert all(same_bits(a, b) for a, b in zip(score, weights(method.score), strict=True))
    assert second.setting.problem.teacher is first.setting.problem.teacher is method.setting.problem.teacher


def test_real_images_of_forgotten_classes():
    images = torch.rand(7, 1, 8, 8) * 2 - 1
    with pytest.raises(ValueError, match="saliency_samples"):
        build("pecker", saliency_samples="data")
    method = build("pecker", saliency_samples="data", forget_images=(images, torch.zeros(7, dtype=torch.int64)))
    run(method, until=2)
    assert method.phases[0].masker.mask.count > 0


def test_cover_classes():
    fixed, free = build("sfd", cover=2), build("sfd", cover=None)
    assert fixed.phases[0].conditions.covers.tolist() == [2]
    assert free.phases[0].conditions.covers.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("forget", "cover", "message"),
    [
        ([], 1, "forget_classes"),
        ([3], 1, "forget_classes is 3"),
        ([0, 0], 1, "each class once"),
        ([0, 1, 2], None, "at least one"),
        ([0], 0, "cover_class is 0"),
        ([0], 9, "cover_class is 9"),
    ],
)
def test_wrong_requests(forget, cover, message):
    with pytest.raises(ValueError, match=message):
        ForgetRequest.of(tiny_unet(), forget, cover)


@pytest.mark.parametrize(
    "wrong",
    [
        {"density": 0.0},
        {"density": 1.5},
        {"density": 0.5, "threshold": 1.0},
        {"t_init": 1000},
        {"t_min": 800},
        {"train_batch_size": 0},
        {"generator_learning_rate": 0.0},
        {"generator_forget_weight": float("nan")},
        {"ema_decay": 1.5},
        {"mask_refresh_steps": -1},
        {"variance": "retain", "update": "alternate"},
        {"max_train_steps": 0},
    ],
)
def test_wrong_options_are_named(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        build("pecker", **wrong)


def test_states_of_other_networks_are_refused():
    state = build("pecker").phases[0]
    state.start(None)
    state = state.state_dict()
    other = build("pecker", teacher=tiny_unet(block_out_channels=(8, 8)))
    with pytest.raises(ValueError, match="another network"):
        other.phases[0].load_state_dict(state)


def test_methods_are_registered_by_file():
    known = {"esd", "patch", "pecker", "pecker+", "retrain", "salun", "selective_amnesia", "sfd"}
    assert known <= {*method_names()} and method_names() == sorted(method_names())
    with pytest.raises(ValueError, match=r"esd, patch, pecker, pecker\+, .*retrain, salun"):
        method_class("salun2")
