"""Tests that need a GPU: steps and selections that neither wait nor allocate, CUDA graphs, and large inputs."""

import pytest
import torch
from torch import nn

import pecker_fast as pf
from pecker_fast import ops
from tests.inputs import same_bits, scores

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
    options = {"lr": 1e-2, "betas": (0.0, 0.99), "clip_value": 1.0, "backend": backend, **options}
    return pf.MaskedAdam(params.items(), **options)


def set_grads(params: dict[str, nn.Parameter], seed: int) -> None:
    """New gradients, in the memory of any old ones, where a graph reads them."""
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
    masked_grads = list(tensors(8).values())
    return lambda: opt.step(mask=mask, masked_grads=masked_grads)


@pytest.mark.parametrize("kind", ["plain", "masked", "joint"])
@pytest.mark.parametrize("name", BACKENDS)
def test_captured_step_equals_ordinary_steps(kind, name):
    captured, plain = network(), network()
    set_grads(captured, 1), set_grads(plain, 1)
    options = {"capturable": True, "ema_decay": 0.9}
    a, b = optimizer(captured, name, **options), optimizer(plain, name, **options)
    one, two = step_of(kind, a, captured), step_of(kind, b, plain)
    # A graph needs all memory allocated beforehand: the first steps run outside it, on a separate stream.
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
        set_grads(captured, seed), set_grads(plain, seed)
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
    set_grads(params, 1)
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


# Sampled selections, by far the most of those in production, begin at 4 and 8 million entries.
LARGE = [
    *((kind, 8_400_001) for kind in ("normal", "heavy", "ties", "two_valued", "constant", "zeros", "special")),
    *((kind, 40_000_003) for kind in ("normal", "ties", "special")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "numel"), LARGE)
def test_large_selections_have_the_bits_of_the_cpu(kind, numel, dtype):
    flat = scores(kind, numel, dtype)
    parts = [part.clone() for part in flat.split([numel // 3, 1, 0, 33, numel - numel // 3 - 34])]
    ks = torch.tensor([numel // 2, numel // 100, numel // 10, 1, numel // 3])
    backend = "cpu" if ops.backend_reasons("cpu")["cpu"] is None else "reference"
    expected = ops.select(parts, ks, backend=backend)
    placed = [part.cuda() for part in parts]
    for name in BACKENDS:
        for rows in (slice(0, 1), slice(None)):
            words, thresholds, counts, nan_count = ops.select(placed, ks[rows].cuda(), backend=name)
            assert torch.equal(words.cpu(), expected[0][rows]), name
            assert same_bits(thresholds.cpu(), expected[1][rows]) and torch.equal(counts.cpu(), expected[2][rows]), name
            assert nan_count.item() == expected[3].item(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_a_step_do_not_depend_on_the_path(dtype):
    """Whole tiles, ends of tensors and tensors that are not aligned; a full mask, dense or packed, and none."""
    numel = 3 * 16384 + 77
    start, grad = (torch.randn(numel + 1, device="cuda").to(dtype) for _ in range(2))
    full = pf.SaliencyMask.from_bool([torch.ones(numel, dtype=torch.bool, device="cuda")])
    results = []
    for first, mask, packed in ((0, None, False), (1, None, False), (0, full, False), (0, full, True), (1, full, True)):
        storage = torch.empty(numel + 1, dtype=dtype, device="cuda")
        param = nn.Parameter(storage[first : first + numel])
        with torch.no_grad():
            param.copy_(start[:numel])
        opt = pf.MaskedAdam([param], lr=1e-2, weight_decay=0.1, packed=packed, backend="cuda")
        for _ in range(3):
            param.grad = grad[:numel].clone()
            opt.step(mask=mask)
        results.append(param.detach())
    for other in results[1:]:
        assert same_bits(other, results[0])


def test_more_entries_than_an_int32_can_count():
    free, _ = torch.cuda.mem_get_info()
    count = 2**32 + 5
    if free < 14 * count:
        pytest.skip("needs 60 GB of GPU memory")
    grad = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, count - 1], device="cuda")
    grad[places] = 1.0
    mask = pf.saliency_mask({"p": grad}, k=len(places), backend="cuda")
    selected = mask["p"]
    assert int(selected.sum()) == len(places) and bool(selected[places].all())
    param = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device="cuda"))
    param.grad = grad
    pf.MaskedAdam([("p", param)], lr=1.0, betas=(0.0, 0.9), packed=True, backend="cuda").step(mask=mask)
    assert int((param != 0).sum()) == len(places) and bool((param[places] != 0).all())
