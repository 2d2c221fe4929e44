"""Patches: the parts they act on, the choice of their entries, and their steps; test_methods.py has whole runs."""

import copy

import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.mask import SaliencyMask
from pecker_fast.patches import Patch
from pecker_fast.unlearning import ForgetRequest
from pecker_fast.unlearning.fixed_mask import parameter_parts
from pecker_fast.unlearning.patch import PatchMasker, PatchOptions, in_part, sparse_learning_rate
from pecker_fast.unlearning.streams import Streams
from tests.diffusion.tiny_sd import tiny_text_network
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits
from tests.unlearning.oracle import SHAPE, Affine, Oracle, generator_loss, make_setting, noised, one_step, score_loss
from tests.unlearning.settings import setting_of
from tests.unlearning.test_equations import add, assert_grads, build, draws
from tests.unlearning.test_methods import build as build_method
from tests.unlearning.test_methods import run, weights
from tests.unlearning.test_prompts import make_text, run_text


def fresh_masker(generator, density: float = 0.3, **options) -> PatchMasker:
    request = ForgetRequest.of(generator, [0], 1)
    setting = setting_of(teacher=copy.deepcopy(generator), schedule=NoiseSchedule.linear(), request=request)
    return PatchMasker(setting, PatchOptions(**{"saliency_chunks": 3, **options}), generator, density)


def masker_of(generator=None, density: float = 0.3, **options) -> tuple[PatchMasker, torch.nn.Module]:
    generator = generator or tiny_unet()
    masker = fresh_masker(generator, density, **options)
    masker.start(generator)
    masker.refresh(0, generator)
    return masker, generator


@pytest.mark.parametrize(("micros", "density"), [(1, 1.0), (2, 0.6)])
def test_one_step_takes_the_sum_of_both_gradients(micros, density):
    setting = make_setting((0, 2), None, seed=5)
    options = {"gradient_accumulation_steps": micros, "density": density, "saliency_score": "random"}
    method, phase, score_steps, generator_steps = build("patch", setting, **options)
    teacher, score, generator = (Oracle(n) for n in (setting.problem.teacher, method.score, method.generator))
    phase.step(1)
    expected_score = expected = None
    for micro in range(micros):
        batch, parts = draws(setting, phase, 1, micro)
        r, labels, covers = batch.retained, batch.labels, batch.teacher_labels
        pieces = slice(r), slice(r, None)
        z, eps, t = parts["score"]
        x = one_step(generator, z, 250, labels).detach()
        losses = [score_loss(score, x[s], eps[s], t[s], labels[s]) for s in pieces]
        grads = score.grads((0.8 * losses[0] + 0.3 * losses[1]) / micros)
        if expected_score is None:
            expected_score, expected = grads, {name: torch.zeros_like(grad) for name, grad in grads.items()}
        else:
            add(expected_score, grads)
        z, eps, t = parts["generator"]
        x = one_step(generator, z, 250, labels)
        losses = [generator_loss(teacher, score, x[s], eps[s], t[s], labels[s], covers[s], 1.2) for s in pieces]
        add(expected, generator.grads((0.9 * losses[0] + 0.2 * losses[1]) / micros))
    (score_step,), (generator_step,) = score_steps, generator_steps
    assert_grads(score_step["grads"], expected_score)
    # Gradients are packed: outside the mask they are zero.
    mask = phase.masker.mask
    assert mask.count == int(density * mask.numel)
    assert_grads(generator_step["grads"], {name: grad * mask[name] for name, grad in expected.items()})
    assert score_step["mask"] is None and generator_step["masked_grads"] is None and generator_step["mask"] is mask


def test_the_ratio_against_float64():
    setting = make_setting((0, 3), 1, seed=4)
    generator, network = Affine(), Affine()
    options = PatchOptions(saliency_chunks=5, saliency_chunk_size=2, saliency_damping=0.1, t_init=250)
    masker = PatchMasker(setting, options, generator, 0.5)
    start, scored = Oracle(generator), Oracle(network)
    place = (setting.compute.device, setting.compute.seed, "saliency", 0)
    fisher = {}
    for kind, classes in (("forgotten", [0, 3]), ("retained", [1, 2])):
        streams = Streams(*place)
        labels = streams.choose(f"{kind} labels", 10, torch.tensor(classes))
        z, eps = (streams.normal(f"{kind} {name}", 10, SHAPE) for name in ("z", "eps"))
        t = streams.timesteps(f"{kind} t", 10, 0, 999)
        images = one_step(start, z, 250, labels).detach()
        sums = {name: 0.0 for name in ("w", "u", "class_embedding.weight")}
        for chunk in torch.arange(10).split(2):
            error = eps[chunk].double() - scored.eps(
                noised(images[chunk], eps[chunk], t[chunk]), t[chunk], labels[chunk]
            )
            grads = scored.grads(error.square().sum((1, 2, 3)).mean())
            sums = {name: sums[name] + grads[name].square() for name in sums}
        fisher[kind] = sums
    scores, rest = masker.ranking(Streams(*place), network)
    assert rest["damping"] == 0.1
    for name in scores:
        assert torch.allclose(scores[name].double(), fisher["forgotten"][name], rtol=1e-3), name
        assert torch.allclose(rest["relative_to"][name].double(), fisher["retained"][name], rtol=1e-3), name
    # The rows of retained classes say nothing about forgotten ones.
    assert scores["class_embedding.weight"][[1, 2]].abs().max() == 0
    assert all(p.grad is None for n in (generator, network) for p in n.parameters())
    masker.refresh(0, network)
    ratio = {
        name: f / (fisher["retained"][name] + 0.1 * fisher["retained"][name].mean())
        for name, f in fisher["forgotten"].items()
    }
    values = torch.cat([ratio[name].flatten() for name in masker.mask.names])
    chosen = torch.cat([masker.mask[name].flatten() for name in masker.mask.names])
    assert chosen.sum() == 3 and values[chosen].min() > values[~chosen].max()
    gradient = PatchMasker(setting, PatchOptions(saliency_score="gradient", t_init=250), generator, 0.5)
    scores, rest = gradient.ranking(Streams(*place), network)
    assert rest == {} and scores["class_embedding.weight"][[1, 2]].abs().max() == 0


@pytest.mark.parametrize("score", ["ratio", "gradient", "magnitude", "random"])
def test_entries_outside_the_mask_keep_their_bits(score):
    method = build_method("patch", saliency_score=score, saliency_chunks=2, density=0.2, adam_beta1=0.9)
    before = weights(method.generator)
    run(method)
    phase = method.phases[0]
    mask = phase.last_mask()
    assert mask.count == int(0.2 * mask.numel)
    for (name, param), old in zip(method.generator.named_parameters(), before, strict=True):
        assert same_bits(param.detach()[~mask[name]], old[~mask[name]]), name
    moved = sum(int((p.detach() != old).sum()) for p, old in zip(method.generator.parameters(), before, strict=True))
    assert moved > 0.5 * mask.count
    for name in ("exp_avg_sq", "exp_avg", "ema"):
        assert sum(state[name].numel() for state in phase.generator_optimizer.state.values()) == mask.count, name
    with phase.averaged() as network:
        for (name, param), old in zip(network.named_parameters(), before, strict=True):
            assert same_bits(param.detach()[~mask[name]], old[~mask[name]]), name
    record = phase.describe()
    assert record["mask_density"] == record["mask_touched_ever"] == mask.density and record["mask_iou"] is None


def test_scores_differ_and_a_seed_gives_the_same_mask():
    generator = tiny_unet()
    masks = {kind: masker_of(generator, saliency_score=kind)[0].mask for kind in ("ratio", "gradient", "magnitude")}
    assert max(masks["ratio"].iou(masks[kind]) for kind in ("gradient", "magnitude")) < 0.9
    assert masker_of(generator)[0].mask.equal(masks["ratio"])
    assert not masker_of(generator, saliency_chunks=6)[0].mask.equal(masks["ratio"])


def test_act_on():
    names = ["class_embedding.weight", "time_embedding.linear_1.bias", "mid_block.resnets.0.time_emb_proj.weight"]
    assert all(in_part(name, ("conditioning",)) and not in_part(name, ("body",)) for name in names)
    assert in_part("conv_in.weight", ("body",)) and not in_part("conv_in.weight", ("conditioning", "mid_block.*"))
    assert in_part("mid_block.attentions.0.attn2.to_k.weight", ("conditioning",), text=True)
    assert not in_part("time_embedding.linear_1.bias", ("conditioning",), text=True)
    generator = tiny_unet()
    for act_on in (("conditioning",), ("body",), ("mid_block.*", "conv_out.weight")):
        masker, _ = masker_of(generator, density=0.05, act_on=act_on)
        chosen = {name for name, count in zip(masker.mask.names, masker.mask.tensor_counts(), strict=True) if count}
        assert chosen and all(in_part(name, act_on) for name in chosen)
        assert masker.mask.count == int(0.05 * masker.mask.numel) and masker.share == 0.05
    # A part smaller than the density is taken whole.
    masker, _ = masker_of(generator, density=0.9, act_on=("conv_in.*",), saliency_score="random")
    entries = sum(p.numel() for name, p in generator.named_parameters() if name.startswith("conv_in."))
    assert masker.mask.count == entries and masker.share == pytest.approx(entries / masker.mask.numel)
    with pytest.raises(ValueError, match=r"act_on has 'conv_on\.\*'"):
        masker_of(generator, act_on=("conv_on.*",))


def test_patch_is_disjoint_from_earlier_ones(tmp_path):
    generator = tiny_unet()
    first, second = (masker_of(generator, density=0.2, saliency_score=kind)[0].mask for kind in ("ratio", "random"))
    paths = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    first.save(paths[0])
    # Another order of the tensors.
    names = list(reversed(second.names))
    SaliencyMask.from_bool({name: second[name] for name in names}).save(paths[1])
    third = masker_of(generator, density=0.2, disjoint_from=tuple(paths))[0].mask
    assert (third & (first | second)).count == 0 and third.count == int(0.2 * third.numel)
    # A patch file tells the changed entries.
    base = generator.state_dict()
    result = {name: value + first[name] if name in first.names else value for name, value in base.items()}
    Patch.between(base, result).save(paths[0])
    assert masker_of(generator, density=0.2, disjoint_from=tuple(paths))[0].mask.equal(third)
    whole = ~(first & ~first)
    whole.save(paths[0])
    # Before anything is computed.
    with pytest.raises(ValueError, match="no entry is left"):
        fresh_masker(generator, disjoint_from=tuple(paths))
    # The rate is by the share that is left.
    first.save(paths[0])
    share = fresh_masker(generator, 0.95, disjoint_from=(paths[0],)).share
    assert share == pytest.approx(1 - first.density, rel=1e-12)
    for wrong in (str(tmp_path / "missing.safetensors"), str(tmp_path)):
        with pytest.raises(ValueError, match="disjoint_from has"):
            masker_of(generator, disjoint_from=(wrong,))
    with pytest.raises(ValueError, match=r"disjoint_from has .*another model"):
        masker_of(tiny_unet(block_out_channels=(8, 8)), disjoint_from=(paths[1],))


def test_the_rate_follows_the_density():
    assert sparse_learning_rate(0.1, 1.0) == 0.1
    options = {"generator_learning_rate": 1e-3, "score_learning_rate": 2e-3, "saliency_chunks": 1}
    phase = build_method("patch", density=0.25, score_density=0.5, **options).phases[0]
    phase.start(None)
    phase.step(0)
    record = phase.describe()
    assert record["generator_learning_rate"] == pytest.approx(sparse_learning_rate(1e-3, 0.25))
    assert record["score_learning_rate"] == pytest.approx(sparse_learning_rate(2e-3, 0.5))
    # A part with fewer entries gives its own share.
    method = build_method("patch", density=0.9, act_on=("conditioning",), **options)
    share = method.phases[0].masker.share
    assert share < 0.5 and method.phases[0].generator_learning_rate == sparse_learning_rate(1e-3, share)


def test_packed_gradients_change_no_step():
    teacher = tiny_unet()
    packed, dense = (build_method("patch", teacher=teacher, pack_gradients=packs) for packs in (True, False))
    run(packed), run(dense)
    assert all(same_bits(a, b) for a, b in zip(weights(packed.generator), weights(dense.generator), strict=True))
    entries = sum(p.numel() for p in teacher.parameters())
    assert dense.phases[0].gradient_bytes() == 4 * entries
    # Each tensor's part is padded to 16 bytes or more.
    assert packed.phases[0].gradient_bytes() < 4 * (0.1 * entries + 8 * len(weights(teacher)))


def test_the_score_network_can_be_a_patch_too():
    method = build_method("patch", score_density=0.4, saliency_chunks=2, act_on=("body",))
    before = weights(method.score)
    run(method)
    phase = method.phases[0]
    mask = phase.score_masker.mask
    assert mask.count == int(0.4 * mask.numel) and phase.describe()["score_mask_density"] == mask.density
    for (name, param), old in zip(method.score.named_parameters(), before, strict=True):
        assert same_bits(param.detach()[~mask[name]], old[~mask[name]]), name
    # Its mask is not confined to the part of the generator's.
    assert mask["class_embedding.weight"].any() and not phase.last_mask()["class_embedding.weight"].any()


def test_text_and_low_precision():
    teacher = tiny_text_network(8)
    low = {"weights_dtype": torch.bfloat16, "master_weights": True, "teacher_dtype": torch.bfloat16}
    options = {"saliency_chunks": 2, "saliency_chunk_size": 2, "act_on": ("conditioning",), "density": 0.02}
    method, losses = run_text("patch", teacher, 2, low, **options)
    assert all(loss.isfinite() for loss in losses.values())
    mask = method.phases[0].last_mask()
    assert mask.names == tuple(n for n, _ in teacher.unet.named_parameters()) and mask.count == int(0.02 * mask.numel)
    for (name, param), old in zip(method.generator.named_parameters(), teacher.parameters(), strict=True):
        assert same_bits(param.detach()[~mask[name]], old.detach().bfloat16()[~mask[name]]), name
        assert ".attn2." in name or not mask[name].any()


def test_placements_that_make_no_sense():
    teacher = tiny_text_network(8)
    with pytest.raises(ValueError, match="fsdp is set, but patch shards no networks"):
        make_text("patch", teacher, {"fsdp": True})
    with pytest.raises(ValueError, match=r"score_density is 0.5 and score_lora_rank 2"):
        make_text("patch", teacher, {"score_lora_rank": 2}, score_density=0.5)
    pytest.importorskip("peft")
    method, losses = run_text("patch", teacher, 1, {"score_lora_rank": 2}, saliency_chunks=2)
    assert all(loss.isfinite() for loss in losses.values()) and method.phases[0].score_masker is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"density": 0.0},
        {"score_density": 1.5},
        {"saliency_chunks": 0},
        {"saliency_chunk_size": 0.5},
        {"saliency_damping": -1.0},
        {"saliency_score": "fisher"},
        {"act_on": ()},
        {"variance": "retain"},
    ],
)
def test_wrong_options_are_named(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        PatchOptions(**wrong).check()


def test_a_mask_in_parts_is_that_of_all_scores_together(tmp_path):
    # One level of resolution, because each tensor is a part once.
    teacher = tiny_unet(block_out_channels=(4,), attention_resolutions=(8,))
    params = dict(teacher.named_parameters())
    first, _ = masker_of(copy.deepcopy(teacher), density=0.1, saliency_chunks=1)
    path = str(tmp_path / "mask.safetensors")
    first.mask.save(path)
    for options in ({}, {"saliency_score": "gradient", "act_on": ("body",), "disjoint_from": (path,)}):
        masks = []
        for count in (1, 3, 500):
            request = ForgetRequest.of(teacher, [0], 1)
            network = copy.deepcopy(teacher).requires_grad_(True)
            setting = setting_of(
                teacher=copy.deepcopy(teacher),
                schedule=NoiseSchedule.linear(),
                request=request,
                saliency_parts=count,
            )
            masker = PatchMasker(setting, PatchOptions(saliency_chunks=2, **options), network, 0.2)
            parts = parameter_parts(network, count)
            assert [name for part in parts for name in part] == list(params) and len(parts) <= count
            assert count == 500 or len(parts) == count
            masker.refresh(0, network)
            masks.append(masker.mask)
            assert all(p.requires_grad and p.grad is None for p in network.parameters())
        assert all(torch.equal(mask.words, masks[0].words) for mask in masks[1:])
        assert {mask.threshold for mask in masks} == {masks[0].threshold} and masks[0].names == masks[1].names
    with pytest.raises(ValueError, match="saliency_parts is 2, but sfd has no mask that is chosen once"):
        make_text("sfd", tiny_text_network(8), {"saliency_parts": 2})
    with pytest.raises(ValueError, match="saliency_parts"):
        setting_of(teacher=teacher, schedule=NoiseSchedule.linear(), request=request, saliency_parts=0)
