"""Random inputs shared by the tests."""

import math

import numpy as np
import torch
from torch import Tensor

from tests import oracle

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCORE_KINDS = ["normal", "heavy", "ties", "two_valued", "constant", "zeros", "subnormal", "special", "nans", "infs"]


def scores(kind: str, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``numel`` scores of one of ``SCORE_KINDS``."""
    if kind == "normal":
        return torch.randn(numel).to(dtype)
    if kind == "heavy":
        return (torch.randn(numel) * torch.exp(6 * torch.randn(numel))).to(dtype)
    if kind == "ties":
        return (torch.randint(-3, 4, (numel,)) * 0.5).to(dtype)
    if kind == "two_valued":
        return torch.where(torch.rand(numel) < 0.3, -1.5, 0.25).to(dtype)
    if kind == "constant":
        return torch.full((numel,), -0.75, dtype=dtype)
    if kind == "zeros":
        return torch.zeros(numel, dtype=dtype) * torch.where(torch.rand(numel) < 0.5, -1, 1).to(dtype)
    if kind == "subnormal":
        smallest = torch.finfo(dtype).smallest_normal
        with_steps = torch.randint(-3, 4, (numel,)) * (smallest / 8)
        return torch.where(torch.rand(numel) < 0.1, torch.randn(numel) * smallest, with_steps).to(dtype)
    if kind == "special":
        values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).tiny / 4])
        return torch.where(torch.rand(numel) < 0.4, values[torch.randint(8, (numel,))], torch.randn(numel)).to(dtype)
    return torch.full((numel,), {"nans": math.nan, "infs": -math.inf}[kind], dtype=dtype)


def bits(tensor: Tensor) -> Tensor:
    """A floating tensor's bits as integers, so that NaN and -0 compare."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return tensor.detach().contiguous().reshape(-1).view(kinds[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b).to(a.device))


def random_masks(numels: list[int], density: float = 0.4) -> list[np.ndarray]:
    return [np.random.rand(n) < density for n in numels]


def words_of(masks: list[np.ndarray], device: str = "cpu") -> Tensor:
    return torch.from_numpy(oracle.all_words(masks).copy()).to(device)


def word_offsets(numels: list[int]) -> list[int]:
    """First word of each tensor."""
    return np.cumsum([0, *(-(-n // 32) for n in numels)]).tolist()[:-1]


def with_garbage_tails(words: Tensor, numels: list[int]) -> Tensor:
    """The words with random bits past each tensor's end, which operators must ignore."""
    noisy = words.clone()
    for start, numel in zip(word_offsets(numels), numels, strict=True):
        if numel % 32:
            garbage = random_word() & ~((1 << numel % 32) - 1)
            last = start + numel // 32
            noisy[last] = int(np.array(int(noisy[last]) | garbage, np.int64).astype(np.int32))
    return noisy


def random_word() -> int:
    return int(np.random.randint(-(2**31), 2**31))
