"""Captured steps and split batches. Without a GPU a stand-in for a graph reruns the work into the tensors of the
capture: the tests show that all other code reads and returns the right tensors."""

import copy

import pytest
import torch

from pecker_fast.unlearning import graphs
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits
from tests.unlearning.test_methods import build, run, weights


def tensors_of(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    return [] if tree is None else [tensor for item in tree for tensor in tensors_of(item)]


@pytest.fixture
def played(monkeypatch) -> list[int]:
    """CUDA graphs on the CPU; counts the replays of each graph."""
    replays: list[int] = []

    def capture(work, pool):
        work()
        results = work()
        outputs, number = tensors_of(results), len(replays)
        replays.append(0)

        def replay() -> None:
            replays[number] += 1
            for own, new in zip(outputs, tensors_of(work()), strict=True):
                own.copy_(new)

        # A capture computes nothing.
        for tensor in outputs:
            tensor.fill_(torch.nan)
        return replay, results

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "require_cuda", lambda device: None)
    return replays


VARIANTS = [
    ("sfd", {}, 2),
    ("sfd", {"two_stage": True, "first_stage_steps": 3}, 4),
    ("sfd", {"regression_weight": 0.5, "gradient_accumulation_steps": 2}, 2),
    ("pecker", {}, 2),
    ("pecker", {"gradient_accumulation_steps": 3, "split_batches": True}, 4),
    ("pecker", {"update": "alternate"}, 3),
    ("pecker", {"mask_scope": "all", "split_batches": True, "max_grad_value": None}, 4),
    ("pecker+", {}, 2),
]


@pytest.mark.parametrize(("name", "options", "captured"), VARIANTS)
def test_captured_steps_are_the_same_bits(name, options, captured, played):
    teacher = tiny_unet(dropout=0.1)
    eager, graphed = (build(name, teacher=teacher, cuda_graphs=graph, **options) for graph in (False, True))
    losses = run(eager, until=3)
    replayed = run(graphed, until=3)
    assert len(played) == captured and min(played) >= 3
    assert losses.keys() == replayed.keys()
    for key, loss in losses.items():
        assert loss.isfinite() and same_bits(loss, replayed[key]), key
    for network in ("score", "generator"):
        pairs = zip(weights(getattr(eager, network)), weights(getattr(graphed, network)), strict=True)
        assert all(same_bits(a, b) for a, b in pairs)
    assert all(p.grad is None for p in graphed.generator.parameters())


def test_replay_losses_are_not_overwritten(played):
    method = build("pecker", cuda_graphs=True)
    phase = method.phases[0]
    phase.start(None)
    losses = phase.step(0)
    copies = copy.deepcopy(losses)
    phase.step(1)
    assert all(same_bits(losses[key], copies[key]) for key in losses)


def test_resumed_run_captures_again(played):
    teacher = tiny_unet(dropout=0.1)
    whole = build("pecker", teacher=teacher, cuda_graphs=True)
    run(whole, until=4)
    first = build("pecker", teacher=teacher, cuda_graphs=True)
    run(first, until=2)
    resumed = build("pecker", teacher=teacher, cuda_graphs=True)
    resumed.phases[0].load_state_dict(copy.deepcopy(first.phases[0].state_dict()))
    for i in (2, 3):
        resumed.phases[0].step(i)
    # A state loaded into captured networks: the graphs read the weights in place.
    first.phases[0].load_state_dict(copy.deepcopy(resumed.phases[0].state_dict()))
    whole.phases[0].step(4), first.phases[0].step(4)
    pairs = zip(weights(whole.generator), weights(first.generator), strict=True)
    assert all(same_bits(a, b) for a, b in pairs)


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="cuda_graphs is set, which needs a GPU: the device is cpu"):
        build("pecker", cuda_graphs=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("sfd", {"regression_weight": 0.3}), ("pecker", {}), ("pecker", {"mask_scope": "all"}), ("pecker+", {})],
)
def test_split_batches_take_the_same_step(name, options):
    """Without dropout: the same losses and weights to rounding, from smaller calls."""
    teacher = tiny_unet(dropout=0.0)
    # A large epsilon, so that Adam's first steps are not the signs of rounding errors.
    options = {"adam_epsilon": 1.0, **options}
    whole, split = (build(name, teacher=teacher, split_batches=enabled, **options) for enabled in (False, True))
    sizes = []
    split.generator.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    losses, split_losses = run(whole, until=1), run(split, until=1)
    assert losses.keys() == split_losses.keys()
    for key, loss in losses.items():
        # loss_forget sums terms of both signs and may be near zero: loss_distill has terms of the same size.
        size = max(abs(loss.item()), losses["loss_distill"].item() if key == "loss_forget" else 0.0)
        assert split_losses[key].item() == pytest.approx(loss.item(), abs=1e-5 * size), key
    assert set(sizes) - {5} == {3, 4}
    for kind in ("score_optimizer", "generator_optimizer"):
        # Adam's second moment is the square of the gradient; relative to the largest, since some are rounding errors.
        one, two = (
            torch.cat([s["exp_avg_sq"].flatten() for s in getattr(m.phases[0], kind).state.values()]).sqrt()
            for m in (whole, split)
        )
        assert (one - two).abs().max() <= 1e-4 * one.max()
        assert one.max() > 0
