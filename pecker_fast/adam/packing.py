"""Gradients packed as soon as they exist: memory and communication in proportion to the mask."""

import hashlib
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.optim import Optimizer

from .. import ops
from ..flat import row_major
from ..mask import SaliencyMask
from ..sharding import is_sharded, like, local
from .alignment import check_grad
from .binding import Binding
from .packed_gradient import PackedGradient
from .slots import Slot

# Entries that each gradient is padded to in its buffer: 16 bytes in every dtype.
_ALIGNMENT = 8
# Gradients whose memory is not in row-major order are packed in about so many parts, to copy one part at a time.
_PARTS = 16


@dataclass(eq=False)
class _Gradient:
    """The packed gradient of one parameter."""

    slot: Slot
    packed: PackedGradient
    # The parameter's .grad: ``packed``, or a DTensor of it.
    stand_in: Tensor
    # First and last row, and salient entries, of each part that is packed by itself.
    parts: list[tuple[int, int, int]] | None

    def is_present(self) -> bool:
        return self.slot.owner.grad is self.stand_in

    def store(self, grad: Tensor) -> None:
        """Takes the values of ``grad`` and puts the packed gradient into the parameter's .grad."""
        entries, words = self.packed.entries, self.packed.words
        if isinstance(grad, PackedGradient):
            if not torch.equal(grad.words, words):
                raise ValueError(
                    f"the gradient of parameter {self.slot.label} was packed by another mask: call zero_grad() before "
                    "the first backward pass with a new mask"
                )
            entries.copy_(grad.entries)
        elif self.parts is None or grad.is_contiguous():
            entries.copy_(self.packed.pack(grad))
        else:
            row = grad[0].numel()
            first = 0
            for begin, end, count in self.parts:
                part = ops.pack(row_major(grad[begin:end]), words[begin * row // ops.WORD_BITS :], count)
                entries[first : first + count].copy_(part)
                first += count
        self.slot.owner.grad = self.stand_in


class PackedGradients:
    """What ``pack_gradients`` returns. As a context manager it ends with ``remove``.

    All gradients of one dtype and device lie in one buffer, which every backward pass overwrites: clone a gradient to
    keep it.
    """

    def __init__(self, optimizer: Any, mask: SaliencyMask | None) -> None:
        self._optimizer = weakref.ref(optimizer)
        # The optimizer has this packing's mask, and had another one before.
        self._own_mask, self._earlier_mask = mask, optimizer._mask
        self._hooks: dict[Tensor, Any] = {}
        self._mask: SaliencyMask | None = None
        self._buffers: list[Tensor] = []
        self._checked_group: dist.ProcessGroup | None = None
        # By parameter; another dictionary for each mask.
        self.gradients: dict[Tensor, _Gradient] = {}

    def __enter__(self) -> "PackedGradients":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @property
    def nbytes(self) -> int:
        """Bytes of all packed gradients."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def remove(self) -> None:
        """Ends the packing: present gradients become dense again. Calling it again does nothing."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}
        for gradient in self.gradients.values():
            if gradient.is_present():
                gradient.slot.owner.grad = like(gradient.packed.to_dense(), gradient.slot.owner)
        self._forget()
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._packing is self:
            optimizer._packing = None
            if self._own_mask is not None and optimizer._mask is self._own_mask:
                optimizer._mask = self._earlier_mask

    # ---- called by the optimizer

    def start(self) -> None:
        """Packs the present gradients and those of all later backward passes."""
        optimizer = self._require_optimizer()
        optimizer._packing = self
        try:
            if self._own_mask is not None:
                optimizer.set_mask(self._own_mask)
            self.add_hooks()
            if optimizer._mask is not None:
                self.use(optimizer._mask)
                self.take_all()
        except Exception:
            self.remove()
            raise

    def add_hooks(self) -> None:
        """Puts a hook on every parameter that has none."""
        itself = weakref.ref(self)

        def take(param: Tensor) -> None:
            packing = itself()
            if packing is not None:
                packing._take(param)

        owners = [slot.owner for slot in self._require_optimizer()._slots()]
        for param in owners:
            if param.requires_grad and param not in self._hooks:
                self._hooks[param] = param.register_post_accumulate_grad_hook(take)

    def use(self, mask: SaliencyMask) -> None:
        """Prepares for gradients packed by ``mask``. Raises ValueError if there are gradients packed by another one."""
        if mask is self._mask:
            return
        if self._mask is not None and _are_equal(self._mask, mask):
            self._mask = mask
            return
        if any(gradient.is_present() for gradient in self.gradients.values()):
            raise ValueError(
                "there are gradients packed by another mask: set a mask before the backward passes whose gradients it "
                "is for, and call zero_grad() before a new one"
            )
        self._prepare(mask)

    def take_all(self) -> None:
        """Packs gradients that no hook has seen, such as those set by the user."""
        self.add_hooks()
        for slot in self._require_optimizer()._slots():
            if slot.owner.grad is not None:
                self._pack(slot.owner)

    # ---- packing

    def _require_optimizer(self) -> Any:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this packing is gone")
        return optimizer

    def _take(self, param: Tensor) -> None:
        """The hook: without a mask, a gradient stays dense."""
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._mask is not None:
            self.use(optimizer._mask)
            self._pack(param)

    def _pack(self, param: Tensor) -> None:
        gradient = self.gradients.get(param)
        if gradient is None or gradient.slot.param.shape != local(param).shape:
            self._prepare(self._mask)
            gradient = self.gradients[param]
        if gradient.is_present():
            # Autograd accumulated into it in place.
            return
        grad = local(param.grad)
        if not isinstance(grad, PackedGradient):
            check_grad("the gradient", grad, gradient.slot)
        if grad.requires_grad:
            raise RuntimeError("packed gradients cannot be differentiated: call backward() without create_graph=True")
        with torch.no_grad():
            gradient.store(grad)

    def _forget(self) -> None:
        self.gradients, self._buffers, self._mask, self._checked_group = {}, [], None, None

    def _prepare(self, mask: SaliencyMask) -> None:
        """Makes the buffers for ``mask`` and keeps the present gradients."""
        slots = [s for s in self._require_optimizer()._slots() if s.owner.requires_grad or s.owner.grad is not None]
        binding = Binding.make(mask, slots)
        present = {param: gradient for param, gradient in self.gradients.items() if gradient.is_present()}
        self._forget()
        if (runtime := self._require_optimizer()._runtime) is not None:
            # It refers to the old buffers.
            runtime.roster.update_packed()
        self._mask = mask
        counts = {slot: binding.count(slot) for slot in slots}
        sizes: dict[tuple, int] = {}
        for slot in slots:
            kind = (slot.param.device, slot.param.dtype)
            sizes[kind] = sizes.get(kind, 0) + _padded(counts[slot])
        buffers = {kind: torch.zeros(size, device=kind[0], dtype=kind[1]) for kind, size in sizes.items()}
        self._buffers = list(buffers.values())
        for slot in slots:
            kind = (slot.param.device, slot.param.dtype)
            entries = buffers[kind][: counts[slot]]
            buffers[kind] = buffers[kind][_padded(counts[slot]) :]
            words = binding.tensor_words(slot)
            packed = PackedGradient(slot.param.detach(), entries, words)
            parts = _parts(slot, words) if slot.copied else None
            stand_in = like(packed, slot.owner)
            gradient = self.gradients[slot.owner] = _Gradient(slot, local(stand_in), stand_in, parts)
            if slot.owner in present:
                gradient.store(present[slot.owner].packed)

    # ---- several processes

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Averages the gradients over the processes of ``group``, in one call for each dtype.

        For data-parallel training of a module that is not wrapped in DistributedDataParallel, whose buckets are dense:
        call it after the last backward pass of a step, before clipping. A parameter that has no gradient in some of the
        processes counts as zero there.

        Parameters
        ----------
        group : ProcessGroup, optional
            The default group if it is None.

        Raises
        ------
        ValueError
            If the processes have different masks, or parameters are sharded.
        """
        gradients = list(self.gradients.values())
        if any(is_sharded(gradient.slot.owner) for gradient in gradients):
            raise ValueError("parameters are sharded: FSDP averages their gradients itself")
        world = dist.get_world_size(group)
        if world == 1:
            return
        self.check_same_mask(group)
        device = self._buffers[0].device if self._buffers else torch.device("cpu")
        present = torch.tensor([gradient.is_present() for gradient in gradients], dtype=torch.uint8)
        anywhere = present.to(device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group)
        for gradient, here in zip(gradients, present.tolist(), strict=True):
            if not here:
                gradient.packed.entries.zero_()
        for buffer in self._buffers:
            # Divide first, as DDP does: the sum of float16 gradients may overflow.
            buffer.mul_(1 / world)
            dist.all_reduce(buffer, dist.ReduceOp.SUM, group)
        for gradient, there in zip(gradients, anywhere.tolist(), strict=True):
            if there:
                gradient.slot.owner.grad = gradient.stand_in

    def register_comm_hook(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Lets a DistributedDataParallel module send the salient entries of its gradients only.

        The module's own buckets stay dense. For memory in proportion to the mask as well, leave the module unwrapped
        and use ``all_reduce``.
        """
        model.register_comm_hook((self, model.process_group), _reduce_packed)

    def check_same_mask(self, group: dist.ProcessGroup | None = None) -> None:
        """Raises ValueError if the processes of ``group`` pack by different masks. Communicates once a mask."""
        checked = group if group is not None else dist.group.WORLD
        if self._checked_group is checked:
            return
        digest = bytes(8)
        if self._mask is not None:
            digest = hashlib.sha256(self._mask.words.cpu().numpy().tobytes()).digest()
        device = self._buffers[0].device if self._buffers else torch.device("cpu")
        number = int.from_bytes(digest[:7], "little")
        extremes = torch.tensor([number, -number], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
        largest, smallest = extremes.tolist()
        if largest != -smallest:
            raise ValueError("the processes pack their gradients by different masks, expected the same in all of them")
        self._checked_group = checked


def _are_equal(mask: SaliencyMask, other: SaliencyMask) -> bool:
    """Whether two masks are equal for every parameter."""
    if (mask.shapes, mask.names, mask.device) != (other.shapes, other.names, other.device):
        return False
    # Without names, the parameters that a mask was made from decide which of its tensors is whose.
    by_order = mask._params is None and other._params is None
    return (mask.names is not None or by_order) and mask.equal(other)


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _parts(slot: Slot, words: Tensor) -> list[tuple[int, int, int]] | None:
    """Rows of a parameter that begin at a whole word of its mask, and the salient entries among them."""
    if slot.param.dim() == 0 or slot.param.numel() == 0:
        return None
    rows, row = slot.param.shape[0], slot.param[0].numel()
    unit = ops.WORD_BITS // math.gcd(ops.WORD_BITS, row)
    step = -(-max(1, rows // _PARTS) // unit) * unit
    bounds = [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    numels = [(end - begin) * row for begin, end in bounds]
    blocks = ops.block_counts(words, [begin * row // ops.WORD_BITS for begin, _ in bounds], numels).tolist()
    counts, first = [], 0
    for numel in numels:
        counts.append(sum(blocks[first : first + ops.num_blocks(numel)]))
        first += ops.num_blocks(numel)
    return [(begin, end, count) for (begin, end), count in zip(bounds, counts, strict=True)]


def _reduce_packed(state: tuple[PackedGradients, dist.ProcessGroup], bucket):
    """The hook of ``PackedGradients.register_comm_hook``."""
    packing, group = state
    params, views = bucket.parameters(), bucket.gradients()
    gradients = [packing.gradients.get(param) for param in params]
    if None in gradients:
        # There is no mask yet, or the packing was removed.
        return allreduce_hook(group, bucket)
    packing.check_same_mask(group)
    entries = torch.cat([gradient.packed.pack(view) for gradient, view in zip(gradients, views, strict=True)])
    entries.div_(dist.get_world_size(group))

    def spread(future: torch.futures.Future) -> Tensor:
        parts = future.value()[0].split([gradient.packed.entries.numel() for gradient in gradients])
        for gradient, view, part in zip(gradients, views, parts, strict=True):
            view.copy_(gradient.packed.with_entries(part).to_dense())
        return bucket.buffer()

    return dist.all_reduce(entries, group=group, async_op=True).get_future().then(spread)


def pack_gradients(optimizer: Optimizer, mask: SaliencyMask | None = None) -> PackedGradients:
    """Packs each gradient as soon as a backward pass has made it: memory in proportion to the mask.

    Afterwards a parameter's ``.grad`` is a ``PackedGradient``: it stores the salient entries and counts as zero
    elsewhere. Accumulation over several backward passes, ``torch.nn.utils.clip_grad_norm_`` (fastest with
    ``foreach=True``; the norm is that of the salient entries), ``clip_grad_value_``, GradScaler, ``zero_grad`` and
    ``optimizer.step`` work on it. A backward pass holds one dense gradient at a time.

    Parameters
    ----------
    optimizer : MaskedAdam
        With ``packed=True``.
    mask : SaliencyMask, optional
        What the gradients are packed by, set with ``optimizer.set_mask``. None: the mask that was or will be set so;
        until there is one, gradients stay dense.

    Returns
    -------
    PackedGradients
        Its ``remove()`` ends the packing, as does leaving it as a context manager.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If the optimizer is no MaskedAdam with ``packed=True``, the mask does not fit its parameters, or its gradients
        are packed already.

    Notes
    -----
    A new mask (``optimizer.set_mask``) holds from the next backward pass on. It may not be set while there are
    gradients packed by the old one: call ``zero_grad()`` first. inf and NaN outside the mask are dropped, so they
    neither skip a step of GradScaler nor count for the non-finite policy.

    Examples
    --------
    >>> optimizer = pf.MaskedAdam(model.named_parameters(), packed=True, betas=(0.0, 0.999))
    >>> with pf.pack_gradients(optimizer, mask):
    ...     for batch in batches:
    ...         loss(model, batch).backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    """
    if "packed" not in getattr(optimizer, "defaults", ()):
        raise TypeError(f"optimizer is {type(optimizer).__name__}, expected a MaskedAdam")
    if not optimizer.defaults["packed"]:
        raise ValueError("the optimizer's state is dense, expected MaskedAdam(..., packed=True)")
    if getattr(optimizer, "_packing", None) is not None:
        raise RuntimeError("the optimizer's gradients are packed already: call remove() of that packing first")
    packing = PackedGradients(optimizer, mask)
    packing.start()
    return packing
