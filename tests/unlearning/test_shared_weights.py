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
    ("epsilon", {**LOW, "master_weights": True, "gradient_checkpointing": True}, {"act_on": ("conditioning",)}),
    ("v_prediction", {"mixed_precision": "bf16"}, {"split_batches": True, "pack_gradients": False}),
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
    expected = outcome(separate, 3)
    assert_same(expected, outcome(shared, 3))
    assert any(not same_bits(expected[f"state.score.{name}"], base[name]) for name in base)
