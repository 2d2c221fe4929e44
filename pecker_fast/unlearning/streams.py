"""Random numbers by place in the run, not by history: a draw never depends on earlier draws."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

SEEDS = 2**31


def derived_seed(*place: int | str) -> int:
    """A seed in [0, 2^31) from numbers and names; the same on every machine."""
    text = "/".join(map(str, place)).encode()
    return (zlib.crc32(text) << 16 ^ zlib.crc32(b"pecker" + text)) % SEEDS


class Streams:
    """The random numbers of one iteration, one stream for each purpose.

    Methods compared on one seed draw the same labels, noise and timesteps whatever else they draw: saliency has a
    stream of its own.

    Parameters
    ----------
    device : torch.device
        Where the numbers are drawn.
    *place : int or str
        Seed, phase, iteration, micro-batch.
    """

    def __init__(self, device: torch.device | str, *place: int | str) -> None:
        self.device = device
        self.place = place

    def generator(self, name: str) -> torch.Generator:
        """The generator of the stream ``name``, on the device and at its start: one name, one draw."""
        return torch.Generator(self.device).manual_seed(derived_seed(*self.place, name))

    def dropout_seed(self, name: str, rank: int = 0) -> int:
        """Seed of torch's default generators, which dropout draws from: another one on each process."""
        return derived_seed(*self.place, name, *((rank,) if rank else ()))

    def seed_dropout(self, name: str, rank: int = 0) -> None:
        """Seed torch's default generators with ``dropout_seed``."""
        torch.manual_seed(self.dropout_seed(name, rank))

    def normal(self, name: str, count: int, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float32 (count, *shape)."""
        return torch.randn((count, *shape), generator=self.generator(name), device=self.device)

    def uniform(self, name: str, count: int) -> Tensor:
        """Uniform numbers in [0, 1), float32 (count,)."""
        return torch.rand(count, generator=self.generator(name), device=self.device)

    def timesteps(self, name: str, count: int, low: int, high: int) -> Tensor:
        """int64 (count,), uniform from ``low`` to ``high``, inclusive."""
        return torch.randint(low, high + 1, (count,), generator=self.generator(name), device=self.device)

    def antithetic_timesteps(self, name: str, count: int, num_train_timesteps: int) -> Tensor:
        """int64 (count,), each uniform in [0, T): the second half is T - 1 minus the first."""
        first = self.timesteps(name, (count + 1) // 2, 0, num_train_timesteps - 1)
        return torch.cat([first, num_train_timesteps - 1 - first])[:count]

    def choose(self, name: str, count: int, values: Tensor) -> Tensor:
        """``count`` rows of ``values``, a tensor on the device, uniformly with replacement."""
        index = torch.randint(len(values), (count,), generator=self.generator(name), device=self.device)
        return values[index]
