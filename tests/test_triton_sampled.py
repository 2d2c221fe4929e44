"""Triton's sampled selection gives the reference's bits whether the sample hits, misses, or overflows the buffer."""

import pytest
import torch

from pecker_fast.ops import reference

KINDS = ("normal", "constant", "zeros", "few", "subnormal", "least", "heavy", "special")
NUMELS = [300, 0, 1, 33, 515, 128]


@pytest.fixture(scope="module")
def triton_device() -> str:
    from pecker_fast.kernels import why_not

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_not("select", torch.device(device))
    if reason:
        pytest.skip(reason)
    return device


def scores_of(kind: str, dtypes: tuple[torch.dtype, ...], device: str) -> list[torch.Tensor]:
    scores = []
    for i, numel in enumerate(NUMELS):
        x = torch.randn(numel)
        if kind == "constant":
            x = torch.full((numel,), -0.5)
        elif kind == "zeros":
            x = x * 0.0
        elif kind == "few":
            x = torch.randint(-3, 4, (numel,)).float()
        elif kind == "subnormal":
            x = x * 1e-40
        elif kind == "least":
            # Keys 0, 1 and 2: the very end of the order.
            x = torch.randint(0, 3, (numel,), dtype=torch.int32).view(torch.float32)
        elif kind == "heavy":
            x = x.exp().pow(8)
        elif kind == "special":
            values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1.0, -1.0, 0.25])
            x = values[torch.randint(len(values), (numel,))]
        scores.append(x.to(dtypes[i % len(dtypes)]).to(device))
    return scores


@pytest.mark.parametrize(
    "kind, ties_all", [*((kind, False) for kind in KINDS), *((kind, True) for kind in ("normal", "few", "least"))]
)
def test_equals_reference(kind, ties_all, triton_device):
    from pecker_fast.kernels.sampled_select import Sampling
    from pecker_fast.kernels.select import select

    total = sum(NUMELS)
    ranks = [1, total + 5] if ties_all else [total + 5, total // 2]
    # Wide brackets hit; narrow ones miss on some rows and not on others.
    for sigmas, spare, dtypes in ((5.0, 8.0, (torch.float32,)), (0.1, 0.0, (torch.float32, torch.bfloat16))):
        scores = scores_of(kind, dtypes, triton_device)
        ks = torch.tensor([ranks[0], int(torch.randint(1, total, ()))], device=triton_device)
        ranks.reverse()
        sampling = Sampling(samples=200, sigmas=sigmas, spare=spare, from_entries=1)
        expected = reference.select(scores, ks, ties_all)
        result = select(scores, ks, ties_all, block=256, sampling=sampling)
        for name, a, b in zip(("words", "thresholds", "counts", "nan_count"), result, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), f"{name} of {kind}, sigmas={sigmas}, ks={ks.tolist()}"


@pytest.mark.parametrize("kind", ["normal", "constant", "zeros", "few"])
def test_wide_bracket_needs_no_fallback(kind, triton_device):
    from pecker_fast.kernels.sampled_select import Sampling, sampled_masks

    from pecker_fast.kernels import select as triton_select

    scores = scores_of(kind, (torch.float32,), triton_device)
    ks = torch.tensor([sum(NUMELS) // 2], device=triton_device)
    tables = triton_select.Scores(scores, ks.device, 128)
    masks = triton_select.Masks(tables, 1)
    with triton_select.on_device(ks.device):
        flags = sampled_masks(tables, masks, ks, False, Sampling(samples=200, from_entries=1))
    assert flags.tolist() == [0]
    assert torch.equal(masks.words, reference.select(scores, ks)[0])


def test_overflowing_buffer_is_noticed(triton_device, monkeypatch):
    from pecker_fast.kernels.sampled_select import Sampling
    from pecker_fast.kernels.select import select

    monkeypatch.setattr(Sampling, "capacity", lambda self, words: 16)
    scores = scores_of("normal", (torch.float32,), triton_device)
    ks = torch.tensor([sum(NUMELS) // 2], device=triton_device)
    result = select(scores, ks, block=128, sampling=Sampling(samples=200, from_entries=1))
    for a, b in zip(result, reference.select(scores, ks), strict=True):
        assert torch.equal(a, b)
