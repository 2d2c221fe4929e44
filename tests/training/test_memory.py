"""The estimate of memory against what the allocator was asked for."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from pecker_fast.diffusion import PromptTable, TextConditioned
from pecker_fast.profiling import AllocationCounter
from pecker_fast.training.memory import MEASURED, describe_memory, estimate_memory
from pecker_fast.unlearning import PromptRequest, Setting, method_class
from tests.diffusion.tiny_sd import tiny_schedule, tiny_unet

# Large enough that numbers of fixed size do not count.
CONFIG = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
}
REQUEST = PromptRequest(("a", "b"), ("c", "d"), ("e", "f"))
TOLERANCE = 0.1


def measured_peak(work) -> int:
    """The most bytes that the CPU's allocator had given out within ``work``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    found = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_counter_agrees_with_the_allocator():
    # Layers that need no scratch space within: convolutions take some, which the counter does not see.
    def make():
        return nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64)), torch.randn(4096, 64)

    net, x = make()
    net(x).sum().backward()
    net.zero_grad()

    def work():
        net(x).square().sum().backward()
        net.zero_grad()

    real = measured_peak(work)
    with AllocationCounter() as counter:
        work()
    assert counter.peak == pytest.approx(real, rel=0.02)
    with FakeTensorMode(), AllocationCounter() as fake:
        net2, x2 = make()
        start = fake.current
        fake.reset()
        net2(x2).square().sum().backward()
        net2.zero_grad()
        assert fake.peak - start == pytest.approx(counter.peak, rel=0.01)
        del net2, x2
    assert fake.current == 0


MEMORY = {
    "weights_dtype": torch.float32,
    "teacher_dtype": torch.float32,
    "master_weights": False,
    "gradient_checkpointing": False,
    "score_lora_rank": 0,
}


@pytest.mark.parametrize(
    ("name", "options", "memory"),
    [
        ("sfd", {"ema_decay": None}, {}),
        ("pecker", {"adam_beta1": 0.9, "gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}),
        (
            "pecker",
            {"update": "alternate", "ema_decay": None},
            {"weights_dtype": torch.bfloat16, "master_weights": True},
        ),
    ],
)
def test_estimate_is_what_a_run_takes(name, options, memory):
    kind = method_class(name)
    values = {"train_batch_size": 4, "t_init": 625, "teacher_guidance_scale": 4.5, "saliency_batch_size": 4, **options}
    known = kind.Options.__dataclass_fields__
    options = kind.Options(**{key: value for key, value in values.items() if key in known})
    memory = {**MEMORY, **memory}
    config = dict(tiny_unet(**CONFIG).config)
    estimate = estimate_memory(config, 16, tiny_schedule(), REQUEST, name, options, memory, "no", False, "tiny")
    kept = []

    def work():
        table = PromptTable(torch.randn(len(REQUEST.prompts), 77, 16))
        teacher = TextConditioned(tiny_unet(**CONFIG), table, tiny_schedule())
        setting = Setting(teacher=teacher, schedule=tiny_schedule(), request=REQUEST, **memory)
        method = kind(setting, options)
        kept.append(method)
        phase = method.phases[-1]
        phase.start(None)
        for i in range(2):
            phase.step(i)

    real = measured_peak(work)
    assert estimate.peak == pytest.approx(real, rel=TOLERANCE)
    phase = kept[0].phases[-1]
    states = [phase.score_optimizer.state, phase.generator_optimizer.state]
    held = sum(v.nbytes for state in states for s in state.values() for v in s.values() if isinstance(v, torch.Tensor))
    assert estimate.optimizers == pytest.approx(held, rel=0.02)
    weights = [kept[0].setting.teacher, kept[0].score, kept[0].generator]
    table = kept[0].setting.teacher.table.embeddings.nbytes
    held = table + sum(p.nbytes for network in weights for p in network.parameters())
    assert estimate.weights == pytest.approx(held, rel=0.02)
    assert estimate.parameters == sum(p.numel() for p in weights[0].parameters())
    said = describe_memory(estimate)
    assert "most at a time" in said and ("saliency" in said) == (name != "sfd")


def test_options_that_save_memory_do():
    kind = method_class("pecker")
    options = kind.Options(train_batch_size=8, t_init=625, saliency_batch_size=8, ema_decay=None)

    def peak(memory: dict | None = None, **changes) -> int:
        given = dataclasses.replace(options, **changes)
        config = dict(tiny_unet(**CONFIG).config)
        return estimate_memory(
            config, 16, tiny_schedule(), REQUEST, "pecker", given, {**MEMORY, **(memory or {})}, "no", False, "tiny"
        ).peak

    plain = peak()
    assert peak({"gradient_checkpointing": True}) < plain and peak({"weights_dtype": torch.bfloat16}) < plain
    assert peak(train_batch_size=4, saliency_batch_size=4) < plain < peak(teacher_guidance_scale=4.5)
    assert peak(ema_decay=0.9) > plain and MEASURED > 1000
    with pytest.raises(ValueError, match="score_lora_rank"):
        peak({"score_lora_rank": 2})
