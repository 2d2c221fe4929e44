"""Masks of whole rows and parameters, against loops written from their definition, and the work that they spare."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pecker_fast import SaliencyMask
from pecker_fast.unlearning.groups import fitting, group_mask
from tests.inputs import same_bits
from tests.unlearning.test_methods import build, run, weights


def gradients() -> dict[str, torch.Tensor]:
    shapes = {"a": (5, 3, 2, 2), "b": (5,), "c": (4, 7), "d": (), "e": (2, 3)}
    grads = {name: torch.randn(shape) * 10 ** torch.randint(-2, 2, ()).item() for name, shape in shapes.items()}
    # Strides as channels_last has them, a row without any gradient, and one that is not a number.
    grads["a"] = grads["a"].to(memory_format=torch.channels_last)
    grads["c"][1] = 0
    grads["e"][0, 1] = math.nan
    return grads


def groups_of(grads: dict[str, torch.Tensor], granularity: str) -> list[tuple[str, int | None, int, float]]:
    """Tensor, row, entries and score of every group."""
    found = []
    for name, grad in grads.items():
        array = grad.double().numpy()
        rows = range(len(array)) if granularity == "row" and array.ndim else [None]
        for row in rows:
            part = array if row is None else array[row]
            found.append((name, row, part.size, float(np.sqrt(np.mean(part**2)))))
    return found


def expected(grads, granularity: str, density=None, threshold=None) -> dict[str, np.ndarray]:
    masks = {name: np.zeros(tuple(grad.shape), bool) for name, grad in grads.items()}
    groups = [group for group in groups_of(grads, granularity) if group[3] > 0]
    left = math.inf
    if density is not None:
        left = max(1, int(density * sum(grad.numel() for grad in grads.values())))
    else:
        groups = [group for group in groups if group[3] >= threshold]
    for name, row, size, _ in sorted(groups, key=lambda group: -group[3]):
        if size <= left:
            left -= size
            masks[name][... if row is None else row] = True
    return masks


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("kind", [{"density": 0.02}, {"density": 0.3}, {"density": 0.7}, {"density": 1.0}, {}])
def test_masks_of_groups(granularity, kind):
    for _ in range(10):
        grads = gradients()
        scores = sorted(group[3] for group in groups_of(grads, granularity) if group[3] > 0)
        given = kind or {"threshold": (scores[2] + scores[3]) / 2}
        mask, reached = group_mask(grads, granularity, **given)
        assert isinstance(mask, SaliencyMask) and mask.names == tuple(grads)
        for (name, want), here in zip(expected(grads, granularity, **given).items(), reached, strict=True):
            assert np.array_equal(mask[name].numpy(), want), name
            assert here == want.any()


def test_of_equal_scores_the_first_is_taken():
    grads = {"a": torch.ones(4, 3), "b": -torch.ones(4, 3)}
    mask, reached = group_mask(grads, "row", density=0.5)
    assert mask["a"].all() and mask["b"].sum() == 0 and reached == [True, False]
    # Seven entries: the third row would be nine, and no smaller one follows.
    mask, _ = group_mask(grads, "row", density=7 / 24)
    assert mask["a"].sum(1).tolist() == [3, 3, 0, 0] and mask["b"].sum() == 0


def test_fitting_goes_on_past_groups_that_are_too_large():
    sizes = torch.randint(1, 30, (200,))
    budget = 300
    left, want = budget, []
    for size in sizes.tolist():
        want.append(size <= left)
        left -= size if want[-1] else 0
    assert fitting(sizes, budget).tolist() == want
    assert not fitting(torch.tensor([5, 7]), 4).any()


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"split_batches": True}])
def test_forget_gradient_alone_moves_salient_groups_alone(granularity, options):
    method = build(
        "pecker", generator_retain_weight=0.0, mask_refresh_steps=0, density=0.2, granularity=granularity, **options
    )
    before = weights(method.generator)
    run(method)
    mask, reached = method.phases[0].masker.mask, method.phases[0].masker.reached
    assert 0 < mask.density <= 0.2 and any(reached) and not all(reached)
    for (name, param), old, here in zip(method.generator.named_parameters(), before, reached, strict=True):
        outside = ~mask[name]
        assert same_bits(param.detach()[outside], old[outside]), name
        assert bool(mask[name].any()) == here == bool((param.detach() != old).any()), name


def test_gradients_not_computed_change_nothing():
    """What is spared is what the mask would have thrown away."""
    torch.manual_seed(3)
    method = build("pecker", granularity="tensor", density=0.3, mask_refresh_steps=0)
    teacher = method.setting.teacher
    full = build("pecker", teacher=teacher, granularity="tensor", density=0.3, mask_refresh_steps=0)
    start = full.phases[0].masker.refresh

    def refresh(*given):
        start(*given)
        full.phases[0].masker.reached = None

    full.phases[0].masker.refresh = refresh
    run(method), run(full)
    assert method.phases[0].masker.reached is not None
    assert all(same_bits(a, b) for a, b in zip(weights(method.generator), weights(full.generator), strict=True))


def test_weight_gradients_outside_the_mask_cost_nothing():
    def flops(granularity: str, density: float) -> int:
        torch.manual_seed(0)
        method = build("pecker", granularity=granularity, density=density, mask_refresh_steps=0)
        phase = method.phases[0]
        phase.start(None)
        phase.step(0)
        with FlopCounterMode(display=False) as counted:
            phase.step(1)
        return counted.get_total_flops()

    all_of_it = flops("entry", 0.5)
    assert flops("tensor", 1.0) == all_of_it
    assert flops("tensor", 0.1) < flops("tensor", 0.7) < all_of_it


def test_wrong_granularity_is_named():
    with pytest.raises(ValueError, match="granularity is 'layer'"):
        build("pecker", granularity="layer")


def test_a_resumed_run_knows_which_parameters_are_reached():
    method = build("pecker", granularity="tensor", density=0.2, mask_refresh_steps=0)
    run(method, until=2)
    again = build("pecker", granularity="tensor", density=0.2, mask_refresh_steps=0)
    again.phases[0].load_state_dict(method.phases[0].state_dict())
    assert again.phases[0].masker.reached == method.phases[0].masker.reached
    method.phases[0].step(2), again.phases[0].step(2)
