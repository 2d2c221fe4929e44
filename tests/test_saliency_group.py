"""saliency_mask over process groups: equal to the mask of all shards in one process. gloo, on this machine."""

import datetime
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pecker_fast as pf
from tests import oracle
from tests.inputs import FLOATS, scores

CALLS = [
    {"density": 0.3},
    {"density": [0.01, 0.5, 1.0]},
    {"k": 1},
    {"k": 700},
    {"k": [5, 900], "ties": "all"},
    {"threshold": 0.5},
    {"density": 0.4, "ties": "all"},
]


def shards_of(kind: str, ranks: int) -> list[list[torch.Tensor]]:
    """Shards of different sizes; the second one is empty in some kinds."""
    made = []
    for rank in range(ranks):
        sizes = [0] if kind == "empty_shard" and rank == 1 else [int(np.random.randint(1, 700)), 33, 0]
        of = {"empty_shard": "ties", "nan_shard": "nans" if rank == 0 else "special"}.get(kind, kind)
        made.append([scores(of, n, FLOATS[(i + rank) % 3]) for i, n in enumerate(sizes)])
    return made


def answer(mask) -> list[tuple]:
    masks = mask if isinstance(mask, list) else [mask]
    return [(m.words, m.threshold, m.count, m.nan_count) for m in masks]


def work(rank: int, ranks: int, folder: str, inputs: list) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        results = []
        for shards in inputs:
            for call in CALLS:
                results.append(answer(pf.saliency_mask(shards[rank], group=dist.group.WORLD, **call)))
        with_error = None
        try:
            pf.saliency_mask(shards[rank], k=10**9, group=dist.group.WORLD)
        except ValueError as error:
            with_error = str(error)
        torch.save((results, with_error), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def expected(shards: list[list[torch.Tensor]], call: dict) -> list[oracle.Selection]:
    tensors = [t for shard in shards for t in shard]
    total = sum(t.numel() for t in tensors)
    ties_all = call.get("ties") == "all"
    name = next(n for n in ("density", "k", "threshold") if n in call)
    values = call[name] if isinstance(call[name], list) else [call[name]]
    if name == "threshold":
        reached = [abs(v) for t in tensors for v in t.float().tolist() if abs(v) >= values[0]]
        return [oracle.keep_at_least(tensors, min(reached, default=math.inf))]
    ks = [max(1, int(v * total)) if name == "density" else min(v, total) for v in values]
    return [oracle.select(tensors, k, ties_all) for k in ks]


@pytest.mark.parametrize("ranks", [2, 3])
def test_equals_the_mask_of_all_shards(ranks, tmp_path, monkeypatch):
    kinds = ["ties", "special", "heavy", "constant", "zeros", "nan_shard", "empty_shard"]
    inputs = [shards_of(kind, ranks) for kind in kinds]
    # At least 1400 entries, for the largest k.
    for shards in inputs:
        shards[-1].append(scores("ties", 1400))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    mp.spawn(work, args=(ranks, str(tmp_path), inputs), nprocs=ranks)
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    assert all("k is 1000000000" in error for _, error in by_rank)
    for i, shards in enumerate(inputs):
        for j, call in enumerate(CALLS):
            answers = [results[i * len(CALLS) + j] for results, _ in by_rank]
            for row, truth in enumerate(expected(shards, call)):
                where = f"{kinds[i]} {call} row {row}"
                words = torch.cat([a[row][0] for a in answers])
                assert (words.numpy() == oracle.all_words(truth.masks)).all(), where
                assert {a[row][1] for a in answers} == {truth.threshold}, where
                assert sum(a[row][2] for a in answers) == truth.count, where
                assert sum(a[row][3] for a in answers) == truth.nan_count, where


def test_scope_tensor_is_refused():
    with pytest.raises(ValueError, match="group"):
        pf.saliency_mask([torch.randn(3)], k=1, scope="tensor", group=object())
