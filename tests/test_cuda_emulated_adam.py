"""The CUDA kernel of a step, run on the host by the emulator, against the reference: no GPU is needed."""

import os
import random

import pytest
import torch

from pecker_fast import ops
from pecker_fast.ops import reference
from pecker_fast.ops.extension import cpu_isa
from pecker_fast.ops.layout import num_blocks, num_words

from . import processes
from .adam_case import random_case
from .conftest import SEED_VARIABLE, available_backends
from .emulation import library, streaming
from .emulation.case import (
    DTYPES,
    SCORE_DTYPES,
    Memory,
    assert_all_same,
    assert_same_update,
    make_mask,
    set_random_order,
    sizes,
    some_missing,
    spoil,
    values,
)

pytestmark = library.needs_compiler


@pytest.fixture(autouse=True)
def order():
    set_random_order()


def frozen_entries(arguments: list, options: dict, name: str, i: int) -> torch.Tensor:
    """The entries of list ``name`` of tensor i that a step must not change."""
    params, grads, masked_grads = arguments[:3]
    words, offsets, packed_offsets, _, found_inf = arguments[12:17]
    numel = params[i].numel()
    idle = grads[i] is None and (not masked_grads or masked_grads[i] is None)
    packed = packed_offsets is not None and name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "counts")
    size = arguments[4][i].numel() if packed else numel
    if idle or (found_inf is not None and bool(found_inf)):
        return torch.ones(size, dtype=torch.bool)
    everywhere = words is None or masked_grads or packed or (name == "emas" and options["ema_everywhere"])
    if everywhere:
        return torch.zeros(size, dtype=torch.bool)
    return ~reference.unpack_bits(words[offsets[i] : offsets[i] + num_words(numel)], numel)


def adam_arguments(dtype, kind: str, features: dict):
    """(positional arguments, options) of a random step."""
    compute = reference.compute_dtype(dtype)
    numels = sizes()
    joint, masked = "joint" in kind, kind in ("masked", "packed")
    params = [values(n, dtype) for n in numels]
    spread = random.choice((1e-3, 1.0))
    grads = [values(n, dtype, spread) for n in numels]
    masked_grads = [values(n, dtype, spread) for n in numels] if joint else []
    if features.get("spoil"):
        grads, masked_grads = [spoil(g) for g in grads], [spoil(g) for g in masked_grads]
    if not masked:
        masked_grads = some_missing(masked_grads)
    grads = some_missing(grads)
    words, offsets, masks = None, [], [torch.ones(n, dtype=torch.bool) for n in numels]
    if kind not in ("plain", "joint without mask"):
        words, offsets, masks = make_mask(numels, features.get("density", 0.5))
    packed_offsets, state_numels = None, numels
    if kind == "packed":
        state_numels = [int(mask.sum()) for mask in masks]
        block_sums = reference.block_counts(words, offsets, numels).split([num_blocks(n) for n in numels])
        packed_offsets = torch.cat([s.cumsum(0) - s for s in block_sums])
    beta1 = 0.0 if features.get("no_first_moment") else 0.9
    beta2 = random.choice((0.0, 0.99, 0.999))
    exp_avgs = [values(n, compute, spread) for n in state_numels] if beta1 else []
    exp_avg_sqs = [values(n, compute, spread).square() for n in state_numels]
    largest = [values(n, compute, spread).square() for n in state_numels] if features.get("amsgrad") else []
    narrow = dtype in (torch.bfloat16, torch.float16)
    masters = []
    if features.get("masters") and narrow:
        masters = [p.to(compute) + values(p.numel(), compute, 1e-3) for p in params]
    emas = [values(n, compute) for n in numels] if features.get("ema") else []
    counts, table = [], None
    if "counts" in features:
        top = torch.iinfo(features["counts"]).max
        counts = [torch.randint(0, 40, (n,)).to(features["counts"]) for n in state_numels]
        for count in counts:
            count[: count.numel() // 4] = top
        table = reference.bias_table(beta1, beta2, compute, torch.device("cpu"))
    arguments = [
        params,
        grads,
        masked_grads,
        exp_avgs,
        exp_avg_sqs,
        largest,
        masters,
        emas,
        counts,
        torch.randint(1, 30, (len(params),)).float(),
        torch.tensor(random.choice((1e-3, 0.1)), dtype=torch.float64),
        table,
        words,
        offsets,
        packed_offsets,
        random.choice((None, torch.tensor(128.0))),
        random.choice((None, torch.tensor(0.0))),
    ]
    options = {
        "beta1": beta1,
        "beta2": beta2,
        "eps": 1e-8,
        "weight_decay": features.get("weight_decay", 0.0),
        "decoupled_weight_decay": random.random() < 0.5,
        "maximize": random.random() < 0.5,
        "clip_value": random.choice((None, 0.5 * spread)),
        "max_update": random.choice((None, 0.5)),
        "retain_variance": features.get("retain_variance", False),
        "zero_nonfinite": random.random() < 0.5,
        "ema_decay": 0.99 if emas else None,
        "ema_everywhere": features.get("ema_everywhere", False),
        "stochastic_rounding": features.get("stochastic_rounding", False),
        "seed": random.randint(-(2**62), 2**62),
    }
    return arguments, options


def run_both(arguments, options, rare=None):
    """Runs a step on copies of the arguments with the reference and with the kernels; compares all that is mutated."""
    memory = Memory()
    # All lists of a tensor at one misalignment (as in flat buffers), or each at its own.
    common = [random.choice((0, 0, 1, 2, 3)) for _ in arguments[0]]
    independent = random.random() < 0.3
    expected, actual = [], []
    for argument in arguments[:9]:
        expected.append([None if t is None else t.clone() for t in argument])
        shifts = [random.choice((0, 0, 1, 2, 3)) if independent else c for c in common]
        actual.append([memory.place(t, s) for t, s in zip(argument, shifts, strict=False)])
    reference.masked_adam_(*expected, *arguments[9:], **options)
    streaming.masked_adam_(*actual, *arguments[9:], **options, rare=rare)
    memory.check()
    names = [
        "params",
        "grads",
        "masked_grads",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "masters",
        "emas",
        "counts",
    ]
    for name, *lists in zip(names, actual, expected, arguments[:9], strict=True):
        if "grads" not in name:
            for i, tensors in enumerate(zip(*lists, strict=True)):
                # An EMA follows the rounded parameter.
                slack = torch.finfo(arguments[0][0].dtype).eps * 0.1 if name == "emas" else 0.0
                frozen = frozen_entries(arguments, options, name, i)
                assert_same_update(*tensors, frozen, f"{name}[{i}] of {tensors[0].numel()} entries", slack)
    return actual


KINDS = ("plain", "joint", "joint without mask", "masked", "packed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rare", [False, True], ids=["common", "rare"])
def test_adam_common_features(kind, dtype, rare):
    features = {
        "density": random.choice((0.01, 0.1, 0.5, 0.95)),
        "ema": random.random() < 0.5,
        "no_first_moment": random.random() < 0.5,
        "weight_decay": random.choice((0.0, 0.05)),
        "spoil": random.random() < 0.5,
    }
    run_both(*adam_arguments(dtype, kind, features), rare=rare)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "feature",
    [
        {"amsgrad": True},
        {"masters": True, "ema": True},
        {"counts": torch.int16},
        {"counts": torch.int32, "no_first_moment": True},
        {"retain_variance": True, "weight_decay": 0.1},
        {"stochastic_rounding": True, "ema": True},
        {"ema": True, "ema_everywhere": True},
        {"ema": True, "ema_everywhere": True, "masters": True, "amsgrad": True, "counts": torch.int32, "spoil": True},
    ],
    ids=lambda feature: "+".join(feature),
)
def test_adam_rare_features(kind, feature):
    narrow_only = "masters" in feature or "stochastic_rounding" in feature
    for dtype in random.sample(DTYPES[1:3] if narrow_only else DTYPES, 1 if kind.startswith("joint ") else 2):
        run_both(*adam_arguments(dtype, kind, {"density": random.choice((0.02, 0.5, 0.97)), **feature}))


@pytest.mark.parametrize("kind", KINDS)
def test_adam_changes_nothing_if_found_inf_is_set(kind):
    arguments, options = adam_arguments(torch.float32, kind, {"ema": True, "ema_everywhere": True})
    arguments[16] = torch.tensor(1.0)
    actual = run_both(arguments, options)
    assert_all_same(actual[0], arguments[0], "params")


@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
def test_adam_is_exact_enough_with_approximate_roots_and_reciprocals(dtype, monkeypatch):
    """At most twice the error of plain float32 code, even if every approximation of the GPU is off by a last bit."""
    monkeypatch.setattr(ops, "masked_adam_", lambda *args, backend, **options: streaming.masked_adam_(*args, **options))
    with streaming.approximate():
        for _ in range(12):
            case = random_case(dtype, [2100, 0, 1, 33])
            case.check(case.run("emulated"))


PACKED_LISTS = [
    pytest.param(("grads",), marks=pytest.mark.slow),
    pytest.param(("masters", "emas"), marks=pytest.mark.slow),
    ("grads", "masters", "emas"),
]


def pack_lists(arguments: list, names: tuple[str, ...]) -> list:
    """The arguments of a packed step with these lists packed too."""
    words, offsets = arguments[12], arguments[13]
    numels = [param.numel() for param in arguments[0]]
    masks = [reference.unpack_bits(words[o:], n) for o, n in zip(offsets, numels, strict=False)]
    packed = [[None if t is None else t.clone() for t in argument] for argument in arguments[:9]]
    for name in names:
        at = {"grads": 1, "masters": 6, "emas": 7}[name]
        packed[at] = [None if t is None else t[mask] for t, mask in zip(packed[at], masks, strict=False)]
    return packed


def place_all(memory: Memory, lists: list) -> list:
    return [[memory.place(t, random.choice((0, 0, 1, 2, 3))) for t in tensors] for tensors in lists]


PACKED_FEATURES = [
    {"ema": True, "masters": True},
    {"ema": True, "no_first_moment": True, "weight_decay": 0.1, "spoil": True},
    {"masters": True, "amsgrad": True, "counts": torch.int16},
    {"stochastic_rounding": True, "ema": True, "amsgrad": True},
]


@pytest.mark.parametrize("names", PACKED_LISTS, ids="+".join)
@pytest.mark.parametrize("features", PACKED_FEATURES, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_lists_give_the_bits_of_dense_ones(dtype, features, names):
    """Gradients, masters and averages of the salient entries, beside packed moments."""
    features = {**features, "density": random.choice((0.02, 0.3, 0.9))}
    arguments, options = adam_arguments(dtype, "packed", features)
    memory = Memory()
    dense = place_all(memory, [[None if t is None else t.clone() for t in argument] for argument in arguments[:9]])
    packed = place_all(memory, pack_lists(arguments, names))
    streaming.masked_adam_(*dense, *arguments[9:], **options)
    streaming.masked_adam_(*packed, *arguments[9:], **options)
    memory.check()
    expected = pack_lists([*dense, *arguments[9:]], names)
    for at, name in enumerate(("params", "grads", "", "exp_avgs", "exp_avg_sqs", "max", "masters", "emas", "counts")):
        if name and name != "grads":
            assert_all_same(packed[at], expected[at], name)


def test_packed_lists_of_an_empty_mask():
    """Nothing changes, and nothing is read or written outside of the tensors."""
    arguments, options = adam_arguments(torch.bfloat16, "packed", {"ema": True, "masters": True, "density": 0.0})
    memory = Memory()
    lists = place_all(memory, pack_lists(arguments, PACKED_LISTS[-1]))
    streaming.masked_adam_(*lists, *arguments[9:], **options)
    memory.check()
    assert_all_same(lists[0], arguments[0], "params")


@pytest.mark.parametrize("names", PACKED_LISTS, ids="+".join)
def test_packed_lists_have_the_bits_of_the_cpu_kernel(names, seed):
    """Of the one for any processor: the others fuse products and sums, which the emulator does not."""
    if "cpu" not in available_backends():
        pytest.skip("the CPU kernels are not tested here")
    if cpu_isa() != "scalar":
        name = f"{__file__}::test_packed_lists_have_the_bits_of_the_cpu_kernel[{'+'.join(names)}]"
        environment = {**os.environ, "PECKER_FAST_CPU_ISA": "scalar", SEED_VARIABLE: str(seed)}
        child = processes.run(["-m", "pytest", "-x", "-n0", "-p", "no:cacheprovider", name], env=environment)
        assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
        return
    for dtype in SCORE_DTYPES:
        for features in PACKED_FEATURES:
            arguments, options = adam_arguments(dtype, "packed", {**features, "density": 0.3})
            actual, expected = pack_lists(arguments, names), pack_lists(arguments, names)
            streaming.masked_adam_(*actual, *arguments[9:], **options)
            ops.masked_adam_(*expected, *arguments[9:], **options, backend="cpu")
            for at, name in enumerate(
                ("params", "", "", "exp_avgs", "exp_avg_sqs", "max", "masters", "emas", "counts")
            ):
                if name:
                    assert_all_same(actual[at], expected[at], f"{name}, {dtype}, {features}")


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["masked", "packed", "joint"])
def test_adam_with_an_empty_and_a_full_mask(kind, density):
    run_both(*adam_arguments(torch.float32, kind, {"density": density, "ema": True}))


@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adam_bits_do_not_depend_on_the_path(kind, dtype):
    """Vectors or single entries, clipping that clips nothing, and the larger version of the kernel: the same bits."""
    features = {"ema": True, "density": random.choice((0.1, 0.5, 0.95)), "spoil": random.random() < 0.3}
    arguments, options = adam_arguments(dtype, kind, features)
    options |= {"clip_value": None, "max_update": None, "zero_nonfinite": False}
    results = []
    for misaligned, rare, clip_value in ((0, False, None), (1, False, None), (0, True, None), (0, False, 1e38)):
        memory, lists = Memory(), []
        for number, argument in enumerate(arguments[:9]):
            # Parameters and state have different misalignments: no group is a vector in both.
            lists.append([memory.place(t, misaligned * (1 + number % 2)) for t in argument])
        clip = {"clip_value": None if features["spoil"] else clip_value}
        streaming.masked_adam_(*lists, *arguments[9:], **{**options, **clip}, rare=rare)
        memory.check()
        results.append(lists)
    for other in results[1:]:
        for name, a, b in zip(("params", "exp_avgs", "exp_avg_sqs", "emas"), (results[0][i] for i in (0, 3, 4, 7)),
                              (other[i] for i in (0, 3, 4, 7)), strict=True):  # fmt: skip
            assert_all_same(b, a, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adam_does_not_read_parameters_that_have_masters(kind, dtype):
    """Except within a vector of which some entries stay as they are."""
    density = 1.0 if kind in ("masked", "packed") else 0.5
    arguments, options = adam_arguments(dtype, kind, {"masters": True, "ema": True, "density": density})
    lists = [[None if t is None else t.clone() for t in argument] for argument in arguments[:9]]
    with streaming.unreadable(lists[0]):
        streaming.masked_adam_(*lists, *arguments[9:], **options)
    with pytest.raises(RuntimeError, match="read of memory"), streaming.unreadable(lists[6]):
        streaming.masked_adam_(*lists, *arguments[9:], **options)


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_adam_reads_no_parameter_entry_by_entry_that_has_a_master(kind):
    """Single entries are stored without their neighbours."""
    arguments, options = adam_arguments(torch.bfloat16, kind, {"masters": True, "density": 0.5})
    memory = Memory()
    lists = [[memory.place(t, 1 + number % 2) for t in argument] for number, argument in enumerate(arguments[:9])]
    with streaming.unreadable(lists[0]):
        streaming.masked_adam_(*lists, *arguments[9:], **options)
    memory.check()


@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
def test_adam_keys_random_bits_by_the_numbers_of_tensors(kind):
    """As the reference does."""
    features = {"stochastic_rounding": True, "density": 0.5}
    arguments, options = adam_arguments(random.choice((torch.bfloat16, torch.float16)), kind, features)
    numbers = random.sample(range(1000), len(arguments[0]))
    first = run_both(arguments, {**options, "tensor_numbers": numbers})
    other = run_both(arguments, {**options, "tensor_numbers": [*numbers[1:], 1000]})
    assert any(not torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_captured_step(kind):
    """A graph's step follows the values of its own gradients, whatever other steps were taken since the capture."""
    features = {"ema": True, "density": 0.5, "masters": True, "stochastic_rounding": False}
    arguments, options = adam_arguments(torch.bfloat16, kind, features)
    state, tail = arguments[3:9], arguments[9:]

    def gradients():
        return [[None if t is None else values(t.numel(), t.dtype) for t in list_] for list_ in arguments[1:3]]

    def step(lists, grads, tables):
        streaming.masked_adam_(lists[0], *grads, *lists[1:], *tail, **options, tables=tables)

    captured, plain = ([[t.clone() for t in list_] for list_ in (arguments[0], *state)] for _ in range(2))
    warm_up, in_graph, later = gradients(), gradients(), gradients()
    streaming.forget_tables()
    streaming.launched()
    step(captured, warm_up, "cached")
    assert streaming.launched()[-3:] == ["write_chunks", "prepare_kernel", "adam_kernel"]
    step(captured, in_graph, "capture")
    # The gradients' pointers alone.
    assert streaming.launched() == ["store_payload", "prepare_kernel", "adam_kernel"]
    step(captured, later, "cached")
    step(captured, later, "cached")
    assert streaming.launched() == ["store_payload", *["prepare_kernel", "adam_kernel"] * 2]
    # More tables than the cache keeps.
    for _ in range(40):
        others, unused = adam_arguments(torch.float32, "plain", {})
        streaming.masked_adam_(*([t[:1] for t in others[:9]]), others[9][:1], *others[10:], **unused, tables="cached")
    for seed in range(2):
        torch.manual_seed(seed)
        for old, new in zip(in_graph, gradients(), strict=True):
            for a, b in zip(old, new, strict=True):
                if a is not None:
                    a.copy_(b)
        streaming.replay()
        if seed == 0:
            for grads in (warm_up, later, later, in_graph):
                step(plain, grads, "new")
        else:
            step(plain, in_graph, "new")
    for name, a, b in zip(
        ("params", "exp_avgs", "exp_avg_sqs", "max", "masters", "emas"), captured, plain, strict=False
    ):
        assert_all_same(a, b, name)
    streaming.forget_tables()


def test_step_captured_without_an_earlier_one():
    """Its whole table is in the graph."""
    arguments, options = adam_arguments(torch.float32, "plain", {})
    lists = [[None if t is None else t.clone() for t in argument] for argument in arguments[:9]]
    streaming.forget_tables()
    streaming.launched()
    streaming.masked_adam_(*lists, *arguments[9:], **options, tables="capture")
    assert streaming.launched() == ["store_payload", "write_chunks", "prepare_kernel", "adam_kernel"]
    assert_all_same(lists[0], arguments[0], "params")
    streaming.replay()
    expected = [[None if t is None else t.clone() for t in argument] for argument in arguments[:9]]
    streaming.masked_adam_(*expected, *arguments[9:], **options)
    assert_all_same(lists[0], expected[0], "params")
    streaming.forget_tables()


def test_words_of_a_chunk_are_those_of_its_tensor():
    # A tensor whose shift makes one chunk more than it has blocks: packed state past the last recorded offset.
    for numel in (16384, 16383, 32768, 32767):
        for misalignment in (1, 2, 3):
            words, offsets, (mask,) = make_mask([numel], 0.5)
            salient = int(mask.sum())
            state = values(salient, torch.float32).square()
            blocks = reference.block_counts(words, offsets, [numel])
            param, grad = values(numel, torch.float32), values(numel, torch.float32)
            memory = Memory()
            placed, expected = memory.place(param, misalignment), param.clone()
            state, before, expected_state = state.clone(), state, state.clone()
            rest = [
                [],
                torch.ones(1),
                torch.tensor(0.1, dtype=torch.float64),
                None,
                words,
                offsets,
                blocks.cumsum(0) - blocks,
                None,
                None,
            ]
            options = {"beta1": 0.0, "beta2": 0.9, "eps": 1e-8}
            reference.masked_adam_([expected], [grad], [], [], [expected_state], [], [], [], *rest, **options)
            streaming.masked_adam_(
                [placed], [memory.place(grad, misalignment)], [], [], [state], [], [], [], *rest, **options
            )
            memory.check()
            assert_same_update(placed, expected, param, ~mask, "params")
            assert_same_update(state, expected_state, before, torch.zeros(salient, dtype=torch.bool), "exp_avg_sqs")
