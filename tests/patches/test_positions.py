"""Codes of positions: every set round-trips, near its entropy; damaged codes are refused."""

import dataclasses
import math
import time

import numpy as np
import pytest

from pecker_fast.patches.positions import Code, decode, encode


def naive(code: Code, data: bytes) -> list[int]:
    """The definition, a bit at a time."""
    bits = [data[i // 8] >> (i % 8) & 1 for i in range(8 * len(data))]
    part = 8 * -(-code.coded // 8)
    unary = iter(bits[code.k * part :])
    positions, last = [], -1
    for i in range(code.coded):
        high = 0
        while next(unary) == 0:
            high += 1
        low = sum(bits[j * part + i] << j for j in range(code.k))
        last += (high << code.k) + low + 1
        positions.append(last)
    return sorted({*range(code.numel)} - {*positions}) if 2 * code.count > code.numel else positions


def choose(numel: int, share: float) -> np.ndarray:
    return np.flatnonzero(np.random.rand(numel) < share)


CASES = [(0, 0.0), (1, 0.0), (1, 1.0), (7, 0.5), (9, 1.0), (64, 0.0), (300, 0.02), (300, 0.5), (999, 0.97), (5000, 0.1)]


@pytest.mark.parametrize(("numel", "share"), CASES)
def test_round_trip(numel, share):
    positions = choose(numel, share)
    code, data = encode(positions, numel)
    assert (code.numel, code.count, code.bytes) == (numel, len(positions), len(data))
    assert decode(code, data).tolist() == positions.tolist() == naive(code, data)


def test_far_and_clustered_positions():
    for positions, numel in (
        ([2**35], 2**36),
        ([0, 2**36 - 1], 2**36),
        ([*range(500, 900)], 40_000),
        ([3, 39_999], 40_000),
    ):
        code, data = encode(np.array(positions), numel)
        assert decode(code, data).tolist() == positions
        assert len(data) < 60 + len(positions)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001])
def test_size_is_near_the_entropy(share):
    numel = 400_000
    positions = choose(numel, share)
    p = len(positions) / numel
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * numel / 8
    assert len(encode(positions, numel)[1]) <= 1.035 * entropy + 16


def test_decoding_is_fast():
    numel = 4_000_000
    positions = choose(numel, 0.05)
    code, data = encode(positions, numel)
    start = time.process_time()
    assert len(decode(code, data)) == len(positions)
    # Some 0.01 s; a loop in Python takes over a second.
    assert time.process_time() - start < 0.5


def test_damaged_codes_are_refused():
    """Whatever the bytes are: positions in range, or a ValueError."""
    refused = 0
    for _ in range(400):
        numel = int(np.random.randint(1, 400))
        code, data = encode(choose(numel, np.random.choice([0.03, 0.3, 0.9])), numel)
        damaged = bytearray(data)
        for _ in range(np.random.randint(1, 4)):
            if damaged:
                damaged[np.random.randint(len(damaged))] = np.random.randint(256)
        field = np.random.choice(["numel", "count", "k", "unary", "none"])
        if field != "none":
            code = dataclasses.replace(code, **{field: getattr(code, field) + int(np.random.choice([-1, 1, 7, 2**40]))})
        try:
            positions = decode(code, bytes(damaged))
        except ValueError:
            refused += 1
            continue
        assert len(positions) == code.count and (np.diff(positions) > 0).all()
        assert not len(positions) or (positions[0] >= 0 and positions[-1] < code.numel)
    assert refused > 200


@pytest.mark.parametrize(
    ("code", "data", "error"),
    [
        (Code(10, 11, 0, 1), b"x", "11 of 10 entries"),
        (Code(10, -1, 0, 1), b"x", "-1 of 10 entries"),
        (Code(10, 2, 0, 0), b"", "cannot code"),
        (Code(10, 2, 60, 1), b"", "cannot code"),
        (Code(10, 2, 0, 9), b"", "cannot code"),
        (Code(10, 0, 0, 1), b"x", "code of no positions"),
        (Code(10, 2, 0, 1), b"xx", "2 bytes of positions, expected 1"),
        (Code(10, 2, 0, 1), b"\x01", "has 1 ones"),
        (Code(10, 2, 0, 2), b"\x03\x00", "has 2 ones in 2 bytes"),
        (Code(10, 2, 1, 1), b"\x07\x03", "after the last position"),
        (Code(4, 2, 0, 1), b"\x30", "last position is 5 of 4"),
        # Shifted by 35 bits, in which 64 bits would overflow.
        (
            Code(2**35, 1, 35, 2**20),
            bytes([1] * 35) + bytes(2**20 - 1) + b"\x80",
            "the last position is 288230376151711743",
        ),
    ],
)
def test_refused_inputs(code, data, error):
    with pytest.raises(ValueError, match=error):
        decode(code, data)
