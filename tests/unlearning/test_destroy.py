"""Destroying entries of the generator before it forgets: which, by how much, and nothing else."""

import math

import pytest
import torch

from pecker_fast.patches import Patch
from pecker_fast.unlearning.destroy import DestroyOptions
from pecker_fast.unlearning.distil import DistilOptions
from pecker_fast.unlearning.patch import PatchOptions
from pecker_fast.unlearning.pecker import PeckerOptions
from pecker_fast.unlearning.setting import Placement
from pecker_fast.unlearning.sfd import SFD, SFDOptions
from tests.diffusion.tiny_sd import tiny_text_network
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits
from tests.unlearning.test_methods import build, weights
from tests.unlearning.test_prompts import make_text

FEW = {"destroy_share": 0.2, "saliency_chunks": 2}


def started(name: str = "patch", teacher=None, **options):
    """A method whose last phase has started, the weights of theta before, and those after."""
    options = {"density": 0.3, **FEW, **options} if name == "patch" else {"destroy_share": 0.2, **options}
    method = build(name, teacher=teacher or tiny_unet(), **options)
    before = weights(method.generator)
    method.phases[-1].start(None)
    return method, before, weights(method.generator)


def changes(before, after) -> torch.Tensor:
    return torch.cat([(b.double() - a.double()).flatten() for a, b in zip(before, after, strict=True)])


def norm(tensors) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors))


@pytest.mark.parametrize("kind", ["noise", "shrink", "reset"])
@pytest.mark.parametrize("name", ["sfd", "patch"])
def test_only_the_named_entries_change_and_by_the_strength(name, kind):
    method, before, after = started(name, destroy=kind, destroy_strength=0.25)
    phase = method.phases[0]
    mask = phase._destroyer.mask
    assert mask.count == int(0.2 * mask.numel)
    for (key, param), old in zip(method.generator.named_parameters(), before, strict=True):
        where, new = mask[key], param.detach()
        assert same_bits(new[~where], old[~where]), key
        if kind == "shrink":
            torch.testing.assert_close(new[where], 0.75 * old[where])
        elif where.any():
            assert not torch.equal(new[where], old[where]) or old.std(correction=0) == 0, key
    moved = changes(before, after)
    record = phase.describe()
    assert record["destroyed"] == mask.density
    assert record["destroyed_norm"] == pytest.approx(norm([moved]) / norm(before), rel=1e-5)
    if kind == "noise":
        # Standard normal numbers, in the strength's share of their tensor's root mean square.
        pairs = zip(method.generator.named_parameters(), before, strict=True)
        unit = [((p.detach() - old) / (0.25 * old.square().mean().sqrt()))[mask[key]] for (key, p), old in pairs]
        unit = torch.cat([numbers for numbers in unit if numbers.isfinite().all()])
        assert len(unit) > 100 and abs(unit.mean()) < 4 / math.sqrt(len(unit))
        assert unit.std() == pytest.approx(1, abs=4 / math.sqrt(2 * len(unit)))
    # psi is as it was.
    assert all(
        same_bits(a, b) for a, b in zip(weights(method.score), weights(method.setting.problem.teacher), strict=True)
    )


def test_reset_moves_values_to_numbers_like_those_of_their_tensor():
    teacher = tiny_unet(block_out_channels=(16, 16))
    method, before, after = started("sfd", teacher, destroy="reset", destroy_share=1.0, destroy_strength=1.0)
    _, _, halved = started("sfd", teacher, destroy="reset", destroy_share=1.0, destroy_strength=0.5)
    for (key, param), old, new, middle in zip(method.generator.named_parameters(), before, after, halved, strict=True):
        # The same numbers, half way.
        torch.testing.assert_close(middle, (old + new) / 2, msg=key)
        if param.numel() > 1000:
            assert new.std() == pytest.approx(float(old.std()), rel=0.15), key
            correlation = torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1]
            assert abs(correlation) < 0.15, key


@pytest.mark.parametrize("within", ["mask", "all"])
@pytest.mark.parametrize("score", ["ratio", "random", "magnitude", "gradient"])
def test_a_patch_stays_a_patch(within, score):
    options = {"destroy": "noise", "destroy_within": within, "destroy_score": score, "saliency_score": "magnitude"}
    teacher = tiny_unet()
    plain = build("patch", teacher=teacher, density=0.25, saliency_score="magnitude", saliency_chunks=2)
    plain.phases[0].start(None), plain.phases[0].step(0)
    method, before, _ = started(teacher=teacher, density=0.25, **options)
    chosen, mask = method.phases[0]._destroyer.mask, method.phases[0].last_mask()
    # The patch's own mask is that of the generator as it was.
    assert mask.equal(plain.phases[0].last_mask())
    inside = (chosen & mask).count
    assert inside == chosen.count if within == "mask" else inside < chosen.count or score == "magnitude"
    for i in range(4):
        method.phases[0].step(i)
    changed = mask if within == "mask" else mask | chosen
    for (key, param), old in zip(method.generator.named_parameters(), before, strict=True):
        assert same_bits(param.detach()[~changed[key]], old[~changed[key]]), key
    with method.phases[0].averaged() as network:
        state = {key: value.clone() for key, value in network.state_dict().items()}
    base = {key: old for (key, _), old in zip(method.generator.named_parameters(), before, strict=True)}
    # The file has whatever was destroyed, and applying it gives the same bits.
    patch = Patch.between(base, state)
    for key, value in state.items():
        assert same_bits(patch.switched(key, base[key]) if key in patch else base[key], value), key
    entries = sum(tensor.count for tensor in patch.changed)
    assert entries <= changed.count and (entries > mask.count or inside == chosen.count)


@pytest.mark.parametrize("within", ["mask", "all"])
def test_dense_noise_has_the_same_norm(within):
    teacher = tiny_unet()
    options = {"destroy": "shrink", "destroy_within": within, "destroy_strength": 1.0}
    method, before, sparse = started(teacher=teacher, **options)
    control, _, dense = started(teacher=teacher, destroy_dense=True, **options)
    assert norm([changes(before, dense)]) == pytest.approx(norm([changes(before, sparse)]), rel=1e-4)
    mask, chosen = control.phases[0].last_mask(), control.phases[0]._destroyer.mask
    spread = 0
    for (key, param), old in zip(control.generator.named_parameters(), before, strict=True):
        different = param.detach() != old
        spread += int(different.sum())
        if within == "mask":
            assert not different[~mask[key]].any(), key
    allowed = mask.count if within == "mask" else mask.numel
    assert chosen.count < spread <= allowed and spread > 0.9 * allowed
    records = [x.phases[0].describe() for x in (method, control)]
    assert records[0]["destroyed_norm"] == records[1]["destroyed_norm"]
    assert records[1]["destroyed"] == allowed / mask.numel
    # The average starts from what is left, not from what was there.
    with control.phases[0].averaged() as network:
        assert all(same_bits(a, b) for a, b in zip(weights(network), dense, strict=True))


def test_a_seed_decides_what_is_destroyed():
    teacher = tiny_unet()
    options = {"destroy": "noise", "destroy_score": "random"}
    first, again, other = (started("pecker", teacher, seed=seed, **options)[2] for seed in (1, 1, 2))
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same_bits(a, b) for a, b in zip(first, other, strict=True))
    ratio = started("pecker", teacher, seed=1, destroy="noise")
    assert not all(same_bits(a, b) for a, b in zip(first, ratio[2], strict=True))


def test_the_first_stage_destroys_nothing():
    options = {"two_stage": True, "first_stage_steps": 2, "destroy": "shrink", "destroy_strength": 1.0}
    method = build("sfd", teacher=tiny_unet(), destroy_share=0.5, **options)
    first, second = method.phases
    before = weights(method.generator)
    first.start(None)
    assert all(same_bits(a, b) for a, b in zip(weights(method.generator), before, strict=True))
    first.step(0)
    with first.averaged() as network:
        averaged = weights(network)
    second.start(first)
    lost = sum(
        int(((new == 0) & (old != 0)).sum()) for old, new in zip(averaged, weights(method.generator), strict=True)
    )
    assert lost == second._destroyer.mask.count == int(0.5 * second._destroyer.mask.numel)
    assert "destroyed" not in first.describe()


def test_samples_for_saliency_are_drawn_before():
    teacher = tiny_unet()
    plain = build("pecker", teacher=teacher)
    plain.phases[0].start(None)
    method, *_ = started("pecker", teacher, destroy="noise", destroy_share=1.0, destroy_strength=3.0)
    assert torch.equal(method.phases[0].masker._pool[0], plain.phases[0].masker._pool[0])


def test_text_in_low_precision():
    options = {"destroy": "noise", "destroy_share": 0.01, "density": 0.02, "saliency_chunks": 2}
    low = {"weights_dtype": torch.bfloat16, "master_weights": True, "teacher_dtype": torch.bfloat16}
    method = make_text("patch", tiny_text_network(8), low, **options)
    before, phase = weights(method.generator), method.phases[0]
    phase.start(None)
    chosen, moved = phase._destroyer.mask, 0
    for (key, param), old in zip(method.generator.named_parameters(), before, strict=True):
        assert param.dtype is torch.bfloat16 and same_bits(param.detach()[~chosen[key]], old[~chosen[key]]), key
        moved += int((param.detach() != old).sum())
    assert chosen.count > moved > 0.8 * chosen.count
    assert all(loss.isfinite() for loss in phase.step(0).values())


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (DestroyOptions, {"destroy": "forget"}, "destroy is 'forget', expected one of None, noise, shrink, reset"),
        (PatchOptions, {"destroy_share": 0.0}, "destroy_share is 0.0"),
        (PatchOptions, {"destroy_share": 1.5}, "destroy_share is 1.5"),
        (PeckerOptions, {"destroy_strength": 0.0}, "destroy_strength is 0.0"),
        (PeckerOptions, {"destroy": "shrink", "destroy_strength": 1.5}, "destroy_strength is 1.5, .* at most 1"),
        (PeckerOptions, {"destroy": "reset", "destroy_strength": 1.5}, "destroy_strength is 1.5, .* at most 1"),
        (PatchOptions, {"destroy_score": "fisher"}, "destroy_score is 'fisher'"),
        (PatchOptions, {"destroy_within": "body"}, "destroy_within is 'body'"),
        (DistilOptions, {"destroy": "noise"}, "destroy is 'noise', expected None: distil forgets nothing"),
    ],
)
def test_wrong_options_are_named(kind, wrong, message):
    options = kind(**wrong)
    with pytest.raises(ValueError, match=message):
        options.check_destroy() if kind is DestroyOptions else options.check()


def test_more_than_the_mask_has():
    with pytest.raises(
        ValueError, match=r"destroy_share is 0.2, but the mask has 0.1 of the entries.*destroy_within all"
    ):
        build("patch", density=0.1, destroy="noise", destroy_share=0.2)
    with pytest.raises(ValueError, match=r"destroy_share is 0\.5, but the mask has"):
        build("patch", density=0.9, act_on=("conditioning",), destroy="noise", destroy_share=0.5)
    # Its every step is confined to one mask, too.
    with pytest.raises(ValueError, match=r"destroy_share is 0\.5, but the mask has 0\.3"):
        build("pecker", density=0.3, mask_scope="all", mask_refresh_steps=0, destroy="noise", destroy_share=0.5)
    for options in ({"destroy_within": "all"}, {"destroy_share": 0.1}):
        build("patch", density=0.1, **{"destroy": "noise", "destroy_share": 0.2, **options})
    with pytest.raises(ValueError, match=r"destroy_share is 0\.2, but destroy is None"):
        build("patch", density=0.1, destroy_share=0.2)
    with pytest.raises(ValueError, match="fsdp is set, and so is destroy"):
        Placement(fsdp=True).check_method(SFD, SFDOptions(destroy="noise"), processes=2, compile=False)
