"""The processes of one run, as started by ``torchrun``: shares of a batch, averaged gradients, joint decisions.

Every process draws the random numbers of the whole batch and computes its own rows, so a run gives the same numbers on
one process and on many, up to rounding. Gradients are averaged here rather than by DistributedDataParallel, whose hooks
see ``.grad`` only: a step of masked forgetting has a second gradient of the same weights, from ``autograd.grad``.
"""

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes of gradients per all-reduce: few calls, and the copies stay small beside the gradients.
BUCKET_BYTES = 64 << 20
DEFAULT_TIMEOUT = 1800


class ProcessLostError(RuntimeError):
    """Another process of the run ended, failed or does not answer."""


def _lost(error: RuntimeError) -> ProcessLostError:
    return ProcessLostError(
        "another process of this run ended or did not answer in time (ddp_timeout): read its output, "
        f"then resume with --resume_from_checkpoint latest ({str(error).splitlines()[0]})"
    )


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error


@dataclass(frozen=True, eq=False)
class World:
    """The processes that compute a run together. The default is a single process, for which all methods are no-ops.

    Parameters
    ----------
    rank, size : int
        Rank of this process and number of processes.
    group : ProcessGroup, optional
        Group for tensors on the device.
    control : ProcessGroup, optional
        Group for decisions on the CPU, which never wait for a GPU.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns errors of collectives called elsewhere, such as FSDP's, into ProcessLostError if a process was lost."""
        try:
            yield
        except ProcessLostError:
            raise
        except RuntimeError as error:
            # gloo has no exception type of its own.
            if self.size > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
                raise _lost(error) from error
            raise

    def check_shares(self, name: str, count: int) -> None:
        """Raises ValueError unless ``count`` divides equally: otherwise the mean of per-process means is wrong."""
        if count % self.size:
            raise ValueError(f"{name} is {count}, expected a multiple of {self.size}, the number of processes")

    def share(self, count: int, start: int = 0) -> slice:
        """This process's rows of ``count`` rows that begin at ``start``."""
        part = count // self.size
        return slice(start + self.rank * part, start + (self.rank + 1) * part)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, bit-identical on all of them.

        All tensors have one dtype and device. Does not wait for the device. Raises ProcessLostError.
        """
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
                # Flattened and copied back in row-major order, whatever the strides.
                torch._foreach_copy_(bucket, [part.view(item.shape) for part, item in zip(parts, bucket, strict=True)])
                bucket, size = [], 0

    def largest(self, value: int) -> int:
        """The largest value over the processes. Raises ProcessLostError."""
        if self.size == 1:
            return value
        result = torch.tensor(value)
        with _collective():
            dist.all_reduce(result, dist.ReduceOp.MAX, group=self.control)
        return int(result)

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Sums of the counts over the processes. Raises ProcessLostError."""
        if self.size == 1 or not counts:
            return list(counts)
        sums = torch.tensor(counts)
        with _collective():
            dist.all_reduce(sums, group=self.control)
        return sums.tolist()

    def total(self, value: float | None) -> float | None:
        """Sum of the values over the processes, None if any process has none. Raises ProcessLostError."""
        if self.size == 1:
            return value
        sums = torch.tensor([0.0 if value is None else value, float(value is None)], dtype=torch.float64)
        with _collective():
            dist.all_reduce(sums, group=self.control)
        return None if sums[1] else float(sums[0])

    def on_main(self, work: Callable[[], object]) -> None:
        """Calls ``work`` on the main process while the others wait.

        If it fails, the main process raises the error and the others raise ProcessLostError with its message.
        """
        if self.size == 1:
            work()
            return
        message: list[str | None] = [None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                work()
            except Exception as error:
                failure, message = error, [f"{type(error).__name__}: {error}"]
        with _collective():
            dist.broadcast_object_list(message, src=0, group=self.control)
        if failure is not None:
            raise failure
        if message[0] is not None:
            raise ProcessLostError(f"the main process failed: {message[0]}")


def process_count() -> int:
    """Number of processes that ``torchrun`` started for the run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Rank of this process; 0 is the main process."""
    return int(os.environ.get("RANK", "0"))


def started_by_torchrun() -> bool:
    """Whether this is one of several processes of a run."""
    return process_count() > 1


def local_rank() -> int:
    """Rank of this process on its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def command_words() -> list[str]:
    """The words that start the command line, for messages that tell the user to run it again."""
    if not started_by_torchrun():
        return ["pecker-fast"]
    count = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return ["torchrun", "--nproc_per_node", count, "-m", "pecker_fast"]


@contextmanager
def world(device: torch.device, timeout_seconds: int = DEFAULT_TIMEOUT) -> Iterator[World]:
    """Context with the processes of the run: those that ``torchrun`` started, or this one alone.

    Parameters
    ----------
    device : torch.device
        Device of the gradients: NCCL connects GPUs, gloo CPUs.
    timeout_seconds : int
        Time after which a process that does not answer counts as lost. Must exceed an evaluation of the main process.
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
