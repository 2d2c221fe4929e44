"""saliency_mask(relative_to=...): scores ranked by their quotients by others."""

import math

import pytest
import torch
from torch import nn

import pecker_fast as pf
from tests import oracle
from tests.inputs import SCORE_KINDS, same_bits
from tests.test_saliency import at_least, check, network, random_scores


def made(kind: str, other: str = "normal", damping: float = 0.01):
    own, others = random_scores(kind), random_scores(other)
    return own, others, oracle.quotients(own, others, damping)


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_density_k_and_threshold(kind, backend):
    for other, damping in (("normal", 0.01), ("special", 0.5), ("zeros", 0.0)):
        own, others, quotients = made(kind, other, damping)
        relative = {"relative_to": others, "damping": damping, "backend": backend}
        total = sum(t.numel() for t in own)
        check(pf.saliency_mask(own, density=0.3, **relative), oracle.select(quotients, int(0.3 * total)))
        check(pf.saliency_mask(own, k=9, ties="all", **relative), oracle.select(quotients, 9, ties_all=True))
        check(pf.saliency_mask(own, threshold=1.5, **relative), at_least(quotients, 1.5))
        check(pf.saliency_mask(own, threshold=0, **relative), at_least(quotients, 0))


def test_all_backends_agree(backend):
    for kind, other in (("heavy", "heavy"), ("ties", "ties"), ("subnormal", "subnormal")):
        own, others, _ = made(kind, other)
        ours = pf.saliency_mask(own, density=0.37, relative_to=others, backend=backend)
        reference = pf.saliency_mask(own, density=0.37, relative_to=others, backend="reference")
        assert torch.equal(ours.words, reference.words) and ours.threshold == reference.threshold


def test_several_at_once_and_each_tensor_on_its_own(backend):
    own, others, quotients = made("heavy", "heavy")
    relative = {"relative_to": others, "backend": backend}
    masks = pf.saliency_mask(own, density=[0.9, 0.1, 0.5], **relative)
    for mask, density in zip(masks, (0.9, 0.1, 0.5), strict=True):
        assert mask.equal(pf.saliency_mask(own, density=density, **relative))
    mask = pf.saliency_mask(own, density=0.3, scope="tensor", **relative)
    for i, quotient in enumerate(quotients):
        if quotient.numel():
            expected = oracle.select([quotient], max(1, int(0.3 * quotient.numel())))
            assert (mask[i].view(-1).cpu().numpy() == expected.masks[0]).all()
            assert mask.threshold[i] == expected.threshold


def test_the_mean_is_that_of_each_tensor():
    # Relative to the mean of both, the second tensor's entries would come last.
    own = [torch.tensor([1.0, 1.0]), torch.tensor([1e-3, 2e-3])]
    others = [torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2e-6])]
    mask = pf.saliency_mask(own, k=2, relative_to=others, damping=1.0)
    assert [mask[i].tolist() for i in range(2)] == [[False, False], [True, True]]
    assert mask.threshold == float(torch.tensor(2e-3) / (torch.tensor(2e-6) + torch.tensor(1e-6)))


def test_one_tensor_of_quotients_gives_the_same_mask():
    own, others = torch.randn(500).square(), torch.randn(500).square()
    # Exact in float32: the mean and a power of two.
    others = torch.round(others * 64) / 64
    quotient = own / (others + 0.5 * others.double().mean().float())
    fused = pf.saliency_mask([own], density=0.1, relative_to=[others], damping=0.5)
    assert fused.equal(pf.saliency_mask([quotient], density=0.1))


def test_roots_do_not_change_the_order():
    own, others = torch.rand(2000), torch.rand(2000)
    mask = pf.saliency_mask([own], density=0.2, relative_to=[others])
    ratio = own.double() / (others.double() + 0.01 * others.double().mean())
    assert torch.equal(mask[0], ratio.sqrt() >= ratio.sqrt().topk(400).values[-1])


def test_modules_mappings_and_lists(backend):
    first, second = network(), network()
    for param in (*first.parameters(), *second.parameters()):
        param.grad = torch.randn_like(param)
    first[1].weight.grad = None
    second[2].bias.grad = None
    own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in first.named_parameters()}
    others = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in second.named_parameters()}
    backwards = dict(reversed(others.items()))
    expected = oracle.select(oracle.quotients([*own.values()], [*others.values()], 0.01), 100)
    for scores, relative_to in ((first, second), (own, backwards), ([*own.values()], others)):
        check(pf.saliency_mask(scores, k=100, relative_to=relative_to, backend=backend), expected)
    more = {**others, "elsewhere": torch.zeros(3)}
    with pytest.raises(ValueError, match="relative_to has 7 tensors, scores has 6"):
        pf.saliency_mask(own, k=3, relative_to=more)


def test_row_major_whatever_the_strides(backend):
    own, other = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    expected = oracle.select(oracle.quotients([own], [other], 0.01), 60)
    permuted = own.to(memory_format=torch.channels_last), other.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    check(pf.saliency_mask(permuted[:1], k=60, relative_to=permuted[1:], backend=backend), expected)


def test_both_are_only_read(backend):
    own, others, _ = made("special", "special")
    before = [t.clone() for t in (*own, *others)]
    pf.saliency_mask(own, density=[0.1, 0.5], relative_to=others, backend=backend)
    assert all(same_bits(a, b) for a, b in zip((*own, *others), before, strict=True))


def test_accumulators(backend):
    net = network()
    forget, retained = (pf.SaliencyAccumulator(net, "sq_sum", backend=backend) for _ in range(2))
    for accumulator in (forget, forget, retained, retained):
        for param in net.parameters():
            param.grad = torch.randn_like(param)
        accumulator.add()
    mask = forget.mask(density=0.2, relative_to=retained.scores, damping=0.1)
    quotients = oracle.quotients([*forget.scores.values()], [*retained.scores.values()], 0.1)
    check(mask, oracle.select(quotients, int(0.2 * mask.numel)))
    assert mask.align(list(net.parameters())) == list(range(len(mask.names)))


WRONG = [
    ({"damping": -0.1}, ValueError, "damping is -0.1"),
    ({"damping": math.nan}, ValueError, "damping is nan"),
    ({"damping": math.inf}, ValueError, "damping is inf"),
    ({"damping": "0.1"}, TypeError, "damping is '0.1'"),
    ({"relative_to": 3}, TypeError, r"relative_to is int, expected a module, a mapping of tensors or several tensors"),
    ({"relative_to": torch.ones(3)}, TypeError, r"relative_to is one tensor.*\[relative_to\]"),
    ({"relative_to": [torch.ones(3)]}, ValueError, "relative_to has 1 tensors, scores has 2"),
    ({"relative_to": [torch.ones(3), torch.ones(4)]}, ValueError, r"relative_to\[1\] has shape \(4,\), scores 'b' has"),
    ({"relative_to": {"a": torch.ones(3), "c": torch.ones(5)}}, ValueError, "relative_to has no 'b'"),
    ({"relative_to": [torch.ones(3), torch.ones(5).half()]}, TypeError, r"relative_to\[1\] is torch.float16, expected"),
    ({"relative_to": [torch.ones(3), torch.ones(5).double()]}, TypeError, r"relative_to\[1\].*float64"),
    ({"relative_to": [torch.ones(3), None]}, TypeError, r"relative_to\[1\] is NoneType"),
    ({"relative_to": nn.Linear(5, 3)}, ValueError, "none of the model's 2 parameters"),
]


@pytest.mark.parametrize("options, error, message", WRONG)
def test_refused_inputs(options, error, message):
    scores = {"a": torch.ones(3), "b": torch.ones(5)}
    with pytest.raises(error, match=message):
        pf.saliency_mask(scores, **{"k": 2, "relative_to": list(scores.values()), **options})
