"""What only a GPU shows: steps and selections neither wait nor allocate, and run from a CUDA graph."""

import pytest
import torch
from torch import nn

import pecker_fast as pf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = ((1,), (33,), (1023,), (64, 3, 3, 3), (0,), (128, 257))
BACKENDS = ("cuda", "triton")


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return {str(i): torch.randn(s, generator=generator, device="cuda") for i, s in enumerate(SHAPES)}


def network() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value) for name, value in tensors(0).items()}


def optimizer(params: dict[str, nn.Parameter], backend: str, **options) -> pf.MaskedAdam:
    given = {"lr": 1e-2, "betas": (0.0, 0.99), "clip_value": 1.0, "backend": backend, **options}
    return pf.MaskedAdam(params.items(), **given)


def give(params: dict[str, nn.Parameter], seed: int) -> None:
    """New gradients, in the memory of the old ones where there are any: a graph reads them there."""
    for name, grad in tensors(seed).items():
        if params[name].grad is None:
            params[name].grad = grad
        else:
            params[name].grad.copy_(grad)


def step_of(kind: str, opt: pf.MaskedAdam, params: dict[str, nn.Parameter]):
    mask = pf.saliency_mask(tensors(7), density=0.3, backend="cuda")
    if kind == "plain":
        return opt.step
    if kind == "masked":
        return lambda: opt.step(mask=mask)
    forget = list(tensors(8).values())
    return lambda: opt.step(mask=mask, masked_grads=forget)


@pytest.mark.parametrize("kind", ["plain", "masked", "joint"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_step_does_what_steps_do(kind, name):
    captured, plain = network(), network()
    give(captured, 1), give(plain, 1)
    options = {"capturable": True, "ema_decay": 0.9}
    a, b = optimizer(captured, name, **options), optimizer(plain, name, **options)
    one, two = step_of(kind, a, captured), step_of(kind, b, plain)
    # A graph needs all memory to be there: the first steps run outside, on a stream of their own.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            one()
    torch.cuda.current_stream().wait_stream(side)
    two(), two()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()
    for seed in (2, 3, 4):
        give(captured, seed), give(plain, seed)
        graph.replay()
        two()
    for key in captured:
        assert torch.equal(captured[key], plain[key]), key
    for x, y in zip(a.ema_parameters(), b.ema_parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_selection_follows_its_gradients(name):
    grads = tensors(1)
    for _ in range(2):
        pf.saliency_mask(grads, density=0.2, backend=name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = pf.saliency_mask(grads, density=0.2, backend=name)
    for seed in (5, 6):
        for key, value in tensors(seed).items():
            grads[key].copy_(value)
        graph.replay()
        assert torch.equal(mask.words, pf.saliency_mask(tensors(seed), density=0.2, backend="reference").words)


@pytest.mark.parametrize("kind", ["plain", "masked", "joint"])
@pytest.mark.parametrize("name", BACKENDS)
def test_steps_and_selections_neither_wait_nor_allocate(kind, name):
    params = network()
    give(params, 1)
    opt = optimizer(params, name)
    step, grads = step_of(kind, opt, params), tensors(9)
    for _ in range(3):
        step()
        pf.saliency_mask(grads, density=0.2, backend=name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        between = torch.cuda.memory_stats()["allocation.all.allocated"]
        pf.saliency_mask(grads, density=0.2, backend=name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert between == before, "a step allocates"


def test_more_entries_than_an_int32_can_count():
    free, _ = torch.cuda.mem_get_info()
    count = 2**32 + 5
    if free < 14 * count:
        pytest.skip("needs 60 GB of GPU memory")
    grad = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, count - 1], device="cuda")
    grad[places] = 1.0
    mask = pf.saliency_mask({"p": grad}, k=len(places), backend="cuda")
    kept = mask["p"]
    assert int(kept.sum()) == len(places) and bool(kept[places].all())
    param = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device="cuda"))
    param.grad = grad
    pf.MaskedAdam([("p", param)], lr=1.0, betas=(0.0, 0.9), packed=True, backend="cuda").step(mask=mask)
    assert int((param != 0).sum()) == len(places) and bool((param[places] != 0).all())
