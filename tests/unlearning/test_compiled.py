"""torch.compile of the networks: whole graphs, made once, with the same results."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pecker_fast.diffusion import NoiseSchedule, sample_one_step
from pecker_fast.unlearning import Compute, ForgetRequest, Problem, Setting, method_class
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits


@pytest.fixture
def traced(monkeypatch):
    """Compiled networks are traced as whole graphs and run eagerly: all of torch.compile except the slow Inductor."""
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile(self, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


# One level of resolution and no mask, and all there is.
ONE_LEVEL = {"block_out_channels": (4,), "attention_resolutions": (8,)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param("sfd", ONE_LEVEL, id="sfd"), pytest.param("pecker", {}, id="pecker", marks=pytest.mark.slow)],
)
def test_a_run_compiles_once_without_breaks_and_computes_the_same(traced, name, changes):
    teacher = tiny_unet(dropout=0.1, **changes)
    phases = []
    for compile in (False, True):
        network = teacher if compile else copy.deepcopy(teacher)
        problem = Problem(network, NoiseSchedule.linear(), ForgetRequest.of(teacher, [0], 1))
        setting = Setting(problem, Compute(compile=compile))
        kind = method_class(name)
        options = {"train_batch_size": 5, "forget_batch_size": 3}
        if name == "pecker":
            options |= {"saliency_batch_size": 6, "mask_refresh_steps": 2}
        phases.append(kind(setting, kind.Options(**options)).phases[0])
        phases[-1].start(None)
    eager, compiled = phases
    graphs = []
    for number in range(4):
        losses, compiled_losses = eager.step(number), compiled.step(number)
        assert all(same_bits(loss, compiled_losses[name]) for name, loss in losses.items())
        graphs.append(traced["stats"]["unique_graphs"])
    # Sizes 3, 5, 6 and 8; with and without gradients, of weights or not, in train mode and in eval mode.
    assert 0 < graphs[0] <= 6 and graphs[1:] == [graphs[0]] * 3
    assert not traced["graph_break"]
    with compiled.averaged() as network:
        for count in (7, 9, 4, 12):
            sample_one_step(network, compiled.one_step, torch.zeros(count, dtype=torch.int64), batch_size=8, seed=0)
    # At most one more graph for a batch of one, and one beyond a size at which diffusers upsamples differently.
    assert traced["stats"]["unique_graphs"] <= graphs[0] + 2 <= torch._dynamo.config.recompile_limit
    assert torch._dynamo.config.recompile_limit >= 64
