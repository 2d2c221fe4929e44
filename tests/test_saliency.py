"""saliency_mask and SaliencyAccumulator."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import pecker_fast as pf
from tests import oracle
from tests.inputs import FLOATS, SCORE_KINDS, same_bits, scores

SHAPES = [(40, 33), (7,), (), (0, 3), (3, 4, 5, 6)]


def random_scores(kind: str = "normal") -> list[torch.Tensor]:
    return [scores(kind, math.prod(s), FLOATS[i % 3]).view(s) for i, s in enumerate(SHAPES)]


def check(mask: pf.SaliencyMask, expected: oracle.Selection) -> None:
    assert (mask.words.cpu().numpy() == oracle.all_words(expected.masks)).all()
    assert (mask.count, mask.threshold) == (expected.count, expected.threshold)
    assert mask.nan_count == expected.nan_count


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(9, 5))


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_density_k_and_threshold(kind, backend):
    tensors = random_scores(kind)
    total = sum(t.numel() for t in tensors)
    for density in (1e-9, float(np.random.uniform(0.01, 0.99)), 1.0, 1):
        k = max(1, int(density * total))
        check(pf.saliency_mask(tensors, density=density, backend=backend), oracle.select(tensors, k))
    for k in (1, total):
        check(pf.saliency_mask(tensors, k=k, backend=backend), oracle.select(tensors, k))
    check(pf.saliency_mask(tensors, k=9, ties="all", backend=backend), oracle.select(tensors, 9, ties_all=True))
    for threshold in (0, 0.5, 1e-40, 1e300, math.inf):
        # A magnitude is compared with the threshold itself, not with its float32 rounding.
        check(pf.saliency_mask(tensors, threshold=threshold, backend=backend), at_least(tensors, threshold))


def at_least(tensors: list[torch.Tensor], threshold: float) -> oracle.Selection:
    values = np.concatenate([np.abs(oracle.to_numpy(t).astype(np.float64)).reshape(-1) for t in tensors])
    reached = values[(values >= threshold) & (values > 0)]
    expected = oracle.keep_at_least(tensors, float(reached.min()) if reached.size else math.inf)
    return expected


def test_threshold_between_two_floats():
    one = torch.tensor([1.0, 1.0 + 2**-23])
    assert pf.saliency_mask([one], threshold=1.0 + 2**-30)[0].tolist() == [False, True]
    assert pf.saliency_mask([one], threshold=1.0)[0].tolist() == [True, True]


def test_kept_share_is_salun_floor():
    mask = pf.saliency_mask([torch.randn(7)], density=0.5)
    assert mask.count == 3 and mask.density == 3 / 7


def test_several_at_once_equal_single_calls(backend):
    tensors = random_scores("ties")
    for name, values in (("density", [0.9, 0.1, 0.5]), ("k", (5, 1, 100)), ("threshold", [0.5, 1.0, 7.0])):
        for scope in ("global", "tensor"):
            if scope == "tensor" and name == "k":
                continue
            masks = pf.saliency_mask(tensors, **{name: values}, scope=scope, backend=backend)
            assert isinstance(masks, list) and len(masks) == len(values)
            for mask, value in zip(masks, values, strict=True):
                single = pf.saliency_mask(tensors, **{name: value}, scope=scope, backend=backend)
                assert mask.equal(single) and mask.threshold == single.threshold and mask.count == single.count
    assert isinstance(pf.saliency_mask(tensors, density=[0.5]), list)


@pytest.mark.parametrize("ties", ["lowest_index", "all"])
def test_scope_tensor(ties, backend):
    tensors = random_scores("ties")
    mask = pf.saliency_mask(tensors, density=0.3, scope="tensor", ties=ties, backend=backend)
    for i, tensor in enumerate(tensors):
        if tensor.numel() == 0:
            assert mask.threshold[i] == math.inf
            continue
        expected = oracle.select([tensor], max(1, int(0.3 * tensor.numel())), ties_all=ties == "all")
        assert (mask[i].view(-1).cpu().numpy() == expected.masks[0]).all() and mask.threshold[i] == expected.threshold
    named = pf.saliency_mask({"a": tensors[0], "b": tensors[1]}, threshold=1.0, scope="tensor", backend=backend)
    assert set(named.threshold) == {"a", "b"}
    assert torch.equal(named["a"], tensors[0].float().abs() >= 1.0)


def test_module_mapping_and_iterable_agree(backend):
    net = network()
    net[2].bias.requires_grad_(False)
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    net[1].weight.grad = None
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    k = 100
    expected = oracle.select(list(grads.values()), k)
    from_module = pf.saliency_mask(net, k=k, backend=backend)
    assert from_module.names == tuple(named) and "2.bias" not in from_module.names
    from_mapping = pf.saliency_mask(grads, k=k, backend=backend)
    from_list = pf.saliency_mask((g for g in grads.values()), k=k, backend=backend)
    for mask in (from_module, from_mapping, from_list):
        check(mask, expected)
    assert from_list.names is None and from_mapping.names == tuple(named)
    assert not from_module["1.weight"].any()
    assert from_module.align(list(named.values())[::-1]) == list(range(len(named)))[::-1]
    # Each of several masks knows the parameters too, without names, and so do masks made from them.
    several = pf.saliency_mask(net, k=[3, k], backend=backend)
    for mask in (*several, several[0] | several[1]):
        assert mask.align(list(named.values())[::-1]) == list(range(len(named)))[::-1]


def test_missing_grads_count_as_zeros():
    net = network()
    # At least one parameter must have a gradient.
    net[2].bias.grad = torch.zeros(5)
    assert pf.saliency_mask(net, density=0.5).count == 0
    per_tensor = pf.saliency_mask(net, density=0.5, scope="tensor")
    assert per_tensor.count == 0 and set(per_tensor.threshold.values()) == {math.inf}
    # N counts every entry, those without a gradient too.
    net[2].weight.grad = torch.randn(5, 9)
    total = sum(p.numel() for p in net.parameters())
    assert pf.saliency_mask(net, density=20 / total).count == int(20 / total * total)


def test_index_order_is_row_major_whatever_the_strides(backend):
    base = scores("ties", 2 * 3 * 4 * 6).view(2, 3, 4, 6)
    variants = [
        base,
        base.to(memory_format=torch.channels_last),
        base.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.stack([base, base], -1)[..., 0],
        base[:, :, :1].expand(2, 3, 4, 6),
    ]
    for tensor in variants:
        tensors = [tensor, torch.full((50,), 0.5)]
        check(pf.saliency_mask(tensors, k=60, backend=backend), oracle.select([g.contiguous() for g in tensors], 60))


def test_scores_are_only_read(backend):
    tensors = random_scores("special")
    before = [t.clone() for t in tensors]
    parameter = nn.Parameter(torch.randn(5))
    pf.saliency_mask([*tensors, parameter], density=[0.1, 0.5], backend=backend)
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))


def test_count_and_threshold_are_lazy(monkeypatch):
    calls = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: calls.append("item") or item(self))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self, f=torch.Tensor.tolist: calls.append("tolist") or f(self))
    mask = pf.saliency_mask([torch.randn(1000)], density=0.5)
    # Argument checks may read CPU tensors; the selection's results are read on demand.
    calls.clear()
    _ = mask.threshold
    assert calls
    calls.clear()
    _ = mask.count
    first = len(calls)
    _ = mask.count
    assert first > 0 and len(calls) == first


def test_masks_are_the_same_on_all_backends(backend):
    for kind in ("ties", "special", "heavy"):
        tensors = random_scores(kind)
        ours = pf.saliency_mask(tensors, density=0.37, backend=backend)
        reference = pf.saliency_mask(tensors, density=0.37, backend="reference")
        assert torch.equal(ours.words, reference.words) and ours.threshold == reference.threshold


WRONG = [
    ({}, ValueError, "exactly one of density, k and threshold"),
    ({"density": 0.5, "k": 3}, ValueError, "exactly one of density, k and threshold"),
    ({"density": 0.0}, ValueError, r"density is 0.0.*\(0, 1\]"),
    ({"density": -0.5}, ValueError, "density is -0.5"),
    ({"density": 1.5}, ValueError, "density is 1.5"),
    ({"density": math.nan}, ValueError, "density is nan"),
    ({"density": "0.5"}, TypeError, "density"),
    ({"density": True}, TypeError, "density"),
    ({"density": []}, ValueError, "density is empty"),
    ({"density": [0.5, 2.0]}, ValueError, "density is 2.0"),
    ({"k": 0}, ValueError, "k is 0"),
    ({"k": 11}, ValueError, "k is 11.*10"),
    ({"k": [3, 11]}, ValueError, "k is 11"),
    ({"k": 2.0}, TypeError, "k is 2.0"),
    ({"threshold": -1.0}, ValueError, "threshold is -1.0"),
    ({"threshold": math.nan}, ValueError, "threshold is nan"),
    ({"k": 3, "scope": "layer"}, ValueError, 'scope.*"global" or "tensor"'),
    ({"k": 3, "ties": "random"}, ValueError, 'ties.*"lowest_index" or "all"'),
    ({"k": 3, "backend": "tpu"}, ValueError, "backend is 'tpu'"),
    ({"k": 8, "scope": "tensor"}, ValueError, "k is 8.*7"),
]


@pytest.mark.parametrize("options, error, message", WRONG)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        pf.saliency_mask([torch.randn(7), torch.randn(3)], **options)


def test_wrong_scores():
    for wrong, error, message in [
        (torch.randn(3), TypeError, "one tensor"),
        ([torch.randn(3), 1.0], TypeError, r"\[1\] is float"),
        ({"a": torch.randn(3), "w": torch.randn(3).double()}, TypeError, "'w'.*float64"),
        ([torch.ones(3, dtype=torch.int64)], TypeError, r"\[0\].*int64"),
        ([torch.ones(3, dtype=torch.complex64)], TypeError, "complex64"),
        ([torch.randn(3).to_sparse()], TypeError, "sparse"),
        ([], ValueError, "no entries"),
        ([torch.zeros(0)], ValueError, "no entries"),
        (nn.ReLU(), ValueError, "no entries"),
        ([torch.randn(3), torch.randn(3, device="meta")], ValueError, r"\[1\] is on meta"),
    ]:
        with pytest.raises(error, match=message):
            pf.saliency_mask(wrong, density=0.5)


# ---- accumulator


@pytest.mark.parametrize("reduce", ["sum", "abs_sum", "sq_sum"])
def test_accumulator(reduce, backend):
    net = network()
    net[0].weight.data = net[0].weight.data.contiguous(memory_format=torch.channels_last)
    accumulator = pf.SaliencyAccumulator(net, reduce=reduce, backend=backend)
    totals = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in net.named_parameters()}
    for batch in range(3):
        for name, param in net.named_parameters():
            param.grad = None if (name, batch) == ("1.bias", 1) else torch.randn_like(param)
            if param.grad is not None:
                grad = param.grad.double()
                totals[name] += {"sum": grad, "abs_sum": grad.abs(), "sq_sum": grad**2}[reduce]
        before = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
        accumulator.add()
        assert all(before[n] is None or same_bits(p.grad, before[n]) for n, p in net.named_parameters())
    assert accumulator.batches == 3
    for name, total in totals.items():
        assert accumulator.scores[name].dtype == torch.float32
        assert torch.allclose(accumulator.scores[name].double(), total, rtol=1e-5, atol=1e-6)
    mask = accumulator.mask(density=0.25)
    check(mask, oracle.select([accumulator.scores[n].contiguous() for n in totals], int(0.25 * mask.numel)))
    assert mask.names == tuple(totals) and mask.align(list(net.parameters())) == list(range(len(totals)))
    two = accumulator.mask(density=[0.25, 0.5])
    assert two[0].equal(mask) and two[1].align(list(net.parameters())[:1]) == [0]
    accumulator.reset()
    assert accumulator.batches == 0 and not any(s.any() for s in accumulator.scores.values())


@pytest.mark.parametrize("reduce", ["sum", "sq_sum"])
def test_accumulator_that_consumes_gradients(reduce, backend):
    def linear():
        # Used twice: its gradient is the sum of both.
        torch.manual_seed(0)
        layer = nn.Linear(5, 5)
        return layer, lambda x: layer(layer(x)).square().sum()

    (one, loss), (two, other_loss) = linear(), linear()
    expected = pf.SaliencyAccumulator(one, reduce, backend=backend)
    consuming = pf.SaliencyAccumulator(two, reduce, backend=backend)
    batches = torch.randn(3, 4, 5)
    with consuming.consuming():
        for x in batches:
            loss(x).backward()
            expected.add()
            one.zero_grad()
            other_loss(x).backward()
            assert all(param.grad is None for param in two.parameters())
    other_loss(batches[0]).backward()
    assert all(param.grad is not None for param in two.parameters())
    assert all(same_bits(expected.scores[name], score) for name, score in consuming.scores.items())
    with pytest.raises(RuntimeError, match="parameter weight has a gradient already"), consuming.consuming():
        pass


def test_accumulator_of_low_precision_sums_in_float32():
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    accumulator = pf.SaliencyAccumulator([param])
    for _ in range(300):
        param.grad = torch.tensor([1.0, -1.0, 2**-8], dtype=torch.bfloat16)
        accumulator.add()
    assert accumulator.scores["0"].tolist() == [300.0, -300.0, 300 * 2**-8]


def test_accumulator_reads_expanded_gradients():
    param = nn.Parameter(torch.zeros(4, 5))
    accumulator = pf.SaliencyAccumulator([("w", param)])
    param.grad = torch.ones(()).expand(4, 5)
    accumulator.add()
    param.grad = torch.arange(20.0).view(5, 4).t()
    accumulator.add()
    assert torch.equal(accumulator.scores["w"], 1 + torch.arange(20.0).view(5, 4).t())


def test_accumulator_errors():
    with pytest.raises(ValueError, match=r'reduce is .mean..*"sum", "abs_sum" or "sq_sum"'):
        pf.SaliencyAccumulator(network(), reduce="mean")
    with pytest.raises(ValueError, match="no parameters"):
        pf.SaliencyAccumulator(nn.ReLU())
    with pytest.raises(TypeError, match=r"weight is torch.float64"):
        pf.SaliencyAccumulator(nn.Linear(2, 2).double())
    embedding = nn.Embedding(5, 3, sparse=True)
    accumulator = pf.SaliencyAccumulator(embedding)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"weight.*sparse"):
        accumulator.add()
    assert not accumulator.scores["weight"].any() and accumulator.batches == 0


def test_a_model_without_gradients_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"none of the model's 4 parameters .* call loss.backward\(\) first"):
        pf.saliency_mask(model, density=0.5)
    model[0](torch.randn(1, 3)).sum().backward()
    assert pf.saliency_mask(model, density=1.0).count <= 8
