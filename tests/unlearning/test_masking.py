"""The scores that the mask ranks: gradients (test_equations.py), parameters or random numbers."""

import math

import pytest
import torch

from pecker_fast import saliency_mask
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.unlearning import ForgetRequest
from pecker_fast.unlearning.masking import Masker, SaliencyOptions
from tests.diffusion.toy import tiny_unet
from tests.unlearning.settings import setting_of


def masker_of(seed: int = 0, **options) -> tuple[Masker, torch.nn.Module]:
    teacher, generator = tiny_unet(), tiny_unet()
    request = ForgetRequest.of(teacher, [0], 1)
    setting = setting_of(teacher=teacher, schedule=NoiseSchedule.linear(), request=request, seed=seed)
    masker = Masker(setting, SaliencyOptions(mask_refresh_steps=2, **options), t_init=250)
    masker.start(generator)
    return masker, generator


def chosen(masker: Masker, generator) -> torch.Tensor:
    return torch.cat([masker.mask[name].flatten() for name, _ in generator.named_parameters()])


@pytest.mark.parametrize("which", ["current", "initial"])
def test_magnitude_keeps_the_largest_parameters(which):
    masker, generator = masker_of(density=0.3, saliency_score="magnitude", saliency_network=which)
    network = generator if which == "current" else masker.problem.teacher
    before = [p.clone() for p in network.parameters()]
    masker.refresh(0, generator)
    sizes = torch.cat([p.detach().abs().flatten() for p in network.parameters()])
    k = int(0.3 * len(sizes))
    salient = chosen(masker, generator)
    assert int(salient.sum()) == k and sizes[salient].min() >= sizes[~salient].max()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    # Another mask once the parameters have moved.
    with torch.no_grad():
        for param in network.parameters():
            param.copy_(torch.randn(param.shape))
    masker.refresh(2, generator)
    assert not torch.equal(salient, chosen(masker, generator))


def test_random_masks_are_new_at_every_refresh_and_the_same_for_a_seed():
    masker, generator = masker_of(density=0.3, saliency_score="random")
    masks = []
    for i in range(5):
        masker.refresh(i, generator)
        masks.append(chosen(masker, generator))
    total = len(masks[0])
    assert all(int(mask.sum()) == int(0.3 * total) for mask in masks)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2]) and not torch.equal(masks[2], masks[4])
    # Random scores do not depend on the network, only on the seed.
    again, other = masker_of(density=0.3, saliency_score="random")
    again.refresh(2, other)
    assert torch.equal(chosen(again, other), masks[2])
    again, other = masker_of(seed=1, density=0.3, saliency_score="random")
    again.refresh(2, other)
    assert not torch.equal(chosen(again, other), masks[2])


def test_random_entries_are_equally_likely():
    masker, generator = masker_of(density=0.5, saliency_score="random")
    counts, repeats = 0, 40
    for i in range(0, 2 * repeats, 2):
        masker.refresh(i, generator)
        counts = counts + chosen(masker, generator).double()
    # Six standard deviations of the mean of that many draws.
    assert (counts / repeats - 0.5).abs().max() < 6 * 0.5 / repeats**0.5


def test_nothing_is_drawn_for_scores_that_need_no_samples():
    for score in ("magnitude", "random"):
        masker, generator = masker_of(saliency_score=score, saliency_samples="teacher")
        masker.refresh(0, generator)
        assert masker.state_dict(generator)["pool_images"] is None and masker.mask.count > 0


def test_a_resumed_mask_has_threshold_and_nan_count():
    masker, generator = masker_of()
    values = {name: torch.rand(param.shape) for name, param in generator.named_parameters()}
    next(iter(values.values())).view(-1)[:2] = math.nan
    masker.mask = saliency_mask(values, density=0.25)
    resumed, _ = masker_of()
    state = masker.state_dict(generator)
    resumed.load_state_dict(state, generator)
    assert resumed.mask.equal(masker.mask) and resumed.mask.nan_count == 2
    assert resumed.mask.threshold == masker.mask.threshold
    # Older checkpoints have the words alone.
    resumed.load_state_dict({**state, "mask": masker.mask.words}, generator)
    assert resumed.mask.equal(masker.mask) and (resumed.mask.nan_count, resumed.mask.threshold) == (0, None)


def test_wrong_options():
    with pytest.raises(ValueError, match="saliency_score is 'weight'"):
        SaliencyOptions(saliency_score="weight").check_saliency()
    with pytest.raises(ValueError, match="needs a density"):
        SaliencyOptions(saliency_score="random", density=None, threshold=0.1).check_saliency()
    SaliencyOptions(saliency_score="magnitude", density=None, threshold=0.1).check_saliency()
