"""saliency_mask over process groups: equal to the mask of all shards in one process. gloo, on this machine."""

import datetime
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pecker_fast as pf
from tests import oracle
from tests.inputs import FLOATS, scores
from tests.processes import spawn

CALLS = [
    {"density": 0.3},
    {"density": [0.01, 0.5, 1.0]},
    {"k": 1},
    {"k": 700},
    {"k": [5, 900], "ties": "all"},
    {"threshold": 0.5},
    {"density": 0.4, "ties": "all"},
    {"density": [0.3, 0.02], "damping": 0.125},
    {"threshold": 2.0, "damping": 0.5},
]
"""Those with ``damping`` are relative to other scores: see ``others_of``."""


def shards_of(kind: str, ranks: int) -> list[list[torch.Tensor]]:
    """Shards of different sizes; the second one is empty in some kinds."""
    made = []
    for rank in range(ranks):
        sizes = [0] if kind == "empty_shard" and rank == 1 else [int(np.random.randint(1, 700)), 33, 0]
        of = {"empty_shard": "ties", "nan_shard": "nans" if rank == 0 else "special"}.get(kind, kind)
        made.append([scores(of, n, FLOATS[(i + rank) % 3]) for i, n in enumerate(sizes)])
    return made


def others_of(shard: list[torch.Tensor]) -> list[torch.Tensor]:
    """Other scores of the same sizes and dtypes."""
    return [t.flip(0) for t in shard]


def answer(mask) -> list[tuple]:
    masks = mask if isinstance(mask, list) else [mask]
    return [(m.words, m.threshold, m.count, m.nan_count) for m in masks]


def work(rank: int, folder: str, inputs: dict[int, list]) -> None:
    """One of three ranks; the last two form a separate group, in which their ranks are 0 and 1."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=3,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        groups = {3: dist.group.WORLD, 2: dist.new_group([1, 2])}
        results, errors = {2: [], 3: []}, []
        for ranks, group in groups.items():
            own = rank - (3 - ranks)
            if own < 0:
                continue
            for shards in inputs[ranks]:
                for call in CALLS:
                    others = {"relative_to": others_of(shards[own])} if "damping" in call else {}
                    results[ranks].append(answer(pf.saliency_mask(shards[own], group=group, **call, **others)))
            try:
                pf.saliency_mask(inputs[ranks][0][own], k=10**9, group=group)
            except ValueError as error:
                errors.append(str(error))
        torch.save((results, errors), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def expected(shards: list[list[torch.Tensor]], call: dict) -> list[oracle.Selection]:
    tensors = [t for shard in shards for t in shard]
    if "damping" in call:
        tensors = oracle.quotients(tensors, [t for shard in shards for t in others_of(shard)], call["damping"])
    total = sum(t.numel() for t in tensors)
    ties_all = call.get("ties") == "all"
    name = next(n for n in ("density", "k", "threshold") if n in call)
    values = call[name] if isinstance(call[name], list) else [call[name]]
    if name == "threshold":
        reached = [abs(v) for t in tensors for v in t.float().tolist() if abs(v) >= values[0]]
        return [oracle.keep_at_least(tensors, min(reached, default=math.inf))]
    ks = [max(1, int(v * total)) if name == "density" else min(v, total) for v in values]
    return oracle.selections(tensors, ks, ties_all)


KINDS = {
    2: ["ties", "special", "empty_shard"],
    3: ["ties", "special", "heavy", "constant", "zeros", "nan_shard", "empty_shard"],
}


def test_equals_the_mask_of_all_shards(tmp_path, monkeypatch):
    inputs = {ranks: [shards_of(kind, ranks) for kind in kinds] for ranks, kinds in KINDS.items()}
    for shards in [*inputs[2], *inputs[3]]:
        # Enough entries for the largest k.
        shards[-1].append(scores("ties", 1400))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    spawn(work, args=(str(tmp_path), inputs), nprocs=3)
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert [len(errors) for _, errors in by_rank] == [1, 2, 2]
    assert all("k is 1000000000" in error for _, errors in by_rank for error in errors)
    for ranks in (2, 3):
        for i, shards in enumerate(inputs[ranks]):
            for j, call in enumerate(CALLS):
                answers = [results[ranks][i * len(CALLS) + j] for results, _ in by_rank[3 - ranks :]]
                for row, truth in enumerate(expected(shards, call)):
                    check(answers, row, truth, f"{ranks} ranks {KINDS[ranks][i]} {call} row {row}")


def check(answers: list[list[tuple]], row: int, truth: oracle.Selection, where: str) -> None:
    words = torch.cat([a[row][0] for a in answers])
    assert (words.numpy() == oracle.all_words(truth.masks)).all(), where
    assert {a[row][1] for a in answers} == {truth.threshold}, where
    assert sum(a[row][2] for a in answers) == truth.count, where
    assert sum(a[row][3] for a in answers) == truth.nan_count, where


def test_scope_tensor_is_refused():
    with pytest.raises(ValueError, match="group"):
        pf.saliency_mask([torch.randn(3)], k=1, scope="tensor", group=object())
