"""masked_adam_ against a float64 oracle: error at most twice that of plain array code in the same dtype."""

import math

import numpy as np
import pytest
import torch

from pecker_fast import ops
from tests import oracle
from tests.adam_case import KINDS, AdamCase, random_case
from tests.inputs import bits, random_masks, same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = [1023, 0, 1, 33, 32, 31, 700]


def run_and_check(case: AdamCase, backend: str, device: str) -> dict[str, list[torch.Tensor]]:
    result = case.run(backend, device)
    try:
        case.check(result)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{case.describe()}") from error
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_features(dtype, kind, backend, device, small):
    for _ in range(2 if small else 12):
        run_and_check(random_case(dtype, SIZES, kind), backend, device)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_several_blocks(dtype, packed, backend, device, small):
    numels = [16384 + 100, 5, 16384] if small else [5 * 16384 + 17, 16384, 31, 2 * 16384 - 1, 16383, 100_003]
    case = random_case(dtype, numels, "masked", packed=packed)
    case.grads = [torch.randn(n).to(dtype) for n in numels]
    run_and_check(case, backend, device)


@pytest.mark.parametrize("density", [0.0, 0.001, 1.0])
def test_sparse_and_full_masks(density, backend, device, small):
    numels = [3000, 64, 1] if small else [70_000, 64, 1, 2047]
    for packed in (False, True):
        case = random_case(torch.float32, numels, "masked", packed=packed)
        case.masks = random_masks(numels, density)
        case.emas, case.options.ema_decay = [], None
        run_and_check(case, backend, device)


def test_packed_state_gives_what_dense_state_gives(backend, device, small):
    numels = [17_000, 33, 0, 500]
    for _ in range(1 if small else 20):
        case = random_case(torch.float32, numels, "masked", packed=True)
        packed = run_and_check(case, backend, device)
        case.packed = case.packed_grads = case.packed_values = False
        dense = run_and_check(case, backend, device)
        for name in packed:
            assert all(same_bits(a, b) for a, b in zip(packed[name], dense[name], strict=True)), case.describe()


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_entries_keep_nan_payloads_and_negative_zero(dtype, backend, device):
    numels = [1000, 77]
    case = random_case(dtype, numels, "masked", packed=False, weight_decay=0.1, zero_nonfinite=False)
    case.grads = [torch.randn(n).to(dtype) for n in numels]
    for name in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "emas"):
        for tensor, mask in zip(getattr(case, name), case.masks, strict=False):
            frozen = torch.from_numpy(~mask)
            odd = bits(tensor)
            # A NaN with a payload, a negative one, -0 and an inf, by their bits.
            top = {8: 0x7FF, 4: 0x7F8, 2: 0x7F8 if dtype == torch.bfloat16 else 0x7C0}[tensor.element_size()]
            shift = 8 * tensor.element_size() - 12
            inf = top << shift
            sign = -(1 << (8 * tensor.element_size() - 1))
            values = torch.tensor([inf + 3, sign + inf + 5, sign, inf], dtype=odd.dtype)
            odd[frozen] = values[torch.randint(4, odd.shape)][frozen]
            tensor.copy_(odd.view(tensor.dtype))
    for grad, mask in zip(case.grads, case.masks, strict=True):
        grad[torch.from_numpy(~mask)] = math.nan
    case.emas, case.options.ema_decay = [], None
    run_and_check(case, backend, device)


def test_nan_outside_the_mask_does_not_leak_into_a_joint_step(backend, device):
    case = random_case(torch.float32, [800, 33], "joint")
    case.grads = [torch.randn(n) for n in case.numels]
    case.masked_grads = [torch.randn(n) for n in case.numels]
    clean = case.run(backend, device)
    for forget, mask in zip(case.masked_grads, case.masks, strict=True):
        forget[torch.from_numpy(~mask)] = np.random.choice([math.nan, math.inf])
    poisoned = run_and_check(case, backend, device)
    for name in clean:
        assert all(same_bits(a, b) for a, b in zip(clean[name], poisoned[name], strict=True)), name


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_gradients(kind, zero, backend, device):
    case = random_case(torch.float32, [900, 40], kind, zero_nonfinite=zero, eps=1e-8)
    for grad in [*case.grads, *case.masked_grads]:
        if grad is not None:
            odd = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, grad.shape)]
            grad.copy_(torch.where(torch.rand(grad.shape) < 0.2, odd, grad))
    run_and_check(case, backend, device)


def test_found_inf_leaves_everything_untouched(backend, device):
    for kind in KINDS:
        case = random_case(torch.bfloat16, [900, 40], kind, ema_decay=0.9)
        case.found_inf = 1.0
        run_and_check(case, backend, device)
        case.found_inf = 0.0
        run_and_check(case, backend, device)


@pytest.mark.parametrize("count_dtype", [torch.int16, torch.int32])
def test_counts_saturate(count_dtype, backend, device):
    case = random_case(torch.float32, [200], "masked", packed=False, beta1=0.9, beta2=0.99, zero_nonfinite=False)
    case.grads = [torch.randn(200)]
    top = torch.iinfo(count_dtype).max
    case.counts = [torch.tensor([0, 1, top - 2, top - 1, top], dtype=count_dtype).repeat(40)]
    result = run_and_check(case, backend, device)
    mask = torch.from_numpy(case.masks[0])
    assert (result["counts"][0][mask & (case.counts[0] == top)] == top).all()


def test_late_touched_entry_moves_by_lr(backend, device):
    # Some entries are untouched, others updated thousands of times: an entry's first step is Adam's usual lr.
    for beta1 in (0.0, 0.9):
        case = random_case(
            torch.float32, [640], "masked", packed=False, beta1=beta1, beta2=0.999, eps=1e-12, weight_decay=0.0,
            clip_value=None, max_update=None, grad_scale=None, ema_decay=None, lr=0.01,
        )  # fmt: skip
        case.params, case.grads, case.steps = [torch.zeros(640)], [torch.randn(640)], [20_000.0]
        case.exp_avg_sqs = [torch.zeros(640)]
        case.exp_avgs = [torch.zeros(640)] if beta1 else []
        case.max_exp_avg_sqs, case.masters, case.emas = [], [], []
        case.counts = [torch.zeros(640, dtype=torch.int16)]
        moved = case.run(backend, device)["params"][0].abs()
        touched = torch.from_numpy(case.masks[0])
        assert torch.allclose(moved[touched], torch.tensor(0.01), rtol=1e-5) and (moved[~touched] == 0).all()


def test_large_step_counts(backend, device):
    case = random_case(torch.float32, [500, 500], "plain")
    case.steps = [1e6, 2.0**24]
    case.counts = []
    run_and_check(case, backend, device)


def test_bias_table():
    for beta1, beta2 in ((0.0, 0.999), (0.9, 0.99), (0.9, 0.9999)):
        for dtype in (torch.float32, torch.float64):
            table = ops.bias_table(beta1, beta2, dtype, torch.device("cpu"))
            count = np.arange(1, table.shape[0], dtype=np.float64)
            exact = np.stack([1 / (1 - beta1**count), 1 / np.sqrt(1 - beta2**count)], 1)
            rtol = 2 * torch.finfo(dtype).eps + torch.finfo(torch.float64).eps / (1 - beta2)
            assert np.allclose(table[1:].numpy(), exact, rtol=rtol, atol=0)
            assert table[-1].tolist() == [1, 1] and table.isfinite().all()


# ---- stochastic rounding


def exact_update_case(dtype: torch.dtype, numels: list[int], lr: float, kind: str) -> AdamCase:
    """beta1 = beta2 = eps = 0 and gradients of +-1: the update is lr exactly, so x in float32 is the same anywhere."""
    case = random_case(
        dtype, numels, kind, packed=False, lr=lr, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, maximize=False,
        clip_value=None, max_update=None, retain_variance=False, zero_nonfinite=False, grad_scale=None, ema_decay=None,
    )  # fmt: skip
    case.grads = [torch.randint(0, 2, (n,)).to(dtype) * 2 - 1 for n in numels]
    case.max_exp_avg_sqs, case.masters, case.emas, case.counts, case.exp_avgs = [], [], [], [], []
    case.steps = [float(np.random.randint(1, 1000)) for _ in numels]
    case.stochastic_rounding, case.seed = True, int(np.random.randint(-(2**62), 2**62))
    return case


@pytest.mark.parametrize("numbers", [(), (5, 0, 2**31 - 1)], ids=["", "numbers"])
@pytest.mark.parametrize("kind", ["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_has_the_bits_of_the_definition(dtype, kind, numbers, backend, device):
    case = exact_update_case(dtype, [900, 0, 65], float(np.float32(0.00137)), kind)
    case.tensor_numbers = numbers
    # Normal, subnormal, zero, large and infinite parameters.
    scale = torch.exp2(torch.randint(-24, 14, (900,)).float())
    case.params[0] = (torch.randn(900) * scale).to(dtype)
    case.params[0][:5] = torch.tensor([math.inf, -math.inf, 0.0, torch.finfo(dtype).max, math.nan]).to(dtype)
    result = case.run(backend, device)
    for i, param in enumerate(case.params):
        x = (param.float() - np.float32(case.options.lr) * case.grads[i].float()).tolist()
        updated = case.masks[i] if kind == "masked" else np.ones(param.numel(), bool)
        expected = param.clone()
        for entry in np.flatnonzero(updated):
            random = oracle.random_u32(case.seed, int(case.steps[i]), numbers[i] if numbers else i, int(entry))
            expected[entry] = oracle.round_stochastic(x[entry], dtype, random)
        number = ~expected.isnan()
        assert torch.equal(expected.isnan(), result["params"][i].isnan())
        assert same_bits(result["params"][i][number], expected[number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(dtype, backend, device, small):
    n = 4000 if small else 200_000
    eps = torch.finfo(dtype).eps
    share = np.random.uniform(0.1, 0.9)
    case = exact_update_case(dtype, [n], float(np.float32(share * eps)), "plain")
    case.params, case.grads = [torch.ones(n, dtype=dtype)], [-torch.ones(n, dtype=dtype)]
    result = case.run(backend, device)["params"][0].float()
    assert set(result.tolist()) == {1.0, 1.0 + eps}
    up = (result > 1).float().mean().item()
    assert abs(up - share) < 6 * math.sqrt(share * (1 - share) / n) + 2**-12
    case.seed += 1
    assert not torch.equal(case.run(backend, device)["params"][0].float(), result)


def test_same_bits_with_any_number_of_threads(backend, device):
    if device != "cpu" or backend == "triton":
        pytest.skip("no threads to set")
    for kind in KINDS * 4:
        case = random_case(torch.float32, [70_001, 5, 16_385, 0, 900], kind)
        results = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(case.run(backend))
        for other in results[1:]:
            for name in other:
                assert all(same_bits(a, b) for a, b in zip(results[0][name], other[name], strict=True)), name
