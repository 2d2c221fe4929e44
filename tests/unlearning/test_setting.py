"""Values that the parts of a setting refuse, on their own and for a method."""

import dataclasses

import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.unlearning import Compute, ForgetRequest, Placement, Problem, Setting, method_class
from tests.diffusion.toy import tiny_unet
from tests.unlearning.settings import setting_of


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Compute, {"seed": -1}, "seed is -1"),
        (Compute, {"mixed_precision": "fp16"}, "mixed_precision is 'fp16', expected one of no, bf16"),
        (Compute, {"nonfinite": "stop"}, "nonfinite is 'stop', expected one of propagate, skip, zero, raise"),
        (Placement, {"weights_dtype": torch.float64}, "weights_dtype is torch.float64, expected one of torch.float32"),
        (Placement, {"teacher_dtype": torch.int8}, "teacher_dtype is torch.int8"),
        (Placement, {"weights_dtype": None}, "weights_dtype is None"),
        (Placement, {"score_lora_rank": -1}, "score_lora_rank is -1"),
        (Placement, {"master_weights": True}, "there is nothing to keep"),
    ],
)
def test_parts_check_themselves(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("esd", {"score_lora_rank": 4}, "esd trains no adapter: it is for patch, pecker, pecker\\+ and sfd"),
        ("salun", {"weights_dtype": torch.bfloat16}, "weights_dtype is torch.bfloat16, but salun trains float32"),
        ("retrain", {"fsdp": True}, "retrain shards no networks: it is for pecker, pecker\\+ and sfd"),
        ("sfd", {"fsdp": True}, "one process: start several with torchrun"),
    ],
)
def test_methods_refuse_placements_that_they_do_not_support(method, values, message):
    kind = method_class(method)
    with pytest.raises(ValueError, match=message):
        Placement(**values).check_method(kind, kind.Options(), processes=1, compile=False)
    # So does the method itself.
    teacher = tiny_unet(null_label=True)
    setting = setting_of(
        teacher=teacher, schedule=NoiseSchedule.linear(), request=ForgetRequest.of(teacher, [0], 1), **values
    )
    with pytest.raises(ValueError, match=message):
        kind(setting, kind.Options())


def test_a_setting_places_its_teacher():
    teacher = tiny_unet().train()
    problem = Problem(teacher, NoiseSchedule.linear(), ForgetRequest.of(teacher, [0], 1))
    setting = Setting(problem, Compute(channels_last=True))
    assert setting.problem.teacher is teacher and not teacher.training
    assert not any(param.requires_grad for param in teacher.parameters())
    assert teacher.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not problem.forgets_prompts and problem.sample_shape == (1, 8, 8)


def test_methods_without_a_memory_plan_are_named():
    kind = method_class("esd")
    with pytest.raises(ValueError, match="memory of method 'esd' cannot be estimated"):
        kind.rehearsal_options(kind.Options(), 1)


def test_a_rehearsal_takes_no_step_and_leaves_no_gradient():
    kind = method_class("pecker")
    teacher = tiny_unet()
    setting = setting_of(teacher=teacher, schedule=NoiseSchedule.linear(), request=ForgetRequest.of(teacher, [0], 1))
    options = kind.Options(train_batch_size=4, forget_batch_size=2, saliency_batch_size=6, saliency_batches=5)
    few = kind.rehearsal_options(options, 2)
    assert (few.train_batch_size, few.forget_batch_size, few.saliency_batch_size) == (2, 1, 3)
    assert few.saliency_batches == 2 and dataclasses.replace(few, **sizes_of(options)) == options
    method = kind(setting, few)
    method.phases[-1].start(None)
    plan = method.memory_plan()
    before = [param.detach().clone() for trained in plan.networks for param in trained.network.parameters()]
    notes = []
    plan.rehearse(notes.append)
    assert notes == ["score network's step", None, "saliency gradient", "generator's step"]
    params = [param for trained in plan.networks for param in trained.network.parameters()]
    assert all(param.grad is None and torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert [trained.step for trained in plan.networks] == ["plain", "joint"]


def sizes_of(options) -> dict:
    names = ("train_batch_size", "forget_batch_size", "saliency_batch_size", "saliency_batches")
    return {name: getattr(options, name) for name in names}


def test_networks_are_rounded_by_random_bits_of_their_own():
    teacher = tiny_unet()
    common = {"teacher": teacher, "schedule": NoiseSchedule.linear(), "request": ForgetRequest.of(teacher, [0], 1)}
    settings = [setting_of(seed=seed, **common) for seed in (0, 1)]
    seeds = [setting.optimizer_options(name)["seed"] for setting in settings for name in ("score", "generator")]
    assert len(set(seeds)) == 4
