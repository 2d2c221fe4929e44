"""How much memory score forgetting on Stable Diffusion takes, before a run is begun.

One iteration of the method is run on fake tensors, which have shapes and no entries: what lives at the same time is
counted. What optimizers keep is measured on a small parameter and scaled up. Nothing is computed, no weights are read.
"""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..diffusion import NoiseSchedule, PromptTable, TextConditioned
from ..optim import MaskedAdam
from ..parallel import World
from ..profiling import AllocationCounter
from ..saliency import saliency_mask
from ..unlearning import PromptRequest, Setting, method_class
from ..unlearning.sharded import sharded_blocks

# Stable Diffusion 1.5's, where no folder says another one.
SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TOKENS = 77
# Entries of the parameter that an optimizer's state is measured on.
MEASURED = 1 << 14


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors.

    Parameters
    ----------
    parameters: of the U-Net (a count).
    weights: of teacher, score network and generator together.
    optimizers: moments, averages, master weights and step counts.
    masks: the present one, the one before, all that were ever salient.
    moments: part of an iteration to the most that its gradients and activations take beside all of that.
    model: whose architecture was taken.
    processes: that share the batches out, and with FSDP2 the trained networks; bytes are of one of them.
    """

    parameters: int
    weights: int
    optimizers: int
    masks: int
    moments: dict[str, int]
    model: str
    processes: int = 1

    @property
    def resident(self) -> int:
        """Bytes that are there all the time."""
        return self.weights + self.optimizers + self.masks

    @property
    def peak(self) -> int:
        """The most bytes at a time."""
        return self.resident + max(self.moments.values())


class _Still:
    """In an optimizer's place: tells how much lived until its step, and drops the gradients."""

    def __init__(self, network: nn.Module, at_step) -> None:
        self.param_groups: list[dict[str, Any]] = [{}]
        self.network, self.at_step = network, at_step

    def step(self, **_) -> None:
        self.at_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.network.parameters():
            param.grad = None


class _StillMasker:
    """In the masker's place: takes the saliency gradient and makes no mask of it."""

    mask = None

    def __init__(self, masker, at_start, at_end) -> None:
        self.masker, self.at_start, self.at_end = masker, at_start, at_end

    def refresh(self, iteration: int, generator: nn.Module) -> None:
        from ..unlearning.streams import Streams

        self.at_start()
        self.masker.scores(Streams(self.masker.setting.device, "estimate", iteration), generator)
        self.at_end()


@dataclass(frozen=True, eq=False, kw_only=True)
class _FakeSetting(Setting):
    """A setting whose networks are made where they are needed: fake parameters cannot be cast in place."""

    def place(self, network: nn.Module) -> nn.Module:
        return network

    def lower_teacher(self) -> None:
        return

    def trainable(self, network: nn.Module) -> nn.Module:
        size = network.config["sample_size"]
        made = _network(network.unet.config, self.weights_dtype, network.table, network.schedule, size)
        self._checkpoint_gradients(made)
        return made.requires_grad_(True)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _network(config, dtype: torch.dtype, table: PromptTable, schedule: NoiseSchedule, size: int) -> TextConditioned:
    from diffusers import UNet2DConditionModel

    with _default_dtype(dtype):
        unet = UNet2DConditionModel.from_config(config)
    return TextConditioned(unet, table, schedule, sample_size=size)


def _state_bytes(defaults: dict[str, Any], dtype: torch.dtype, kind: str, density: float = 0.5) -> float:
    """Bytes of an optimizer's state for each entry of a parameter, after steps of a kind: "plain", "joint", "masked" or
    "alternate"; packed state, which has one mask, at its density."""
    param = nn.Parameter(torch.zeros(MEASURED, dtype=dtype))
    optimizer = MaskedAdam([param], **copy.deepcopy(defaults))
    param.grad = torch.rand_like(param)
    scores = [torch.rand(MEASURED) for _ in range(1 if defaults["packed"] else 2)]
    for score in (*scores, *scores):
        mask = None if kind == "plain" else saliency_mask([score], density=density)
        if kind == "joint":
            optimizer.step(mask=mask, masked_grads=[torch.rand_like(param)])
            continue
        optimizer.step(mask=mask)
        if kind == "alternate":
            optimizer.step()
    return sum(t.nbytes for t in optimizer.state[param].values() if isinstance(t, torch.Tensor) and t.ndim) / MEASURED


def estimate_memory(
    config,
    size: int,
    schedule: NoiseSchedule,
    request: PromptRequest,
    method_name: str,
    options: Any,
    memory: dict[str, Any],
    mixed_precision: str,
    low: bool,
    model: str,
    processes: int = 1,
) -> MemoryEstimate:
    """The estimate for a run.

    Parameters
    ----------
    config: of the U-Net, as diffusers has it. size: height and width of latents. schedule: the model's.
    request, method_name, options: of the run.
    memory: dtypes and the like, as ``Setting`` takes them.
    mixed_precision: "no" or "bf16". low: whether text embeddings are kept in bfloat16.
    model: a name for messages.
    processes: of the run; ``memory["fsdp"]`` says whether they share out the trained networks.

    Raises ValueError for a method that is no score forgetting, for options that cannot be estimated, and for batches
    that the processes cannot share out.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if memory["score_lora_rank"]:
        raise ValueError("the memory of a run with score_lora_rank cannot be estimated: adapters have no fake tensors")
    if "score_guidance_scale" not in {item.name for item in dataclasses.fields(options)}:
        raise ValueError(f"the memory of method {method_name!r} cannot be estimated: it is no score forgetting")
    shards = processes if memory.get("fsdp") else 1
    memory = {**memory, "fsdp": False}
    # Two micro-batches are enough: more do not add to what lives at a time.
    few = {"gradient_accumulation_steps": min(2, options.gradient_accumulation_steps)}
    if hasattr(options, "saliency_batches"):
        few["saliency_batches"] = min(2, options.saliency_batches)
    for name in ("train_batch_size", "forget_batch_size", "saliency_batch_size"):
        count = getattr(options, name, None)
        if count is not None:
            World(size=processes).check_shares(name, count)
            few[name] = count // processes
    moments: dict[str, int] = {}
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), AllocationCounter() as counter:
        dtype = torch.bfloat16 if low else torch.float32
        width = config["cross_attention_dim"]
        table = PromptTable(torch.empty(len(request.prompts), TOKENS, width, dtype=dtype))
        teacher = _network(config, memory["teacher_dtype"] or torch.float32, table, schedule, size)
        setting = _FakeSetting(
            teacher=teacher, schedule=schedule, request=request, mixed_precision=mixed_precision, **memory
        )
        method = method_class(method_name)(setting, dataclasses.replace(options, **few))
        phase = method.phases[-1]
        low_precision = mixed_precision == "bf16" or setting.weights_dtype != torch.float32
        together = 0 if shards == 1 else _together(teacher, 2 if low_precision else 4)
        for network in (phase.score, phase.generator):
            _share_out(network, shards, counter)
        if phase.masker is not None:
            phase.masker.start(phase.generator)
        score, generator = phase.score_optimizer.defaults, phase.generator_optimizer.defaults
        kind = _kind_of_step(phase)

        def note(name: str) -> None:
            moments[name] = max(moments.get(name, 0), counter.reset() - weights + together)

        phase.score_optimizer = _Still(phase.score, lambda: note("score network's step"))
        phase.generator_optimizer = _Still(phase.generator, lambda: note("generator's step"))
        if phase.masker is not None:
            phase.masker = _StillMasker(phase.masker, counter.reset, lambda: note("saliency gradient"))
        weights = counter.current
        counter.reset()
        phase.step(0)
        sizes = [
            sum(p.numel() for p in network.parameters() if p.requires_grad)
            for network in (phase.score, phase.generator)
        ]
        parameters = sum(p.numel() for p in teacher.parameters())
    states = sizes[0] * _state_bytes(score, setting.weights_dtype, "plain")
    density = getattr(options, "density", None) or 1.0
    states += sizes[1] * _state_bytes(generator, setting.weights_dtype, kind, density)
    masks = 0 if kind == "plain" else 3 * sizes[1] // 8
    return MemoryEstimate(parameters, weights, round(states / shards), masks // shards, moments, model, processes)


def _together(network: nn.Module, itemsize: int) -> int:
    """Bytes that FSDP2 takes beside the parts, of a network that computes in entries of ``itemsize`` bytes. Of the
    largest block each: weights of the one that computes, those of the next one as they arrive and laid out, gradients
    as they are computed; and in float32 what two blocks send."""
    entries = max(sum(p.numel() for p in block.parameters()) for block in sharded_blocks(network)[:-1])
    return entries * (4 * itemsize + 2 * 4)


def _share_out(network: nn.Module, shards: int, counter: AllocationCounter) -> None:
    """From here on the network's weights, and each gradient once it is complete, count as one of ``shards`` parts."""
    if shards == 1:
        return

    def part(tensor: torch.Tensor) -> int:
        return -(-tensor.nbytes // shards)

    for param in network.parameters():
        counter.count_as(param, part(param))
        param.register_post_accumulate_grad_hook(lambda param: counter.count_as(param.grad, part(param)))


def _kind_of_step(phase) -> str:
    if phase.masker is None:
        return "plain"
    if phase.update == "alternate":
        return "masked" if phase.mask_scope == "all" else "alternate"
    return "joint" if phase.mask_scope == "forget" else "masked"


def describe_memory(found: MemoryEstimate) -> str:
    """The estimate as a table, in GiB."""
    lines = [f"memory of {found.model}, {found.parameters / 1e6:.1f} million parameters, GiB of tensors"]
    if found.processes > 1:
        lines[0] += f" in each of {found.processes} processes"
    rows = [("weights of three networks", found.weights), ("optimizers", found.optimizers), ("masks", found.masks)]
    rows += [(f"{name}: gradients, activations", size) for name, size in found.moments.items()]
    rows.append(("most at a time", found.peak))
    lines += [f"  {name:46}{size / 2**30:9.2f}" for name, size in rows]
    lines.append(
        "Counted on fake tensors with the CPU's rules of autocast; the CUDA context, workspaces of cuDNN and "
        "fragmentation come on top."
    )
    return "\n".join(lines)
