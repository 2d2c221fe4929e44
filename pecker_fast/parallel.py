"""The processes of one run, as ``torchrun`` starts them: shares of a batch, averaged gradients, common decisions.

Every process draws the numbers of the whole batch and computes with its rows, so a run has the same numbers on one
process and on many, up to rounding. Gradients are averaged here and not by DistributedDataParallel, whose hooks see
``.grad`` alone: a step of masked forgetting has a second gradient of the same weights, which ``autograd.grad`` returns.
"""

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes of gradients that travel together: few calls, and copies of them stay small beside the gradients.
BUCKET_BYTES = 64 << 20
DEFAULT_TIMEOUT = 1800


class ProcessLostError(RuntimeError):
    """Another process of the run ended, failed or does not answer."""


def _lost(error: RuntimeError) -> ProcessLostError:
    return ProcessLostError(
        "another process of this run ended or did not answer in time (ddp_timeout): see what it said, "
        f"then go on with --resume_from_checkpoint latest ({str(error).splitlines()[0]})"
    )


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error


@dataclass(frozen=True, eq=False)
class World:
    """The processes that compute a run together; by itself one process, for which everything here does nothing.

    Parameters
    ----------
    rank, size: this process and how many there are.
    group: for tensors on the device.
    control: for decisions, on the CPU: they never wait for a GPU.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What collectives that are not called here, such as FSDP's, raise within for a lost process is a
        ProcessLostError."""
        try:
            yield
        except ProcessLostError:
            raise
        except RuntimeError as error:
            # gloo has no type of its own.
            if self.size > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
                raise _lost(error) from error
            raise

    def check_shares(self, name: str, count: int) -> None:
        """Raises ValueError unless ``count`` samples can be shared out equally: else means of means were wrong."""
        if count % self.size:
            raise ValueError(f"{name} is {count}, expected a multiple of {self.size}, the number of processes")

    def share(self, count: int, start: int = 0) -> slice:
        """This process's rows of ``count``, which begin at ``start``."""
        part = count // self.size
        return slice(start + self.rank * part, start + (self.rank + 1) * part)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, which is the same bits on all of them. All of one dtype
        and device. Does not wait for the device. Raises ProcessLostError."""
        if self.size == 1 or not tensors:
            return
        bucket: list[Tensor] = []
        size = 0
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= BUCKET_BYTES or i == len(tensors) - 1:
                flat = torch.cat([item.reshape(-1) for item in bucket])
                with _collective():
                    dist.all_reduce(flat, group=self.group)
                flat /= self.size
                parts = flat.split([item.numel() for item in bucket])
                # Row-major on the way there and back, whatever the strides.
                torch._foreach_copy_(bucket, [part.view(item.shape) for part, item in zip(parts, bucket, strict=True)])
                bucket, size = [], 0

    def largest(self, value: int) -> int:
        """The largest of the processes' values. Raises ProcessLostError."""
        if self.size == 1:
            return value
        held = torch.tensor(value)
        with _collective():
            dist.all_reduce(held, dist.ReduceOp.MAX, group=self.control)
        return int(held)

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Sums of the processes' counts. Raises ProcessLostError."""
        if self.size == 1 or not counts:
            return list(counts)
        held = torch.tensor(counts)
        with _collective():
            dist.all_reduce(held, group=self.control)
        return held.tolist()

    def total(self, value: float | None) -> float | None:
        """Sum of the processes' values, None where one has none. Raises ProcessLostError."""
        if self.size == 1:
            return value
        held = torch.tensor([0.0 if value is None else value, float(value is None)], dtype=torch.float64)
        with _collective():
            dist.all_reduce(held, group=self.control)
        return None if held[1] else float(held[0])

    def on_main(self, work: Callable[[], object]) -> None:
        """Does ``work`` on the main process while the others wait. Where it fails, all raise: it the error itself,
        the others ProcessLostError with what it said."""
        if self.size == 1:
            work()
            return
        said: list[str | None] = [None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                work()
            except Exception as error:
                failure, said = error, [f"{type(error).__name__}: {error}"]
        with _collective():
            dist.broadcast_object_list(said, src=0, group=self.control)
        if failure is not None:
            raise failure
        if said[0] is not None:
            raise ProcessLostError(f"the main process failed: {said[0]}")


def process_count() -> int:
    """How many processes ``torchrun`` started for the run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Which of them this one is; 0 is the main one."""
    return int(os.environ.get("RANK", "0"))


def started_by_torchrun() -> bool:
    """Whether this is one of several processes of a run."""
    return process_count() > 1


def local_rank() -> int:
    """Number of this process on its machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def command_words() -> list[str]:
    """How the command line was started, for messages that tell a user to start it again."""
    if not started_by_torchrun():
        return ["pecker-fast"]
    count = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return ["torchrun", "--nproc_per_node", count, "-m", "pecker_fast"]


@contextmanager
def world(device: torch.device, timeout_seconds: int = DEFAULT_TIMEOUT) -> Iterator[World]:
    """The processes of the run: those that ``torchrun`` started, or this one alone.

    Parameters
    ----------
    device: where gradients are: NCCL connects GPUs, gloo CPUs.
    timeout_seconds: after which a process that does not answer is given up; an evaluation of the main process must
        fit in.
    """
    if not started_by_torchrun():
        yield World()
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        yield World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, control)
    finally:
        dist.destroy_process_group()
