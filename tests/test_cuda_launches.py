"""The launches of the CUDA operators, counted in the emulator: a step or a selection waits for each of them.

They depend on the sizes and dtypes of a call and not on the data, so a CUDA graph can hold them. Work for special cases
is enqueued always; a new launch has to be worth that, and to be listed here.
"""

import pytest
import torch

from .emulation import library, selection
from .emulation.selection import Tuning

pytestmark = library.needs_compiler

SIZES = (5000, 1, 8192, 300)
SAMPLED = Tuning(capacity=1 << 14)
SMALL = Tuning(min_sampled_bytes=1 << 40)

# The table goes to the device, which also clears the workspace.
UPLOAD = ["store_payload"]
BRACKET = ["sample_kernel", "bound_kernel", "bracket_kernel"]
# Nearly always the first of these finishes the candidates, and the others end at once.
HISTOGRAMS = ["digit_kernel", "digit_kernel", "rest_kernel", "cut_kernel"]
NARROW_HISTOGRAMS = ["digit_kernel", "rest_kernel", "cut_kernel"]


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(size).to(dtype) for size in SIZES]


def launches(call, *args) -> list[str]:
    selection.launched()
    call(*args)
    return selection.launched()


def select(scores, rows: int, tuning: Tuning, relative: bool = False) -> list[str]:
    ks = torch.arange(1, rows + 1) * 100
    others = (tensors(scores[0].dtype), torch.rand(len(scores))) if relative else None
    return launches(selection.select, scores, ks, False, tuning, others)


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize("relative", [False, True])
def test_sampled_selection(rows, relative):
    assert select(tensors(), rows, SAMPLED, relative) == UPLOAD + BRACKET + HISTOGRAMS
    assert len(UPLOAD + BRACKET + HISTOGRAMS) <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sampled_selection_of_narrow_scores(dtype):
    assert select(tensors(dtype), 2, SAMPLED) == UPLOAD + BRACKET + NARROW_HISTOGRAMS
    # Quotients are float32.
    assert select(tensors(dtype), 2, SAMPLED, relative=True) == UPLOAD + BRACKET + HISTOGRAMS


def test_selection_of_small_scores():
    assert select(tensors(), 3, SMALL) == UPLOAD + HISTOGRAMS
    assert select(tensors(torch.bfloat16), 3, SMALL) == UPLOAD + NARROW_HISTOGRAMS


def test_more_rows_than_one_pass_takes():
    again = ["memset", *BRACKET, *HISTOGRAMS]
    assert select(tensors(), selection.MAX_ROWS + 1, SAMPLED) == UPLOAD + again[1:] + again


@pytest.mark.parametrize("scores", [torch.randn(20000), torch.ones(20000), torch.zeros(20000)])
def test_launches_do_not_depend_on_the_data(scores):
    """Whether the bracket holds, misses or overflows."""
    for tuning in (SAMPLED, Tuning(capacity=40), Tuning(sigmas=-4.0, slack=-2.0, capacity=1 << 14)):
        assert select([scores], 1, tuning) == UPLOAD + BRACKET + HISTOGRAMS


@pytest.mark.parametrize("limits", [(1 << 62, 1 << 62), (0, 3)])
def test_threshold(limits):
    keys = torch.tensor([0.5, 1.0]).view(torch.int32)
    expected = [*UPLOAD, "rest_kernel", "cut_kernel"]
    assert launches(selection.threshold_mask, tensors(), keys, torch.tensor(limits)) == expected


def test_parts_of_relative_and_distributed_selections():
    assert launches(selection.magnitude_sums, tensors(), 3) == [*UPLOAD, "sums_kernel"]
    prefixes = torch.zeros(2, dtype=torch.int32)
    for level in range(3):
        assert launches(selection.radix_histogram, tensors(), prefixes, level) == [*UPLOAD, "histogram_kernel"]


@pytest.mark.parametrize("count", [666, 800])
def test_many_tensors(count):
    """Those of Stable Diffusion's U-Net are sent in one launch."""
    scores = [torch.randn(40) for _ in range(count)]
    assert select(scores, 1, SAMPLED) == UPLOAD + BRACKET + HISTOGRAMS
    others = ([torch.randn(40) for _ in scores], torch.rand(count))
    sent = launches(selection.select, scores, torch.tensor([9]), False, SAMPLED, others).count("store_payload")
    assert sent == (1 if count <= 666 else 2)


def test_no_rows_and_no_entries():
    assert select(tensors(), 0, SAMPLED) == [*UPLOAD, "cut_kernel"]
    assert select([torch.empty(0)], 1, SAMPLED) == [*UPLOAD, *NARROW_HISTOGRAMS]
