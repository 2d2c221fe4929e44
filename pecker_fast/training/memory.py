"""Estimate of the memory that a method takes on Stable Diffusion, before a run begins.

One iteration runs on fake tensors, which have shapes and no entries: what is alive at the same time is counted. An
optimizer's state is measured on a small parameter and scaled up. Nothing is computed, no weights are read. What an
iteration consists of is the method's to say (``Method.memory_plan``).
"""

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import Conditioning, Parametrisation, PromptTable, TextConditioned
from ..diffusion.architectures import ARCHITECTURES, UNET
from ..diffusion.conditioning import POOLED, TIME_IDS
from ..diffusion.text import SIZES, pooled_width
from ..optim import MaskedAdam
from ..profiling import AllocationCounter, peak_memory_bytes
from ..saliency import saliency_mask
from ..unlearning import Compute, Method, Placement, Problem, PromptRequest, Setting, TrainedNetwork
from ..unlearning.sharded import sharded_blocks

# Stable Diffusion 1.5's U-Net: the default architecture.
SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# Stable Diffusion XL's.
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Entries of the parameter on which an optimizer's state is measured.
MEASURED = 1 << 14


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors.

    Parameters
    ----------
    parameters : int
        Number of parameters of the U-Net.
    weights : int
        Bytes of the weights of teacher, score network and generator together.
    optimizers : int
        Bytes of moments, averages, master weights and step counts.
    masks : int
        Bytes of all masks that are kept.
    packed : int
        Bytes of packed gradients, and of entries of networks that share weights.
    moments : dict of str to int
        For each part of an iteration, the largest number of bytes that its gradients and activations take beside all of
        that.
    absent : dict of str to int
        For parts of the first iteration alone, the bytes of optimizers, masks and packed entries that do not exist yet.
    model : str
        Name of the model whose architecture was taken.
    processes : int
        Processes that share the batches and, with FSDP2, the trained networks. Bytes are those of one process.
    """

    parameters: int
    weights: int
    optimizers: int
    masks: int
    packed: int
    moments: dict[str, int]
    absent: dict[str, int]
    model: str
    processes: int = 1

    @property
    def resident(self) -> int:
        """Bytes that are taken throughout, from the end of the first iteration on."""
        return self.weights + self.optimizers + self.masks + self.packed

    @property
    def peak(self) -> int:
        """The most bytes at a time."""
        return max(self.peaks.values())

    @property
    def peaks(self) -> dict[str, int]:
        """The most bytes at a time in each part of an iteration."""
        return {name: self.resident - self.absent.get(name, 0) + size for name, size in self.moments.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class _FakeCompute(Compute):
    """Places nothing: fake parameters cannot be moved in place."""

    def place(self, network: nn.Module) -> nn.Module:
        return network


@dataclass(frozen=True, eq=False)
class _FakeSetting(Setting):
    """Builds networks in their dtype: fake parameters cannot be cast in place.

    ``others``: of "score" and "generator", those that start from other weights than the teacher's.
    """

    others: Collection[str] = ()

    def starts_as_teacher(self, name: str, network: nn.Module | None) -> bool:
        return name not in self.others

    def lower_teacher(self) -> None:
        return

    def trainable(self, network: nn.Module) -> nn.Module:
        size, dtype = network.config["sample_size"], self.placement.weights_dtype
        config = {"_class_name": type(network.unet).__name__, **network.unet.config}
        result = _network(config, dtype, network.table, network.schedule, size)
        self._checkpoint_gradients(result)
        return result.requires_grad_(True)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _network(
    config: Mapping[str, Any], dtype: torch.dtype, table: PromptTable, schedule: Parametrisation, size: int
) -> TextConditioned:
    import diffusers

    with _default_dtype(dtype):
        unet = getattr(diffusers, config.get("_class_name", UNET)).from_config(config)
    return TextConditioned(unet, table, schedule, sample_size=size)


def empty_conditioning(unet: Mapping[str, Any], prompts: int, dtype: torch.dtype) -> Conditioning:
    """Tensors with the shapes of what the U-Net with this configuration is told about prompts."""
    architecture = ARCHITECTURES[unet.get("_class_name", UNET)]
    tokens = architecture.tokens
    conditioning = Conditioning.of(torch.empty(prompts, tokens, unet[architecture.width], dtype=dtype))
    shapes = architecture.shapes(unet, tokens)
    conditioning |= {name: torch.empty(prompts, *shape, dtype=dtype) for name, shape in shapes.items()}
    if unet.get("addition_embed_type") is None:
        return conditioning
    pooled = torch.empty(prompts, pooled_width(unet), dtype=dtype)
    return conditioning | {POOLED: pooled, TIME_IDS: torch.empty(prompts, SIZES, dtype=torch.int64)}


def _state_bytes(trained: TrainedNetwork, dtype: torch.dtype) -> float:
    """Bytes of an optimizer's state for each entry of a parameter, once it has taken steps."""
    options = trained.optimizer.defaults
    param = nn.Parameter(torch.zeros(MEASURED, dtype=dtype))
    optimizer = MaskedAdam([param], **copy.deepcopy(options))
    param.grad = torch.rand_like(param)
    # Packed state has one mask.
    scores = [torch.rand(MEASURED) for _ in range(1 if options["packed"] else 2)]
    for score in (*scores, *scores):
        mask = None if trained.step == "plain" else saliency_mask([score], density=trained.density)
        if trained.step == "joint":
            optimizer.step(mask=mask, masked_grads=[torch.rand_like(param)])
            continue
        optimizer.step(mask=mask)
        if trained.step == "alternate":
            optimizer.step()
    return _tensor_bytes(optimizer) / MEASURED


def _tensor_bytes(optimizer: MaskedAdam) -> int:
    """Bytes of an optimizer's state for each entry, without step counts."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.ndim)


def estimate_memory(
    method: type[Method],
    options: Any,
    *,
    unet: Mapping[str, Any],
    latent_size: int,
    schedule: Parametrisation,
    request: PromptRequest,
    placement: Placement,
    mixed_precision: str,
    low_embeddings: bool,
    model: str,
    processes: int = 1,
    others: Collection[str] = (),
) -> MemoryEstimate:
    """Estimate the memory of a run.

    Parameters
    ----------
    method : type
        Class of the method.
    options : object
        The method's options.
    unet : mapping
        Configuration of the U-Net, as diffusers has it.
    latent_size : int
        Height and width of latents.
    schedule : Parametrisation
        The model's schedule.
    request : PromptRequest
        What to forget.
    placement : Placement
        How networks are kept in memory; with ``fsdp`` the processes share the trained networks.
    mixed_precision : {"no", "bf16"}
        Precision in which networks are called.
    low_embeddings : bool
        Whether text embeddings are kept in bfloat16.
    model : str
        Name of the model for messages.
    processes : int
        Processes of the run.
    others : collection of str
        Of "score" and "generator", those that start from other weights than the teacher's.

    Returns
    -------
    MemoryEstimate
        Of one process.

    Raises
    ------
    ValueError
        If the method or the placement cannot be estimated, or the processes cannot share the batches equally.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if placement.score_lora_rank:
        raise ValueError("the memory of a run with score_lora_rank cannot be estimated: adapters have no fake tensors")
    shards = processes if placement.fsdp else 1
    options = method.rehearsal_options(options, processes)
    moments: dict[str, int] = {}
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(allow_non_fake_inputs=True),
        AllocationCounter() as counter,
    ):
        # The optimizers compare addresses, which these tensors do not have.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        dtype = torch.bfloat16 if low_embeddings else torch.float32
        table = PromptTable(empty_conditioning(unet, len(request.prompts), dtype))
        teacher = _network(unet, placement.teacher_dtype or torch.float32, table, schedule, latent_size)
        setting = _FakeSetting(
            Problem(teacher, schedule, request),
            _FakeCompute(mixed_precision=mixed_precision),
            replace(placement, fsdp=False),
            others,
        )
        instance = method(setting, options)
        low_precision = mixed_precision == "bf16" or placement.weights_dtype != torch.float32
        gathered = 0 if shards == 1 else _gathered(teacher, 2 if low_precision else 4)
        instance.phases[-1].start(None)
        plan = instance.memory_plan()
        for trained in plan.networks:
            _share_out(trained.network, shards, counter)

        def note(name: str | None) -> None:
            peak = counter.reset()
            if name is not None:
                moments[name] = max(moments.get(name, 0), peak - start + gathered)

        start = counter.current
        # Averages exist already; they are counted with the rest of the optimizers' state.
        weights = start - sum(_tensor_bytes(trained.optimizer) for trained in plan.networks)
        counter.reset()
        plan.rehearse(note)
        entries = [sum(p.numel() for p in t.network.parameters() if p.requires_grad) for t in plan.networks]
        parameters = sum(p.numel() for p in teacher.parameters())
    dtype, trained = placement.weights_dtype, list(zip(entries, plan.networks, strict=True))
    states = [count * _state_bytes(t, dtype) / shards for count, t in trained]
    masks = [t.masks * count // 8 // shards for count, t in trained]
    packed = [round(t.packed * t.density * count * dtype.itemsize) for count, t in trained]
    absent = {
        name: round(sum(states[first:])) + sum(masks[first:]) + sum(packed[first:])
        for name, first in plan.first_parts.items()
    }
    return MemoryEstimate(
        parameters, weights, round(sum(states)), sum(masks), sum(packed), moments, absent, model, processes
    )


def _gathered(network: nn.Module, itemsize: int) -> int:
    """Bytes that FSDP2 takes beside the parts, of a network that computes in entries of ``itemsize`` bytes.

    Of the largest block each: weights of the block that computes, weights of the next one as they arrive and laid out,
    gradients as they are computed; and in float32 what two blocks send.
    """
    entries = max(sum(p.numel() for p in block.parameters()) for block in sharded_blocks(network)[:-1])
    return entries * (4 * itemsize + 2 * 4)


def _share_out(network: nn.Module, shards: int, counter: AllocationCounter) -> None:
    """From here on the network's weights, and each gradient once it is complete, count as one of ``shards`` parts."""
    if shards == 1:
        return

    def part(tensor: Tensor) -> int:
        return -(-tensor.nbytes // shards)

    for param in network.parameters():
        counter.count_as(param, part(param))
        param.register_post_accumulate_grad_hook(lambda param: counter.count_as(param.grad, part(param)))


def describe_memory(estimate: MemoryEstimate) -> str:
    """The estimate as a table, in GiB."""
    lines = [f"memory of {estimate.model}, {estimate.parameters / 1e6:.1f} million parameters, GiB of tensors"]
    if estimate.processes > 1:
        lines[0] += f" in each of {estimate.processes} processes"
    rows = [("weights of three networks", estimate.weights), ("optimizers", estimate.optimizers)]
    rows.append(("masks", estimate.masks))
    if estimate.packed:
        rows.append(("packed gradients and entries", estimate.packed))
    for name, size in estimate.moments.items():
        rows.append((f"{name}: gradients, activations", size))
        if name in estimate.absent:
            rows.append(("  once, before these of the above exist", -estimate.absent[name]))
    rows.append(("most at a time", estimate.peak))
    lines += [f"  {name:60}{size / 2**30:9.2f}" for name, size in rows]
    lines.append(
        "Counted on fake tensors with the CPU's autocast rules; the CUDA context, cuDNN's workspaces and fragmentation "
        f"come on top, on a CPU the process itself, such as this one's {peak_memory_bytes('cpu') / 2**30:.2f} GiB."
    )
    return "\n".join(lines)
