"""One copy of the weights for teacher, psi and theta: the bits of networks with weights of their own."""

import copy

import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.unlearning import ForgetRequest, method_class
from tests.diffusion.tiny_sd import tiny_text_network
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits
from tests.unlearning.settings import setting_of
from tests.unlearning.test_prompts import make_text

LOW = {"weights_dtype": torch.bfloat16, "teacher_dtype": torch.bfloat16}
OPTIONS = {"density": 0.1, "score_density": 0.2, "saliency_chunks": 2, "gradient_accumulation_steps": 2}
SHARED = {"share_weights": True}


def classes_method(teacher, setting: dict, **options):
    kind = method_class("patch")
    whole = setting_of(
        teacher=copy.deepcopy(teacher),
        schedule=NoiseSchedule.linear(),
        request=ForgetRequest.of(teacher, [0], 1),
        **setting,
    )
    values = {"max_train_steps": 4, "train_batch_size": 3, "t_init": 250, "score_learning_rate": 1e-3}
    return kind(whole, kind.Options(**{**values, "generator_learning_rate": 1e-3, **OPTIONS, **options}))


def text_method(teacher, setting: dict, **options):
    return make_text("patch", teacher, setting, **{**OPTIONS, **options})


def state_of(method) -> dict[str, torch.Tensor]:
    """Every tensor of a phase's state, by its place."""
    result = {}

    def collect(value, place):
        if isinstance(value, torch.Tensor):
            result[place] = value.clone()
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(item, f"{place}.{key}")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                collect(item, f"{place}.{i}")

    collect(method.phases[-1].state_dict(), "state")
    return result


def outcome(method, iterations: int, first: int = 0) -> dict[str, torch.Tensor]:
    """All that a run computes: losses, gradients' effect on state and weights, the averaged network."""
    phase = method.phases[-1]
    if first == 0:
        phase.start(None)
    result = {}
    for i in range(first, iterations):
        losses = phase.step(i)
        result |= {f"{name} {i}": loss for name, loss in losses.items()}
        assert phase.is_finite()
    with phase.averaged() as network:
        # The teacher may be drawn from meanwhile.
        teacher = method.setting.problem.teacher
        result |= {f"averaged {name}": value.clone() for name, value in network.state_dict().items()}
        result |= {f"teacher {name}": value.clone() for name, value in teacher.state_dict().items()}
        again = network.state_dict()
        assert all(same_bits(value, result[f"averaged {name}"]) for name, value in again.items())
    return result | state_of(method)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not same_bits(one[name], other[name])]
    assert not different, different[:5]


VARIANTS = [
    ("classes", {}, {}),
    ("classes", {}, {"regression_weight": 0.5, "adam_beta1": 0.9}),
    ("epsilon", LOW, {}),
    pytest.param(
        "epsilon",
        {**LOW, "master_weights": True, "gradient_checkpointing": True},
        {"act_on": ("conditioning",)},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "v_prediction",
        {"mixed_precision": "bf16"},
        {"split_batches": True, "pack_gradients": False},
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("kind", "setting", "options"), VARIANTS)
def test_shared_weights_give_the_bits_of_separate_ones(kind, setting, options):
    if kind == "classes":
        teacher, make = tiny_unet(dropout=0.1), classes_method
    else:
        teacher, make = tiny_text_network(8, kind), text_method
    separate, shared = make(teacher, setting, **options), make(teacher, {**setting, **SHARED}, **options)
    base = dict(shared.setting.problem.teacher.named_parameters())
    for network in (shared.score, shared.generator):
        assert all(param.data_ptr() == base[name].data_ptr() for name, param in network.named_parameters())
        assert all(param.requires_grad for param in network.parameters())
    expected = outcome(separate, 2)
    assert_same(expected, outcome(shared, 2))
    assert any(not same_bits(expected[f"state.score.{name}"], base[name]) for name in base)


def test_checkpoints_are_those_of_separate_weights():
    teacher = tiny_unet()
    stopped = {setting: classes_method(teacher, dict(setting)) for setting in ((), (("share_weights", True),))}
    states = {}
    for setting, method in stopped.items():
        method.phases[-1].start(None)
        method.phases[-1].step(0)
        states[setting] = copy.deepcopy(method.phases[-1].state_dict())
    expected = outcome(stopped[()], 2, first=1)
    # Each goes on from the other's checkpoint, the shared one from its own as well.
    for start, setting in (((), SHARED), ((("share_weights", True),), {}), ((("share_weights", True),), SHARED)):
        resumed = classes_method(teacher, setting)
        resumed.phases[-1].load_state_dict(copy.deepcopy(states[start]))
        assert_same(expected, outcome(resumed, 2, first=1))
    # A checkpoint from before the first step has no mask.
    fresh, target = classes_method(teacher, SHARED), classes_method(teacher, SHARED)
    fresh.phases[-1].start(None)
    target.phases[-1].load_state_dict(copy.deepcopy(fresh.phases[-1].state_dict()))
    target.phases[-1].step(0)
    other = states[()]
    mask = stopped[()].phases[-1].masker.mask
    name = mask.names[0]
    other["generator"][name][~mask[name]] += 1
    with pytest.raises(ValueError, match=f"the generator in the checkpoint differs .* outside its mask, in {name}"):
        classes_method(teacher, SHARED).phases[-1].load_state_dict(other)
    del other["score"][name]
    with pytest.raises(ValueError, match=f"the state is of another network: {name} differs"):
        classes_method(teacher, SHARED).phases[-1].load_state_dict(other)


def addresses(network) -> set[int]:
    return {param.data_ptr() for param in network.parameters()}


@pytest.mark.parametrize(
    ("options", "has_own_generator", "shared_networks"),
    [
        ({"score_density": 1.0}, False, {"generator"}),
        ({}, True, {"score"}),
        ({"destroy": "noise"}, False, {"score"}),
    ],
)
def test_networks_that_differ_have_weights_of_their_own(options, has_own_generator, shared_networks):
    teacher = tiny_unet()
    setting = {"initial_generator": tiny_unet()} if has_own_generator else {}
    # An equal network counts as the teacher.
    setting |= {"initial_score": copy.deepcopy(teacher)}
    separate, shared = (classes_method(teacher, {**copy.deepcopy(setting), **more}, **options) for more in ({}, SHARED))
    own = addresses(shared.setting.problem.teacher)
    for name in ("score", "generator"):
        assert (addresses(getattr(shared, name)) == own) == (name in shared_networks), name
    assert_same(outcome(separate, 1), outcome(shared, 1))


def test_a_graph_that_needs_exchanged_weights_is_refused():
    method = classes_method(tiny_unet(), SHARED)
    phase = method.phases[-1]
    phase.start(None)
    phase.step(0)
    x = torch.randn(1, *method.setting.problem.sample_shape, requires_grad=True)
    label = torch.zeros(1, dtype=torch.int64)
    y = method.score(x, 3, class_labels=label, return_dict=False)[0]
    method.generator(x.detach(), 3, class_labels=label, return_dict=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="the score shares weights and has a mask already"):
        phase.shared.confine("score", ~phase.score_masker.mask)
    # The teacher keeps no graph: its backward pass computes again, at its own weights.
    teacher = method.setting.problem.teacher
    y = teacher(x, 3, class_labels=label, return_dict=False)[0]
    method.score(x.detach(), 3, class_labels=label, return_dict=False)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    separate = copy.deepcopy(tiny_unet())
    separate.load_state_dict(teacher.state_dict())
    x = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(separate(x, 3, class_labels=label, return_dict=False)[0].square().sum(), x)
    assert same_bits(grad, expected)


def test_placements_that_cannot_share():
    teacher = tiny_text_network(8)
    with pytest.raises(ValueError, match="share_weights is set, but sfd trains every weight: it is for patch"):
        make_text("sfd", teacher, SHARED)
    with pytest.raises(ValueError, match="share_weights is set, and so is torch_compile"):
        text_method(teacher, {**SHARED, "compile": True})
    for option in ("cuda_graphs", "relabel"):
        with pytest.raises(ValueError, match=f"share_weights is set, and so is {option}"):
            text_method(teacher, SHARED, **{option: True})
    with pytest.raises(ValueError, match="no network that one mask confines starts as the teacher"):
        text_method(teacher, {**SHARED, "initial_generator": tiny_text_network(8)}, score_density=1.0)
    with pytest.raises(ValueError, match=r"teacher is torch.bfloat16 and weights_dtype torch.float32"):
        text_method(teacher, {**SHARED, "teacher_dtype": torch.bfloat16})
