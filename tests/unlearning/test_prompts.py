"""Prompts in place of classes: labels, guidance against float64, whole small runs of every method."""

import copy

import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.unlearning import PromptRequest, Setting, method_class, method_names
from pecker_fast.unlearning.conditions import Conditions
from pecker_fast.unlearning.streams import Streams
from tests.diffusion.tiny_sd import LATENTS, SIZE, tiny_text_network
from tests.inputs import same_bits
from tests.unlearning.oracle import SHAPE, Affine, Oracle, generator_loss, one_step, score_loss
from tests.unlearning.settings import setting_of
from tests.unlearning.test_equations import assert_grads, build

REQUEST = {
    "retain": ("a dog", "a cat"),
    "forget": ("brad pitt smiles", "brad pitt", "brad pitt smiles"),
    "cover": ("a man smiles", "a man", "a man smiles"),
}


class Prompted(Affine):
    """The oracle's network with a null label, as a text-conditional one has."""

    null_label = 0


def prompt_setting(negative: str | None = "bad", **options) -> Setting:
    request = PromptRequest(**REQUEST, negative=negative)
    network = Prompted(classes=len(request.prompts))
    return setting_of(teacher=network, schedule=NoiseSchedule.linear(), request=request, **options)


def test_labels_of_a_request():
    request = PromptRequest(**REQUEST, negative="bad")
    assert request.prompts[0] == "" and len(set(request.prompts)) == len(request.prompts) == 8
    conditions = request.conditions("cpu")
    texts = lambda labels: tuple(request.prompts[i] for i in labels)  # noqa: E731
    assert texts(conditions.retained) == REQUEST["retain"] and texts(conditions.forgotten) == REQUEST["forget"]
    assert texts(conditions.covers) == REQUEST["cover"] and conditions.paired
    assert request.prompts[conditions.negative] == "bad"
    assert texts(conditions.everything) == REQUEST["retain"] + REQUEST["forget"]
    assert PromptRequest(**REQUEST).conditions("cpu").negative is None


def test_covers_are_paired_with_forgotten_labels():
    conditions = Conditions(*(torch.tensor(v) for v in ([0], [1, 2, 3], [11, 12, 13], [0])), paired=True)
    forgotten, covers = conditions.draw_forgotten(Streams(torch.device("cpu"), 1), 300)
    assert torch.equal(forgotten + 10, covers) and set(forgotten.tolist()) == {1, 2, 3}
    # All pairs are equally likely.
    assert torch.bincount(forgotten).min() == 0 and torch.bincount(forgotten)[1:].min() > 60


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"retain": ()}, ValueError, "retain is empty"),
        ({"cover": ("a man",)}, ValueError, "cover has 1 prompts, expected 3"),
        ({"cover": ("a man", "brad pitt", "a man")}, ValueError, "same text"),
        ({"forget": "brad pitt"}, TypeError, "forget is 'brad pitt'"),
        ({"retain": ("a", 3)}, TypeError, "retain"),
        ({"negative": 3}, TypeError, "negative is 3"),
    ],
)
def test_wrong_requests(changes, error, message):
    with pytest.raises(error, match=message):
        PromptRequest(**{**REQUEST, **changes})


@pytest.mark.parametrize("roles", [(False, False, True), (True, True, True), (True, False, False)])
@pytest.mark.parametrize("sees_cover", [False, True])
def test_long_short_guidance_against_float64(roles, sees_cover):
    setting = prompt_setting(seed=7)
    scales = {"score_guidance_scale": 2.5, "score_eval_guidance_scale": 1.5, "teacher_guidance_scale": 4.5}
    text = {"negative_roles": roles, "score_sees_cover": sees_cover, "condition_dropout": 0.4}
    method, phase, score_steps, generator_steps = build("pecker", setting, **scales, **text)
    teacher, score, generator = (Oracle(n) for n in (setting.problem.teacher, method.score, method.generator))
    phase.step(0)
    streams = Streams(setting.compute.device, setting.compute.seed, phase.name, 0, 0)
    batch = phase._draw(streams)
    r, labels, covers, count = batch.retained, batch.labels, batch.teacher_labels, len(batch.labels)
    score_labels = covers if sees_cover else labels
    negative = setting.problem.request.labels(["bad"])[0]
    nulls = [torch.tensor([0] * r + [negative if role else 0] * (count - r)) for role in roles]
    parts = slice(r), slice(r, None)

    class Guided(Oracle):
        """eps of one network, guided: its labels are ignored."""

        def __init__(self, inner, labels, nulls, scale):
            self.inner, self.inputs = inner, (labels, nulls, scale)

        def eps(self, x, t, labels):
            cond, nulls, scale = self.inputs
            return (1 - scale) * self.inner.eps(x, t, nulls) + scale * self.inner.eps(x, t, cond)

    z, eps = (streams.normal(f"score {name}", count, SHAPE) for name in ("z", "eps"))
    t = streams.timesteps("score t", count, 38, 711)
    dropped = streams.uniform("score condition dropout", count) < 0.4
    assert dropped.any() and not dropped.all()
    x = one_step(generator, z, 250, labels).detach()
    conditions, without = score_labels.masked_fill(dropped, 0), nulls[0].masked_fill(dropped, 0)
    losses = [score_loss(Guided(score, conditions[s], without[s], 2.5), x[s], eps[s], t[s], None) for s in parts]
    (score_step,), (generator_step,) = score_steps, generator_steps
    assert_grads(score_step["grads"], score.grads(0.8 * losses[0] + 0.3 * losses[1]))
    z, eps = (streams.normal(f"generator {name}", count, SHAPE) for name in ("z", "eps"))
    t = streams.timesteps("generator t", count, 38, 711)
    x = one_step(generator, z, 250, labels)
    losses = [
        generator_loss(
            Guided(teacher, covers[s], nulls[2][s], 4.5),
            Guided(score, score_labels[s], nulls[1][s], 1.5),
            x[s],
            eps[s],
            t[s],
            None,
            None,
            1.2,
        )
        for s in parts
    ]
    assert_grads(generator_step["grads"], generator.grads(0.9 * losses[0]))
    assert_grads(generator_step["masked_grads"], generator.grads(0.2 * losses[1]))


def test_guidance_of_class_networks():
    from tests.diffusion.toy import tiny_unet
    from tests.unlearning.test_methods import build as build_method

    teacher = tiny_unet(null_label=True)
    method = build_method("sfd", teacher=teacher, teacher_guidance_scale=2.0, score_guidance_scale=1.5)
    method.phases[0].start(None)
    assert all(loss.isfinite() for loss in method.phases[0].step(0).values())
    with pytest.raises(ValueError, match="no null label"):
        build_method("sfd", teacher=tiny_unet(), teacher_guidance_scale=2.0)


def run_text(name: str, teacher, iterations: int = 4, setting: dict | None = None, **options):
    method = make_text(name, teacher, setting, **options)
    phase = method.phases[-1]
    phase.start(None)
    for i in range(iterations):
        losses = phase.step(i)
    return method, losses


def make_text(name: str, teacher, setting: dict | None = None, **options):
    request = PromptRequest(**REQUEST, negative="bad")
    whole = setting_of(teacher=copy.deepcopy(teacher), schedule=teacher.schedule, request=request, **(setting or {}))
    kind = method_class(name)
    values = {
        "max_train_steps": 4,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "t_init": 625,
        "score_learning_rate": 1e-3,
        "generator_learning_rate": 1e-3,
        "score_guidance_scale": 4.5,
        "score_eval_guidance_scale": 4.5,
        "teacher_guidance_scale": 4.5,
        "saliency_batch_size": 2,
        **kind.defaults,
        **options,
    }
    known = kind.Options.__dataclass_fields__
    return kind(whole, kind.Options(**{key: value for key, value in values.items() if key in known}))


def weights(network) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


BOTH_LOW = {"weights_dtype": torch.bfloat16, "teacher_dtype": torch.bfloat16}
VARIANTS = [
    ("sfd", "v_prediction", {}, {}),
    pytest.param("pecker", "epsilon", {"ema_decay": None}, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ("pecker+", "epsilon", {"mask_refresh_steps": 2}, BOTH_LOW),
    pytest.param(
        "pecker",
        "v_prediction",
        {"update": "alternate"},
        {"weights_dtype": torch.bfloat16, "master_weights": True},
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("name", "kind", "options", "setting"), VARIANTS)
def test_every_method_runs_repeats_and_resumes_on_text(name, kind, options, setting):
    assert name in method_names()
    teacher = tiny_text_network(8, kind)
    method, losses = run_text(name, teacher, setting=setting, **options)
    assert all(loss.isfinite() for loss in losses.values())
    stopped, _ = run_text(name, teacher, 2, setting=setting, **options)
    resumed = make_text(name, teacher, setting, **options)
    resumed.phases[-1].load_state_dict(copy.deepcopy(stopped.phases[-1].state_dict()))
    for i in (2, 3):
        resumed.phases[-1].step(i)
    for one, two in ((method.score, resumed.score), (method.generator, resumed.generator)):
        assert all(same_bits(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    dtype = setting.get("weights_dtype", torch.float32)
    assert {p.dtype for p in method.generator.parameters()} == {dtype}
    teacher_dtype = setting.get("teacher_dtype", torch.float32)
    assert {p.dtype for p in method.setting.problem.teacher.parameters()} == {teacher_dtype}
    moved = [
        not torch.equal(a, b.to(a.dtype)) for a, b in zip(weights(method.generator), weights(teacher), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    with method.phases[-1].averaged() as network, method.setting.compute.autocast():
        drawn = method.sampler.draw(network, method.setting.problem.schedule, torch.tensor([1, 4]))
    assert drawn.shape == (2, LATENTS, SIZE, SIZE) and drawn.isfinite().all()
    if name != "sfd":
        # Masks have the U-Net's parameter names, so saved masks fit it.
        assert method.phases[-1].masker.mask.names == tuple(n for n, _ in teacher.unet.named_parameters())


def test_gradient_checkpointing_changes_no_step():
    # Dropout shows whether recomputation uses the mode of the first call.
    teacher = tiny_text_network(8, dropout=0.3)
    options = {"regression_weight": 0.5, "ema_decay": None}
    plain, losses = run_text("pecker", teacher, 2, **options)
    again, again_losses = run_text("pecker", teacher, 2, {"gradient_checkpointing": True}, **options)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(again_losses[name].item(), rel=1e-3), name
    for one, two in ((plain.score, again.score), (plain.generator, again.generator)):
        for a, b, start in zip(weights(one), weights(two), weights(teacher), strict=True):
            # Adam makes full steps even of rounding errors.
            assert ((a - b).abs() > 1e-5).double().mean() < 0.05 or torch.equal(a, start)


def test_low_rank_score_network():
    pytest.importorskip("peft")
    teacher = tiny_text_network(8)
    low = {"score_lora_rank": 2, "teacher_dtype": torch.bfloat16, "mixed_precision": "bf16"}
    method, losses = run_text("pecker", teacher, 2, low)
    assert all(loss.isfinite() for loss in losses.values())
    trained = {n: p for n, p in method.score.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n and p.dtype == torch.float32 for n, p in trained.items())
    assert all(p.requires_grad for p in method.generator.parameters())
    frozen = {n.replace("base_layer.", ""): p for n, p in method.score.named_parameters() if n not in trained}
    for name, param in teacher.named_parameters():
        assert torch.equal(frozen[name], param.bfloat16()), name
    # The second factor starts at zero: only the step can have changed it.
    moved = [p for n, p in trained.items() if "lora_B" in n and p.abs().max() > 0]
    assert len(moved) > len(trained) / 4
    again, _ = run_text("pecker", teacher, 1, low)
    resumed = make_text("pecker", teacher, low)
    resumed.phases[-1].load_state_dict(copy.deepcopy(again.phases[-1].state_dict()))
    resumed.phases[-1].step(1)
    assert all(same_bits(a, b) for a, b in zip(weights(method.score), weights(resumed.score), strict=True))


def test_wrong_settings():
    from tests.unlearning.oracle import make_setting

    with pytest.raises(ValueError, match="Affine takes no adapter"):
        make_setting(score_lora_rank=2).trainable_score(Affine())
    teacher = tiny_text_network(8)
    with pytest.raises(ValueError, match="master_weights"):
        make_text("sfd", teacher, {"master_weights": True})
    with pytest.raises(ValueError, match="weights_dtype"):
        make_text("sfd", teacher, {"weights_dtype": torch.float64})
    with pytest.raises(ValueError, match="gradient_checkpointing is set, but a Prompted"):
        prompt_setting(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="negative_roles"):
        make_text("sfd", teacher, negative_roles=(True, False))
