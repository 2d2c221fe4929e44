"""saliency_mask and MaskedAdam on parameters that FSDP2 has sharded: equal to one process with whole parameters."""

import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pecker_fast as pf
from pecker_fast.sharding import local, part_of, shard_group
from pecker_fast.sharding import whole as whole_tensor
from tests.processes import spawn

OPTIONS = [
    {},
    {"betas": (0.0, 0.999), "ema_decay": 0.9, "clip_value": 0.01},
    {"packed": True, "amsgrad": True},
    {"nonfinite": "skip", "weight_decay": 0.1},
]
KINDS = ["plain", "masked", "joint", "masked", "other mask"]


def network() -> nn.Module:
    torch.manual_seed(0)
    # Three processes cannot divide these rows evenly; one process has no part of some tensors.
    return nn.Sequential(nn.Linear(7, 16), nn.GELU(), nn.Linear(16, 5), nn.GELU(), nn.Linear(5, 1))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean() + model(x).mean()


def gradients(model: nn.Module, seed: int) -> list[torch.Tensor]:
    """The same whole batch on every process: FSDP2 averages equal gradients."""
    model.zero_grad()
    loss_of(model, batch(seed)).backward()
    return [param.grad.clone() for param in model.parameters()]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model: nn.Module, options: dict) -> tuple[pf.MaskedAdam, dict[str, torch.Tensor]]:
    """The whole result of a few steps of each kind."""
    optimizer = pf.MaskedAdam(model.named_parameters(), lr=1e-2, **options)
    counts = []
    for i, kind in enumerate(KINDS):
        forget = gradients(model, 100 + i)
        gradients(model, i)
        if kind != "other mask" or i == 0:
            mask = pf.saliency_mask(model, density=0.4)
        else:
            mask = pf.saliency_mask(model, threshold=1e-3)
        counts.append(mask.count)
        if options.get("packed") or "mask" in kind:
            optimizer.step(mask=mask)
        elif kind == "joint":
            optimizer.step(mask=mask, masked_grads=forget)
        else:
            optimizer.step()
    out = {f"param.{name}": whole(param.detach()) for name, param in model.named_parameters()}
    if "ema_decay" in options:
        out |= {f"ema.{i}": whole(ema) for i, ema in enumerate(optimizer.ema_parameters())}
        with optimizer.swapped_ema():
            out |= {f"swapped.{name}": whole(param.detach()).clone() for name, param in model.named_parameters()}
    if not options.get("packed"):
        state = optimizer.state_dict()["state"]
        for i, entry in state.items():
            # gloo cannot gather the counts' int16.
            out |= {f"{key}.{i}": whole(entry[key].double()) for key in ("exp_avg_sq", "counts") if key in entry}
    return optimizer, {key: value.clone() for key, value in out.items()} | {"counts": torch.tensor(counts)}


def sharded_network(mesh) -> nn.Module:
    model = network()
    for module in (*model, model):
        if isinstance(module, nn.Linear) or module is model:
            # gloo of torch 2.8 returns the sum if FSDP2 requests the average (pytorch issue 162338): let FSDP2 divide.
            fully_shard(module, mesh=mesh).set_force_sum_reduction_for_comms(True)
    return model


def check_round_trip(mesh, model: nn.Module, optimizer: pf.MaskedAdam, options: dict) -> None:
    """A saved sharded state continues exactly."""
    saved = copy.deepcopy(optimizer.state_dict())
    for param, entry in zip(model.parameters(), saved["state"].values(), strict=True):
        if not options.get("packed"):
            assert isinstance(entry["exp_avg_sq"], DTensor) and entry["exp_avg_sq"].shape == param.shape
    other = sharded_network(mesh)
    for param, value in zip(other.parameters(), model.parameters(), strict=True):
        param.detach().to_local().copy_(value.detach().to_local())
    again = pf.MaskedAdam(other.named_parameters(), lr=1e-2, **options)
    again.load_state_dict(saved)
    for net, opt in ((model, optimizer), (other, again)):
        gradients(net, 50)
        opt.step(mask=pf.saliency_mask(net, density=0.3))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())


def check_distributed_checkpoint(model: nn.Module, folder: str) -> None:
    """torch.distributed.checkpoint saves and loads the optimizer's state."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    optimizer = pf.MaskedAdam(model.named_parameters(), lr=1e-2, ema_decay=0.9)
    gradients(model, 1)
    optimizer.step()
    expected = [entry["exp_avg_sq"].full_tensor().clone() for entry in optimizer.state_dict()["state"].values()]
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=f"{folder}/dcp")
    other = pf.MaskedAdam(model.named_parameters(), lr=1e-2, ema_decay=0.9)
    held = {"optim": get_optimizer_state_dict(model, other)}
    dcp.load(held, checkpoint_id=f"{folder}/dcp")
    set_optimizer_state_dict(model, other, held["optim"])
    actual = [entry["exp_avg_sq"].full_tensor() for entry in other.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert all(float(entry["step"]) == 1 for entry in other.state_dict()["state"].values())


def check_whole_masks(mesh) -> None:
    """A mask assembled from parts is that of the whole tensors, and each part is unchanged."""
    whole_params = [torch.randn(7, 3), torch.randn(1, 2, 2), torch.randn(64), torch.zeros(0)]
    for tensor in whole_params:
        dist.broadcast(tensor, 0)
    params = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in whole_params]
    mask, expected = pf.saliency_mask(params, density=0.3), pf.saliency_mask(whole_params, density=0.3)
    others = [torch.randn(tensor.shape) for tensor in whole_params]
    for tensor in others:
        dist.broadcast(tensor, 0)
    sharded_others = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in others]
    for options in ({"density": [0.3, 0.01]}, {"threshold": [2.0]}):
        # The damping is that of the whole tensor on every process.
        parts = pf.saliency_mask(params, relative_to=sharded_others, damping=0.5, **options)
        wholes = pf.saliency_mask(whole_params, relative_to=others, damping=0.5, **options)
        assert all(a.whole(params).equal(b) for a, b in zip(parts, wholes, strict=True))
        assert [a.threshold for a in parts] == [b.threshold for b in wholes]
    try:
        pf.saliency_mask(params, density=0.3, relative_to=[local(tensor) for tensor in sharded_others])
    except ValueError as error:
        assert "sharded alike" in str(error)
    else:
        raise AssertionError("not refused")
    together = mask.whole(params)
    assert together.equal(expected) and together.shapes == expected.shapes
    assert together.threshold == expected.threshold and together.count == expected.count
    again = together.part(params)
    assert again.shapes == mask.shapes and again.equal(mask)
    # For parameters that are not sharded both are the mask itself.
    assert expected.whole(whole_params).equal(expected) and expected.part(whole_params).equal(expected)
    for wrong in (params[:-1], whole_params):
        if [p.shape for p in map(local, wrong)] != list(mask.shapes):
            try:
                mask.whole(wrong)
            except ValueError as error:
                assert "shapes of the mask's tensors" in str(error)
            else:
                raise AssertionError("not refused")
    params[0].to_local().fill_(dist.get_rank())
    params[0].to_local()[:1, 0] = float("nan")
    nans = pf.saliency_mask(params, k=3).whole(params).nan_count
    held = torch.tensor(int(params[0].to_local().isnan().sum()))
    dist.all_reduce(held)
    assert nans == held > 0
    counts = torch.arange(-3, 4, dtype=torch.int16)
    sharded = distribute_tensor(counts, mesh, [Shard(0)], src_data_rank=None)
    assert torch.equal(whole_tensor(sharded), counts) and whole_tensor(counts) is counts
    assert torch.equal(part_of(counts, sharded), sharded.to_local())


def check_errors(mesh) -> None:
    sharded = distribute_tensor(torch.randn(6), mesh, [Shard(0)])
    replicated = distribute_tensor(torch.randn(6), mesh, [Replicate()])
    assert shard_group([replicated]) is None and shard_group([sharded]) is mesh.get_group(0)
    for scores, message in (
        ([sharded, torch.randn(6)], "sharded in different ways"),
        ([sharded, replicated], "sharded in different ways"),
    ):
        try:
            pf.saliency_mask(scores, k=2)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError("not refused")
    try:
        pf.saliency_mask([sharded], k=1, scope="tensor")
    except ValueError as error:
        assert "scope" in str(error)
    else:
        raise AssertionError("not refused")
    assert pf.saliency_mask([replicated], k=2).count == 2


def check_skipping(mesh) -> None:
    """A NaN in one process makes all of them skip."""
    param = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    optimizer = pf.MaskedAdam([param], nonfinite="skip")
    grad = torch.ones(6)
    grad[0] = float("nan")
    param.grad = distribute_tensor(grad, mesh, [Shard(0)])
    optimizer.step()
    assert optimizer.nonfinite_count == 1 and torch.equal(param.full_tensor(), torch.ones(6))
    accumulator = pf.SaliencyAccumulator([("p", param)], reduce="abs_sum")
    param.grad = distribute_tensor(-torch.arange(6.0), mesh, [Shard(0)])
    accumulator.add()
    accumulator.add()
    mask = accumulator.mask(k=2)
    assert mask.threshold == 8.0
    total = torch.tensor(mask.count)
    dist.all_reduce(total)
    assert int(total) == 2


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=90),
    )
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        results = []
        for options in OPTIONS:
            model = sharded_network(mesh)
            optimizer, out = trained(model, options)
            dist.all_reduce(out["counts"])
            results.append(out)
            check_round_trip(mesh, model, optimizer, options)
        check_distributed_checkpoint(model, folder)
        check_errors(mesh)
        check_whole_masks(mesh)
        check_skipping(mesh)
        if rank == 0:
            torch.save(results, f"{folder}/{ranks}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_sharded_equals_whole(tmp_path, monkeypatch, ranks):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    spawn(work, args=(ranks, str(tmp_path)), nprocs=ranks)
    for options, result in zip(OPTIONS, torch.load(tmp_path / f"{ranks}.pt"), strict=True):
        _, expected = trained(network(), options)
        assert expected.keys() == result.keys()
        for name, value in expected.items():
            close = torch.allclose(result[name].double(), value.double(), rtol=1e-5, atol=1e-7)
            assert close, (options, name, (result[name] - value).abs().max())
