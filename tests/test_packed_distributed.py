"""Packed gradients of several processes: averaged by all_reduce, by DistributedDataParallel and by FSDP2."""

import datetime
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pecker_fast as pf
from pecker_fast.adam.packed_gradient import PackedGradient
from tests.inputs import same_bits
from tests.processes import spawn

RANKS = 2
OPTIONS = {"packed": True, "lr": 1e-2, "betas": (0.0, 0.99), "ema_decay": 0.9}


class Network(nn.Module):
    """Two branches, one of which may be skipped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left, self.right = nn.Linear(7, 40), nn.Linear(40, 30), nn.Linear(40, 30)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, branch: str) -> torch.Tensor:
        h = self.first(x).tanh()
        h = self.left(h) if branch == "left" else self.left(h) + self.right(h)
        return h.square().mean()


def make_mask(model: nn.Module, seed: int = 5) -> pf.SaliencyMask:
    generator = torch.Generator().manual_seed(seed)
    bits = {name: torch.rand(p.shape, generator=generator) < 0.1 for name, p in model.named_parameters()}
    return pf.SaliencyMask.from_bool(bits)


def batch(step: int, rank: int, part: int = 0) -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(100 * step + 10 * rank + part))


def branch_of(step: int, rank: int) -> str:
    """In the second step only one process uses one of the branches."""
    return "left" if step == 0 or (step == 1 and rank == 0) else "both"


class Traffic:
    """The sizes of all tensors that all_reduce is called with."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._all_reduce = dist.all_reduce

    def __enter__(self) -> "Traffic":
        def counted(tensor, *args, **kwargs):
            self.sizes.append(tensor.nbytes)
            return self._all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *error) -> None:
        dist.all_reduce = self._all_reduce


def expected() -> Network:
    """In one process, with the average of dense gradients; divided first, as several processes do."""
    model = Network()
    optimizer = pf.MaskedAdam(model.named_parameters(), **OPTIONS)
    mask = make_mask(model)
    for step in range(3):
        grads: dict[str, torch.Tensor] = {}
        for rank in range(RANKS):
            optimizer.zero_grad()
            for part in range(2):
                model(batch(step, rank, part), branch_of(step, rank)).backward()
            for name, param in model.named_parameters():
                if param.grad is not None:
                    grads[name] = grads.get(name, 0) + param.grad / RANKS
        for name, param in model.named_parameters():
            param.grad = grads.get(name)
        optimizer.step(mask=mask)
    return model


def check_equal(model: nn.Module, reference: nn.Module) -> None:
    for (name, param), value in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert same_bits(param.detach(), value.detach()), name


def check_all_reduce(rank: int) -> None:
    model = Network()
    optimizer = pf.MaskedAdam(model.named_parameters(), **OPTIONS)
    mask = make_mask(model)
    handle = pf.pack_gradients(optimizer, mask)
    for step in range(3):
        for part in range(2):
            model(batch(step, rank, part), branch_of(step, rank)).backward()
        with Traffic() as traffic:
            handle.all_reduce()
        # The packed entries, which parameters have a gradient, and once a digest of the mask.
        assert traffic.sizes == [16, 8, handle.nbytes][step > 0 :]
        assert handle.nbytes <= 1.3 * 4 * mask.count
        assert (model.right.weight.grad is None) == (step == 0) and model.unused.weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
    check_equal(model, expected())


def check_ddp(rank: int) -> None:
    model = Network()
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=0.004)
    optimizer = pf.MaskedAdam(model.named_parameters(), **OPTIONS)
    mask = make_mask(model)
    handle = pf.pack_gradients(optimizer, mask)
    handle.register_comm_hook(ddp)
    for step in range(3):
        with ddp.no_sync():
            ddp(batch(step, rank, 0), branch_of(step, rank)).backward()
        with Traffic() as traffic:
            ddp(batch(step, rank, 1), branch_of(step, rank)).backward()
        assert sum(traffic.sizes) - (16 if step == 0 else 0) == 4 * mask.count
        assert isinstance(model.first.weight.grad, PackedGradient)
        assert (model.right.weight.grad is None) == (step == 0)
        optimizer.step()
        optimizer.zero_grad()
    check_equal(model, expected())
    # After its removal the hook sends everything.
    handle.remove()
    dense, packed = (g.clone() for g in (torch.zeros(40, 7), torch.zeros(40, 7)))
    ddp(batch(9, rank), "both").backward()
    packed.copy_(model.first.weight.grad)
    for other in range(RANKS):
        ddp.zero_grad()
        model(batch(9, other), "both").backward()
        dense += model.first.weight.grad / RANKS
    assert torch.allclose(dense, packed, atol=1e-7)


def check_different_masks(rank: int) -> None:
    model = Network()
    optimizer = pf.MaskedAdam(model.named_parameters(), **OPTIONS)
    handle = pf.pack_gradients(optimizer, make_mask(model, seed=rank))
    model(batch(0, rank), "left").backward()
    try:
        handle.all_reduce()
    except ValueError as error:
        assert "different masks" in str(error)
    else:
        raise AssertionError("not refused")


def sharded_network(mesh) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 1))
    for module in (*model, model):
        if isinstance(module, nn.Linear) or module is model:
            # gloo of torch 2.8 returns the sum if FSDP2 requests the average.
            fully_shard(module, mesh=mesh).set_force_sum_reduction_for_comms(True)
    return model


def check_fsdp(mesh, rank: int) -> None:
    """Steps on parts of parameters equal masked steps with dense gradients."""
    models = [sharded_network(mesh) for _ in range(2)]
    optimizers = [pf.MaskedAdam(model.named_parameters(), **OPTIONS) for model in models]
    models[0](batch(0, 7)).square().mean().backward()
    mask = pf.saliency_mask(models[0], density=0.3)
    optimizers[0].zero_grad()
    handle = pf.pack_gradients(optimizers[1], mask)
    for step in range(3):
        for part in range(2):
            for model in models:
                model(batch(step, rank, part)).square().mean().backward()
        for param in models[1].parameters():
            assert isinstance(param.grad.to_local(), PackedGradient)
        mask.apply_(models[0])
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) for model in models]
        assert torch.allclose(*(norm.full_tensor() for norm in norms)) and norms[0].full_tensor() > 0.05
        for optimizer in optimizers:
            optimizer.step(mask=mask)
            optimizer.zero_grad()
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.allclose(ours.to_local(), theirs.to_local(), rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(optimizers[1].ema_parameters(), optimizers[0].ema_parameters(), strict=True):
        assert torch.allclose(ours.to_local(), theirs.to_local(), rtol=1e-5, atol=1e-7)
    models[1](batch(0, rank)).square().mean().backward()
    try:
        handle.all_reduce()
    except ValueError as error:
        assert "FSDP averages" in str(error)
    else:
        raise AssertionError("not refused")
    handle.remove()
    assert all(type(param.grad.to_local()) is torch.Tensor for param in models[1].parameters())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=90)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    try:
        check_all_reduce(rank)
        check_ddp(rank)
        check_different_masks(rank)
        check_fsdp(init_device_mesh("cpu", (RANKS,)), rank)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    spawn(work, args=(str(tmp_path),), nprocs=RANKS)
