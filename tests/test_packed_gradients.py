"""pack_gradients: steps, memory, and operations of users on gradients between a backward pass and a step."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pecker_fast as pf
from pecker_fast.adam.packed_gradient import PackedGradient
from pecker_fast.adam.slots import MOMENTS
from tests.inputs import same_bits
from tests.optim_oracle import make_grads, make_params, set_grads
from tests.test_optim import random_mask

OPTIONS = {
    "adam": {},
    "decay": {"weight_decay": 0.1},
    "adamw": {"weight_decay": 0.1, "decoupled_weight_decay": True, "ema_decay": 0.9},
    "beta1_0": {"betas": (0.0, 0.99), "ema_decay": 0.9, "clip_value": 0.5},
    "everything": {
        "amsgrad": True,
        "maximize": True,
        "weight_decay": 0.1,
        "max_update": 0.5,
        "ema_decay": 0.5,
        "nonfinite": "zero",
    },
    "masters": {"master_weights": True, "ema_decay": 0.9, "weight_decay": 0.1, "betas": (0.0, 0.99)},
    "rounding": {"stochastic_rounding": True, "seed": 3},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def copies_of(params) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def accumulate(params, factors) -> None:
    """A backward pass whose gradients are ``factors``; None: no gradient."""
    pairs = [(p, f) for p, f in zip(params, factors, strict=True) if f is not None]
    sum((p * f).sum() for p, f in pairs).backward()


def make_pair(options: dict, dtype=torch.float32, backend=None, density: float = 0.4):
    """Two optimizers of equal parameters and a mask: the first takes dense gradients, the second packed ones."""
    params = make_params(dtype)
    packed_params = copies_of(params)
    optimizers = [pf.MaskedAdam(ps, lr=0.01, packed=True, backend=backend, **options) for ps in (params, packed_params)]
    return params, packed_params, *optimizers, random_mask(params, density)


def assert_equal(params, packed_params, optimizer, other) -> None:
    """Parameters and packed state, bit for bit."""
    for p, q in zip(params, packed_params, strict=True):
        assert same_bits(p.detach(), q.detach())
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert same_bits(other.state[q][key].float(), value.float()), key


# ---- updates


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(OPTIONS))
def test_updates_equal_masked_steps_with_dense_gradients_and_state(name, dtype, backend):
    """With one mask, bit for bit; two backward passes a step."""
    options = OPTIONS[name]
    if backend == "triton" and dtype != torch.float32:
        pytest.skip("the interpreter is slow")
    params = make_params(dtype)
    if name == "rounding":
        # Random numbers are drawn in memory order, which is row-major for packed state.
        params = [nn.Parameter(p.detach().contiguous()) for p in params]
    packed_params = copies_of(params)
    mask = random_mask(params)
    dense = pf.MaskedAdam(params, lr=0.01, backend=backend, **options)
    packed = pf.MaskedAdam(packed_params, lr=0.01, backend=backend, packed=True, **options)
    pf.pack_gradients(packed, mask)
    for step in range(3):
        for _ in range(2):
            factors = make_grads(params, missing=0.2 if step else 0.0)
            accumulate(params, factors)
            accumulate(packed_params, factors)
        assert all(p.grad is None or isinstance(p.grad, PackedGradient) for p in packed_params)
        dense.step(mask=mask)
        packed.step()
        dense.zero_grad()
        packed.zero_grad()
    for i, (p, q) in enumerate(zip(params, packed_params, strict=True)):
        assert same_bits(p.detach(), q.detach())
        salient = mask[i]
        for key in (*MOMENTS, "master_param", "ema"):
            assert (key in dense.state[p]) == (key in packed.state[q])
            if key in dense.state[p]:
                assert same_bits(packed.state[q][key], dense.state[p][key][salient]), key
    if "ema_decay" in options:
        for ours, expected in zip(packed.ema_parameters(), dense.ema_parameters(), strict=True):
            assert same_bits(ours, expected)


@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
def test_masks_of_any_density_and_large_tensors(density, backend, small):
    params = [nn.Parameter(torch.randn(700 if small else 40000)), nn.Parameter(torch.randn(5, 9))]
    packed_params = copies_of(params)
    optimizer, other = (
        pf.MaskedAdam(ps, packed=True, ema_decay=0.9, backend=backend) for ps in (params, packed_params)
    )
    mask = random_mask(params, density)
    pf.pack_gradients(other, mask)
    for _ in range(2):
        factors = make_grads(params)
        for ps, opt in ((params, optimizer), (packed_params, other)):
            accumulate(ps, factors)
            opt.step(mask=mask)
            opt.zero_grad()
    assert_equal(params, packed_params, optimizer, other)


@pytest.mark.parametrize("name", ["adamw", "masters"])
def test_a_new_mask_holds_from_the_next_backward_pass_on(name, backend, small):
    params, packed_params, optimizer, other, mask = make_pair(OPTIONS[name], torch.bfloat16, backend)
    masks = [mask, random_mask(params)] if small else [mask, mask, random_mask(params), random_mask(params, 0.9)]
    pf.pack_gradients(other)
    for mask in masks:
        other.set_mask(mask)
        factors = make_grads(params)
        accumulate(params, factors)
        accumulate(packed_params, factors)
        optimizer.step(mask=mask)
        other.step()
        assert_equal(params, packed_params, optimizer, other)
        optimizer.zero_grad()
        other.zero_grad()


def test_mask_that_differs_from_the_gradients_is_refused():
    _, packed_params, _, other, mask = make_pair({})
    pf.pack_gradients(other, mask)
    accumulate(packed_params, make_grads(packed_params))
    before = [p.detach().clone() for p in packed_params]
    another = random_mask(packed_params)
    with pytest.raises(ValueError, match="packed by another mask"):
        other.step(mask=another)
    other.set_mask(another)
    for action in (other.step, lambda: accumulate(packed_params, make_grads(packed_params))):
        with pytest.raises(ValueError, match="packed by another mask"):
            action()
    assert all(torch.equal(a, b) for a, b in zip(packed_params, before, strict=True))
    # An equal mask counts as the same.
    other.set_mask(pf.SaliencyMask(mask.words.clone(), mask.shapes))
    other.step()
    assert not torch.equal(packed_params[0], before[0])


# ---- what users do to gradients


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_torch_clips_the_norm_of_the_salient_entries(norm_type, foreach):
    params, packed_params, optimizer, other, mask = make_pair({})
    pf.pack_gradients(other, mask)
    factors = make_grads(params)
    if norm_type == math.inf:
        factors[3] = None  # torch has no maximum of an empty gradient
    accumulate(params, factors)
    accumulate(packed_params, factors)
    mask.apply_([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    norms = [torch.nn.utils.clip_grad_norm_(ps, 0.3, norm_type, foreach=foreach) for ps in (params, packed_params)]
    assert torch.allclose(*norms) and norms[0] > 0.3
    for p, q in zip(params, packed_params, strict=True):
        assert (p.grad is None and q.grad is None) or torch.allclose(p.grad, q.grad.to_dense(), rtol=1e-5, atol=1e-8)
    assert isinstance(packed_params[0].grad, PackedGradient)
    optimizer.step(mask=mask)
    other.step()
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(params, packed_params, strict=True))


@pytest.mark.parametrize("foreach", [None, True, False])
def test_other_operations_on_packed_gradients(foreach):
    params, packed_params, _, other, mask = make_pair({})
    pf.pack_gradients(other, mask)
    factors = make_grads(params)
    noise = make_grads(params)
    for ps in (params, packed_params):
        accumulate(ps, factors)
        torch.nn.utils.clip_grad_value_(ps, 0.5, foreach=foreach)
        for p, n in zip(ps, noise, strict=True):
            p.grad.add_(n, alpha=0.5).mul_(2).div_(torch.tensor(3.0)).sub_(n).neg_()
        torch._foreach_mul_([p.grad for p in ps], noise)
        ps[0].grad.copy_(ps[0].grad * 2)
    mask.apply_([p.grad for p in params])
    for p, q in zip(params, packed_params, strict=True):
        assert isinstance(q.grad, PackedGradient) and same_bits(q.grad.to_dense(), p.grad.contiguous())
        for function in (torch.abs, torch.sum, lambda g: g.norm(), lambda g: (g * g).mean(), lambda g: g.view(-1)):
            ours, expected = function(q.grad), function(p.grad.contiguous())
            assert type(ours) is torch.Tensor and torch.allclose(ours, expected, equal_nan=True)
        for same in (q.grad.clone(), q.grad.detach()):
            assert isinstance(same, PackedGradient) and torch.equal(same.to_dense(), q.grad.to_dense())
    grad = packed_params[0].grad
    assert grad.clone().entries.data_ptr() != grad.entries.data_ptr() == grad.detach().entries.data_ptr()
    assert f"{grad.entries.numel()} of 360" in repr(grad)
    for write in (lambda: grad.cumsum_(0), lambda: grad.index_fill_(0, torch.tensor([0]), 1.0), lambda: grad.t_()):
        with pytest.raises((NotImplementedError, RuntimeError)):
            write()
    with pytest.raises(NotImplementedError, match="to_dense"):
        torch.mul(factors[0], 2, out=grad)


def test_gradients_set_by_the_user_are_packed():
    params, packed_params, optimizer, other, mask = make_pair({})
    first = make_grads(params)
    set_grads(params, [g.clone() for g in first])
    set_grads(packed_params, [g.clone() for g in first])
    pf.pack_gradients(other, mask)
    assert all(isinstance(p.grad, PackedGradient) for p in packed_params)
    for grads in (first, make_grads(params), make_grads(params, missing=0.4)):
        set_grads(params, grads)
        set_grads(packed_params, grads)
        packed_params[0].grad = None if grads[0] is None else packed_params[0].grad
        optimizer.step(mask=mask)
        other.step()
    # The same holds for a packed gradient made by the user.
    accumulate(params, first)
    accumulate(packed_params, first)
    saved = [p.grad.clone() for p in packed_params]
    other.zero_grad()
    set_grads(packed_params, saved)
    optimizer.step(mask=mask)
    other.step()
    assert_equal(params, packed_params, optimizer, other)
    packed_params[0].grad = PackedGradient(
        packed_params[0], torch.zeros(0), torch.zeros_like(packed_params[0].grad.words)
    )
    with pytest.raises(ValueError, match="packed by another mask"):
        other.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    params, packed_params, optimizer, other, mask = make_pair({})
    pf.pack_gradients(other, mask)
    for _ in range(3):
        factors = make_grads(params)
        accumulate(params, factors)
        accumulate(packed_params, factors)
        optimizer.step(mask=mask)
        other.step()
        optimizer.zero_grad(set_to_none)
        other.zero_grad(set_to_none)
        for p in packed_params:
            assert p.grad is None if set_to_none else not p.grad.to_dense().any()
    assert_equal(params, packed_params, optimizer, other)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler(dtype, unscale):
    if unscale and dtype == torch.float16:
        pytest.skip("GradScaler unscales no float16 gradients")
    params, packed_params, optimizer, other, mask = make_pair({"ema_decay": 0.9}, dtype)
    pf.pack_gradients(other, mask)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2)]
    inside = torch.where(mask[1], torch.tensor(math.inf, dtype=dtype), 1)
    outside = torch.where(mask[1], 1, torch.tensor(math.inf, dtype=dtype))
    for step in range(5):
        factors = make_grads(params)
        if step == 2:
            factors[1] = inside
        for ps, opt, scaler in zip((params, packed_params), (optimizer, other), scalers, strict=True):
            before = ps[1].detach().clone()
            sum(scaler.scale((p * f).sum()) for p, f in zip(ps, factors, strict=True)).backward()
            if unscale:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_value_(ps, 0.7)
            scaler.step(opt, mask=mask)
            scaler.update()
            opt.zero_grad()
            assert torch.equal(before, ps[1]) == (step == 2)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_equal(params, packed_params, optimizer, other)
    # Entries that no step uses cause no skip.
    scalers[1].scale((packed_params[1] * outside).sum()).backward()
    scalers[1].step(other)
    scalers[1].update()
    assert not torch.equal(before, packed_params[1]) and packed_params[1].isfinite().all()


@pytest.mark.parametrize("policy", ["skip", "zero", "raise", "propagate"])
def test_nonfinite_policies(policy, backend):
    params, packed_params, optimizer, other, mask = make_pair({"nonfinite": policy}, backend=backend)
    pf.pack_gradients(other, mask)
    for step in range(3):
        factors = make_grads(params)
        if step == 1:
            factors[0][torch.rand(factors[0].shape) < 0.1] = math.nan
            factors[1][:] = math.inf
        for ps, opt in ((params, optimizer), (packed_params, other)):
            accumulate(ps, factors)
            if policy == "raise" and step == 1:
                with pytest.raises(FloatingPointError, match="nothing was changed"):
                    opt.step(mask=mask)
            else:
                opt.step(mask=mask)
            opt.zero_grad()
        assert optimizer.nonfinite_count == other.nonfinite_count
    assert (optimizer.nonfinite_count > 0) == (policy in ("skip", "zero"))
    assert_equal(params, packed_params, optimizer, other)


def test_added_and_removed_parameters():
    params, packed_params, optimizer, other, _ = make_pair({})
    for ps in (params, packed_params):
        ps[0].requires_grad_(False)
    mask = random_mask(params[1:])
    pf.pack_gradients(other, mask)
    extra = nn.Parameter(torch.randn(6, 7))
    added = [nn.Parameter(extra.detach().clone()) for _ in range(2)]
    factors = make_grads([*params, extra])
    for ps, opt in ((params, optimizer), (packed_params, other)):
        accumulate(ps[1:], factors[1:-1])
        opt.step(mask=mask)
        opt.zero_grad()
    assert packed_params[0].grad is None and torch.equal(packed_params[0], params[0])
    mask = random_mask([*params, extra])
    other.set_mask(mask)
    for ps, opt, new in ((params, optimizer, added[0]), (packed_params, other, added[1])):
        ps[0].requires_grad_(True)
        opt.add_param_group({"params": [new]})
        accumulate([*ps, new], factors)
        if opt is other:
            assert isinstance(new.grad, PackedGradient)
        opt.step(mask=mask)
    assert isinstance(packed_params[0].grad, PackedGradient)
    assert_equal([*params, added[0]], [*packed_params, added[1]], optimizer, other)


def test_without_a_mask_gradients_stay_dense():
    params, packed_params, optimizer, other, mask = make_pair({})
    with pf.pack_gradients(other):
        factors = make_grads(params)
        accumulate(params, factors)
        accumulate(packed_params, factors)
        assert type(packed_params[0].grad) is torch.Tensor
        optimizer.step(mask=mask)
        other.step(mask=mask)
        other.set_mask(mask)
        optimizer.step(mask=mask)
        other.step()
        assert isinstance(packed_params[0].grad, PackedGradient)
        assert_equal(params, packed_params, optimizer, other)


def test_removing_makes_gradients_dense_again():
    params, packed_params, optimizer, other, mask = make_pair({})
    factors = make_grads(params)
    with pf.pack_gradients(other, mask) as handle:
        accumulate(params, factors)
        accumulate(packed_params, factors)
        assert handle.nbytes >= sum(p.grad.entries.nbytes for p in packed_params)
    mask.apply_([p.grad for p in params])
    for p, q in zip(params, packed_params, strict=True):
        assert type(q.grad) is torch.Tensor and torch.equal(p.grad, q.grad)
        assert not q._post_accumulate_grad_hooks
    handle.remove()
    assert handle.nbytes == 0 and other._mask is None
    accumulate(params, factors)
    accumulate(packed_params, factors)
    optimizer.step(mask=mask)
    other.step(mask=mask)
    assert_equal(params, packed_params, optimizer, other)
    # A mask that was set before, or meanwhile, is kept.
    other.set_mask(mask)
    another = random_mask(params)
    other.zero_grad()
    pf.pack_gradients(other, another).remove()
    assert other._mask is mask
    with pf.pack_gradients(other, another):
        other.set_mask(mask)
    assert other._mask is mask


def test_copies_have_no_packing_and_keep_nothing_alive():
    _, packed_params, _, other, mask = make_pair({"ema_decay": 0.9})
    handle = pf.pack_gradients(other, mask)
    accumulate(packed_params, make_grads(packed_params))
    other.step()
    twins, twin = copy.deepcopy((packed_params, other))
    accumulate(twins, make_grads(twins))
    assert type(twins[0].grad) is torch.Tensor
    twin.step(mask=mask)
    alive = weakref.ref(other)
    gc.disable()
    try:
        del other, handle
        assert alive() is None
    finally:
        gc.enable()
    accumulate(packed_params, make_grads(packed_params))


def test_errors():
    params, packed_params, _, other, mask = make_pair({})
    for optimizer in (torch.optim.Adam(params), 3):
        with pytest.raises(TypeError, match="expected a MaskedAdam"):
            pf.pack_gradients(optimizer, mask)
    with pytest.raises(ValueError, match="packed=True"):
        pf.pack_gradients(pf.MaskedAdam(params), mask)
    with pytest.raises(TypeError, match="expected a SaliencyMask"):
        pf.pack_gradients(other, mask.words)
    with pytest.raises(ValueError, match="tensors without names"):
        pf.pack_gradients(other, random_mask(params[1:]))
    assert other._packing is None and other._mask is None and not packed_params[0]._post_accumulate_grad_hooks
    with pf.pack_gradients(other, mask):
        with pytest.raises(RuntimeError, match="packed already"):
            pf.pack_gradients(other, mask)
        with pytest.raises(RuntimeError, match="create_graph"):
            packed_params[0].square().sum().backward(create_graph=True)
        packed_params[0].grad = None
        with pytest.raises(ValueError, match="takes masked steps"):
            other.step(mask=mask, masked_grads=make_grads(packed_params))
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = pf.MaskedAdam(embedding.parameters(), packed=True)
    pf.pack_gradients(optimizer, random_mask([embedding.weight]))
    with pytest.raises(RuntimeError, match="sparse"):
        embedding(torch.tensor([1])).sum().backward()


# ---- memory


def bytes_of(optimizer: pf.MaskedAdam) -> int:
    """Moments, EMA and masters."""
    keys = (*MOMENTS, "ema", "master_param")
    return sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key in keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_memory_is_in_proportion_to_the_mask(density, dtype):
    """Bytes of gradients, moments, EMA and masters over those of a dense step."""
    options = {"ema_decay": 0.999, "master_weights": dtype == torch.bfloat16}
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.GroupNorm(4, 64), nn.Conv2d(64, 64, 3), nn.Linear(4, 300)).to(dtype)
    twin = copy.deepcopy(model)
    dense = pf.MaskedAdam(model.named_parameters(), **options)
    packed = pf.MaskedAdam(twin.named_parameters(), packed=True, **options)
    mask = pf.saliency_mask([torch.rand_like(p) for p in model.parameters()], density=density)
    handle = pf.pack_gradients(packed, mask)
    for ps, optimizer in ((model, dense), (twin, packed)):
        ps(torch.randn(2, 8, 8, 8, dtype=dtype)).square().mean().backward()
        optimizer.step(mask=mask)
    whole = bytes_of(dense) + sum(p.grad.nbytes for p in model.parameters())
    ours = bytes_of(packed) + handle.nbytes
    assert all(isinstance(p.grad, PackedGradient) for p in twin.parameters())
    assert ours <= 1.15 * density * whole
    assert handle.nbytes >= mask.count * dtype.itemsize and bytes_of(packed) >= 12 * mask.count


class LiveGradients(TorchDispatchMode):
    """Peak memory in tensors with the shapes of ``params``, in any order of dimensions."""

    def __init__(self, params) -> None:
        super().__init__()
        self._shapes = {tuple(sorted(p.shape)) for p in params}
        self._known = {p.untyped_storage().data_ptr() for p in params}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        for leaf in tree_leaves(result):
            if type(leaf) is torch.Tensor and tuple(sorted(leaf.shape)) in self._shapes:
                storage = leaf.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in self._known:
                    self._live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_backward_pass_holds_one_dense_gradient(layout):
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(5))).to(memory_format=layout)
    params = list(model.parameters())
    one = params[0].nbytes
    optimizer = pf.MaskedAdam(params, packed=True)
    mask = random_mask(params, 0.05)
    x = torch.randn(1, 32, 4, 4).to(memory_format=layout)

    def peak() -> float:
        """Peak of two backward passes, in units of dense gradients."""
        losses = [model(images).square().mean() for images in (x, -x)]
        with LiveGradients(params) as live:
            for loss in losses:
                loss.backward()
        return live.peak / one

    assert peak() >= 5
    with pf.pack_gradients(optimizer, mask):
        optimizer.zero_grad()
        assert 1 <= peak() <= 1.2
