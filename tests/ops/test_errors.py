"""Wrong arguments of each operator on each back end: an error that names the argument, and nothing changed."""

import inspect
import re

import pytest
import torch

from pecker_fast import ops
from pecker_fast.ops import reference
from tests.inputs import same_bits

ERRORS = (ValueError, TypeError, RuntimeError)


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    return []


def on_device(value, device: str):
    """Tensors of an argument, moved."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [on_device(item, device) for item in value] if isinstance(value, list) else value


class ByValue(dict):
    """Arguments with wrong values. On a GPU they are not checked, because that would wait for it."""


def refuses(op: str, arguments: dict, backend: str, pattern: str) -> None:
    """Calls ``op`` and expects an error that matches ``pattern``, and unchanged tensors."""
    tensors = [t for value in arguments.values() for t in tensors_in(value) if t.layout is torch.strided]
    before = [t.clone() for t in tensors]
    # Positional if the schema has them so, else by keyword.
    parameters = inspect.signature(getattr(reference, op)).parameters
    args = [arguments[n] for n, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD and n in arguments]
    kwargs = {n: arguments[n] for n, p in parameters.items() if p.kind == p.KEYWORD_ONLY and n in arguments}
    with pytest.raises(ERRORS) as caught:
        getattr(ops, op)(*args, backend=backend, **kwargs)
    assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True)), "something was written"


RELATIVE_CASES = [
    ({"relative_to": [torch.randn(40)]}, r"relative_to and damping"),
    ({"damping": torch.zeros(1)}, r"relative_to and damping"),
    *[
        ({"relative_to": relative_to, "damping": torch.zeros(1)}, r"relative_to")
        for relative_to in (
            [],
            [torch.randn(40)] * 2,
            [torch.randn(39)],
            [torch.randn(40).bfloat16()],
            [torch.randn(40).double()],
            [torch.randn(8, 5).t()],
            [torch.randn(40).to_sparse()],
        )
    ],
    *[
        ({"relative_to": [torch.randn(40)], "damping": damping}, r"damping")
        for damping in (torch.zeros(2), torch.zeros(1).double(), torch.zeros(()))
    ],
]


def cases_of(name: str) -> list[tuple[dict, str]]:
    """(arguments to replace, pattern that the error must match)."""
    return {
        "select": [
            ({"scores": [torch.randn(40, dtype=torch.float64)]}, r"scores"),
            ({"scores": [torch.ones(40, dtype=torch.int32)]}, r"scores"),
            ({"scores": [torch.randn(40), torch.randn(4, 10).t()]}, r"scores.*1|contiguous"),
            ({"scores": [torch.randn(40).to_sparse()]}, r"scores|[Ss]parse"),
            (ByValue(ks=torch.tensor([3, 0])), r"ks"),
            (ByValue(ks=torch.tensor([-1])), r"ks"),
            ({"ks": torch.tensor([3], dtype=torch.int32)}, r"ks"),
            ({"ks": torch.tensor([[3]])}, r"ks"),
            *RELATIVE_CASES,
        ],
        "threshold_mask": [
            ({"scores": [torch.randn(40).double()]}, r"scores"),
            ({"scores": [torch.randn(8, 5).t()]}, r"scores"),
            (ByValue(keys=torch.tensor([0], dtype=torch.int32)), r"keys"),
            (ByValue(keys=torch.tensor([0x7F800001], dtype=torch.int32)), r"keys"),
            ({"keys": torch.tensor([5])}, r"keys"),
            ({"tie_limits": torch.tensor([5, 6])}, r"tie_limits|keys"),
            ({"tie_limits": torch.tensor([5], dtype=torch.int32)}, r"tie_limits"),
            *RELATIVE_CASES,
        ],
        "radix_histogram": [
            ({"scores": [torch.randn(40).double()]}, r"scores"),
            ({"scores": [torch.randn(8, 5).t()]}, r"scores"),
            *RELATIVE_CASES,
            ({"level": 3}, r"level"),
            ({"level": -1}, r"level"),
            ({"prefixes": torch.tensor([1])}, r"prefixes"),
            ({"prefixes": torch.tensor([[1]], dtype=torch.int32)}, r"prefixes"),
        ],
        "block_counts": [
            ({"words": torch.zeros(2)}, r"words"),
            ({"word_offsets": [1]}, r"word"),
            ({"word_offsets": [-1]}, r"word"),
            ({"word_offsets": []}, r"word_offsets"),
            ({"numels": [65]}, r"word"),
        ],
        "pack": [
            ({"words": torch.zeros(1, dtype=torch.int32)}, r"word"),
            ({"words": torch.zeros(2)}, r"words"),
            ({"count": -1}, r"count"),
            ({"count": 41}, r"count"),
            ({"dense": torch.randn(8, 5).t()}, r"dense"),
        ],
        "unpack": [
            ({"words": torch.zeros(1, dtype=torch.int32)}, r"word"),
            ({"numel": -1}, r"numel"),
            ({"packed": torch.randn(41)}, r"packed"),
        ],
        "apply_mask_": [
            ({"tensors": [torch.randn(40), torch.randn(40)]}, r"word"),
            ({"tensors": [torch.randn(65)]}, r"word"),
            ({"tensors": [torch.randn(8, 5).t()]}, r"tensors"),
            ({"word_offsets": [1]}, r"word"),
            ({"words": torch.zeros(2, dtype=torch.int64)}, r"words"),
        ],
        "accumulate_": [
            ({"reduce": "mean"}, r"reduce"),
            ({"grads": [torch.randn(39)]}, r"grads|accumulators"),
            ({"grads": []}, r"grads|accumulators"),
            ({"grads": [torch.randn(8, 5).t()]}, r"grads"),
            ({"grads": [torch.ones(40, dtype=torch.int32)]}, r"grads"),
            ({"accumulators": [torch.zeros(40, dtype=torch.bfloat16)]}, r"accumulators"),
            ({"accumulators": [torch.zeros(40, dtype=torch.float64)]}, r"accumulators|grads"),
            # A good pair first: it must not be added before the bad one is found.
            ({"accumulators": [torch.zeros(40)] * 2, "grads": [torch.ones(40), torch.ones(3)]}, r"grads|accumulators"),
        ],
        "count_nonfinite": [
            ({"masked_grads": [torch.randn(40), None]}, r"masked_grads"),
            ({"masked_grads": [torch.randn(39)]}, r"grads"),
            ({"grads": [torch.ones(40, dtype=torch.int32)]}, r"grads"),
            ({"grads": [torch.randn(8, 5).t()]}, r"grads"),
            ({"words": torch.zeros(1, dtype=torch.int32)}, r"word"),
            ({"grad_scale": torch.ones(2)}, r"grad_scale"),
            ({"grad_scale": torch.tensor(1.0, dtype=torch.float64)}, r"grad_scale"),
        ],
    }[name]


def good_arguments(name: str) -> dict:
    words = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64).to(torch.int32)
    return {
        "select": {
            "scores": [torch.randn(40)],
            "ks": torch.tensor([3]),
            "ties_all": False,
            "relative_to": None,
            "damping": None,
        },
        "threshold_mask": {
            "scores": [torch.randn(40)],
            "keys": torch.tensor([1 << 29], dtype=torch.int32),
            "tie_limits": torch.tensor([5]),
            "relative_to": None,
            "damping": None,
        },
        "radix_histogram": {
            "scores": [torch.randn(40)],
            "prefixes": torch.tensor([5], dtype=torch.int32),
            "level": 1,
            "relative_to": None,
            "damping": None,
        },
        "block_counts": {"words": words, "word_offsets": [0], "numels": [40]},
        "pack": {"dense": torch.randn(40), "words": torch.tensor([-1, 0], dtype=torch.int32), "count": 32},
        "unpack": {"packed": torch.randn(32), "words": torch.tensor([-1, 0], dtype=torch.int32), "numel": 40},
        "apply_mask_": {"tensors": [torch.randn(40)], "words": words, "word_offsets": [0]},
        "accumulate_": {"accumulators": [torch.zeros(40)], "grads": [torch.randn(40)], "reduce": "sum"},
        "count_nonfinite": {
            "grads": [torch.randn(40)],
            "masked_grads": [],
            "words": words,
            "word_offsets": [0],
            "grad_scale": torch.tensor(2.0),
        },
    }[name]


OPERATORS = "select threshold_mask radix_histogram block_counts pack unpack apply_mask_ accumulate_ count_nonfinite"


@pytest.mark.parametrize("name", OPERATORS.split())
def test_refuses_wrong_arguments(name, backend, device):
    good = good_arguments(name)
    args = [on_device(good[n], device) for n in inspect.signature(getattr(reference, name)).parameters]
    getattr(ops, name)(*args, backend=backend)
    for wrong, pattern in cases_of(name):
        if device == "cpu" or not isinstance(wrong, ByValue):
            arguments = {**good_arguments(name), **wrong}
            refuses(name, {key: on_device(value, device) for key, value in arguments.items()}, backend, pattern)


def adam_arguments() -> dict:
    zeros = lambda: [torch.zeros(40), torch.zeros(17)]  # noqa: E731
    return {
        "params": [torch.randn(40), torch.randn(17)],
        "grads": [torch.randn(40), torch.randn(17)],
        "masked_grads": [],
        "exp_avgs": zeros(),
        "exp_avg_sqs": zeros(),
        "max_exp_avg_sqs": zeros(),
        "masters": [],
        "emas": zeros(),
        "counts": [torch.zeros(40, dtype=torch.int16), torch.zeros(17, dtype=torch.int16)],
        "steps": torch.ones(2),
        "lr": torch.tensor(1e-3, dtype=torch.float64),
        "bias_table": ops.bias_table(0.9, 0.9, torch.float32, torch.device("cpu")),
        "words": torch.tensor([-1, 7, 5], dtype=torch.int32),
        "word_offsets": [0, 2],
        "packed_offsets": None,
        "grad_scale": torch.tensor(2.0),
        "found_inf": torch.tensor(0.0),
        "beta1": 0.9,
        "beta2": 0.9,
        "eps": 1e-8,
        "ema_decay": 0.9,
    }


def pair(second: torch.Tensor) -> list[torch.Tensor]:
    """The second one is wrong: the first must not be written before it is found."""
    return [torch.zeros(40, dtype=second.dtype), second]


ADAM_CASES = [
    ("params", [torch.randn(40), torch.randn(17).double()], r"params"),
    ("params", [torch.randn(40), torch.randn(17, 2).t()[1:, :].t()], r"params"),
    ("params", [torch.randn(40), torch.ones(17, dtype=torch.complex64)], r"params"),
    ("grads", [torch.randn(40)], r"grads"),
    ("grads", [torch.randn(40), torch.randn(16)], r"grads"),
    ("grads", [torch.randn(40), torch.randn(17).half()], r"grads"),
    ("grads", [torch.randn(40), torch.randn(17).to_sparse()], r"grads|[Ss]parse"),
    ("masked_grads", [torch.randn(40)], r"masked_grads"),
    ("masked_grads", [torch.randn(40), torch.randn(18)], r"masked_grads"),
    ("exp_avgs", [], r"exp_avgs"),
    ("exp_avgs", pair(torch.zeros(16)), r"exp_avgs"),
    ("exp_avg_sqs", pair(torch.zeros(17).double()), r"exp_avg_sqs"),
    ("exp_avg_sqs", [torch.zeros(40)], r"exp_avg_sqs"),
    ("max_exp_avg_sqs", pair(torch.zeros(18)), r"max_exp_avg_sqs"),
    ("masters", [torch.zeros(40), torch.zeros(17)], r"masters"),
    ("emas", [], r"emas|ema_decay"),
    ("emas", pair(torch.zeros(17).bfloat16()), r"emas"),
    ("counts", pair(torch.zeros(17, dtype=torch.int64)), r"counts"),
    ("counts", pair(torch.zeros(16, dtype=torch.int16)), r"counts"),
    ("bias_table", None, r"bias_table"),
    ("bias_table", torch.zeros(1, 2), r"bias_table"),
    ("bias_table", torch.zeros(5, 2).double(), r"bias_table"),
    ("steps", torch.ones(1), r"steps"),
    ("steps", torch.ones(2).double(), r"steps"),
    ("lr", torch.tensor(1e-3), r"lr"),
    ("lr", torch.ones(2, dtype=torch.float64), r"lr"),
    ("words", torch.zeros(2, dtype=torch.int32), r"word"),
    ("words", torch.zeros(3), r"words"),
    ("word_offsets", [0], r"word_offsets"),
    ("word_offsets", [0, 3], r"word"),
    ("packed_offsets", torch.zeros(3, dtype=torch.int64), r"packed_offsets|counts|exp_avg"),
    ("grad_scale", torch.ones(2), r"grad_scale"),
    ("found_inf", torch.tensor(0.0).double(), r"found_inf"),
    ("beta1", 0.0, r"exp_avgs|beta1"),
    ("ema_decay", None, r"emas|ema_decay"),
]


@pytest.mark.parametrize("position", range(len(ADAM_CASES)), ids=[f"{n}{i}" for i, (n, _, _) in enumerate(ADAM_CASES)])
def test_masked_adam_refuses(position, backend, device):
    name, wrong, pattern = ADAM_CASES[position]
    arguments = {**adam_arguments(), name: wrong}
    refuses("masked_adam_", {key: on_device(value, device) for key, value in arguments.items()}, backend, pattern)


def test_masked_adam_takes_the_good_arguments(backend, device):
    good = {key: on_device(value, device) for key, value in adam_arguments().items()}
    positional = [good[n] for n in list(inspect.signature(reference.masked_adam_).parameters)[:17]]
    ops.masked_adam_(*positional, beta1=0.9, beta2=0.9, eps=1e-8, ema_decay=0.9, backend=backend)
    assert (good["counts"][0] == 1).sum() == 35


def test_packed_steps_have_to_be_masked(backend, device):
    packed = {"packed_offsets": torch.zeros(2, dtype=torch.int64)}
    joint = {**packed, "masked_grads": [torch.randn(40), torch.randn(17)]}
    for wrong in ({**packed, "words": None, "word_offsets": []}, joint):
        arguments = {key: on_device(value, device) for key, value in {**adam_arguments(), **wrong}.items()}
        refuses("masked_adam_", arguments, backend, "packed_offsets")


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"'tpu'.*cuda, triton, cpu, reference"):
        ops.select([torch.randn(3)], torch.tensor([1]), backend="tpu")
    with pytest.raises(ValueError, match="'tpu'"):
        ops.set_backend("tpu")


def test_backend_of_another_device():
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    with pytest.raises(RuntimeError, match="'cuda' cannot run select"):
        ops.select([torch.randn(3)], torch.tensor([1]), backend="cuda")


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("PECKER_FAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match="PECKER_FAST_BACKEND"):
        ops.select([torch.randn(3)], torch.tensor([1]))
    monkeypatch.setenv("PECKER_FAST_BACKEND", "cuda")
    try:
        # The argument goes before set_backend, set_backend before the environment.
        ops.set_backend("reference")
        ops.select([torch.randn(3)], torch.tensor([1]))
        with pytest.raises(ValueError, match="'tpu'"):
            ops.select([torch.randn(3)], torch.tensor([1]), backend="tpu")
    finally:
        ops.set_backend(None)
