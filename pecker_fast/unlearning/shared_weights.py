"""One copy of the weights for networks that differ in the entries of a mask alone: teacher, score network, generator.

A patch trains the entries of a mask and leaves all others at the teacher's bits. So the memory holds one network's
entries at a time, and those of the others are stored packed. Exchanging them copies bits: results are those of networks
with weights of their own.
"""

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..entries import put_entries, take_entries
from ..mask import SaliencyMask

BASE = "teacher"


class SharedWeights:
    """The weights of a frozen network and of networks that start as it and are trained in the entries of one mask each.

    The networks' modules call ``activate`` before they compute and before their state is read, so a network can be
    called at any time. Code that reads or writes parameters in any other way calls it first.

    The parameters share their version counters too. If weights are exchanged while a graph still needs them, autograd
    raises RuntimeError in the backward pass. Backward passes of the teacher, whose graph would have to wait for another
    network's, therefore compute its activations again, see ``_recompute``.

    Parameters
    ----------
    base : nn.Module
        The frozen network. Its modules get hooks.
    names : sequence of str
        The networks that start as it.

    Attributes
    ----------
    networks : dict of str to nn.Module
        Networks by name, with parameters of their own, which require gradients, in the memory of the base's.
    """

    def __init__(self, base: nn.Module, names: Sequence[str]) -> None:
        self._params = {name: param.detach() for name, param in base.named_parameters()}
        self._masks: dict[str, SaliencyMask] = {}
        # By network: the entries of its mask. Its own while another network's are in place; the base's while its own
        # are.
        self._stored: dict[str, dict[str, Tensor]] = {}
        self._active = BASE
        self.networks = {name: _alias(base) for name in names}
        for name, network in [(BASE, base), *self.networks.items()]:
            self._follow(name, network)
        _recompute(_core(base))

    def _follow(self, name: str, network: nn.Module) -> None:
        """Activate a network before one of its modules computes, or is asked for its state."""

        def activate(*_: Any) -> None:
            self.activate(name)

        for module in network.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(activate)
                module.register_state_dict_pre_hook(activate)

    @property
    def nbytes(self) -> int:
        """Bytes of the entries that are stored packed."""
        return sum(value.nbytes for value in self.stored())

    def stored(self) -> Iterator[Tensor]:
        """The entries that are not in place."""
        for values in self._stored.values():
            yield from values.values()

    def has(self, name: str) -> bool:
        """Whether a network shares the weights."""
        return name in self.networks

    def confine(self, name: str, mask: SaliencyMask) -> None:
        """Say which entries of a network are going to be trained, before they differ from the base's.

        Parameters
        ----------
        name : str
            The network.
        mask : SaliencyMask
            Over all its parameters. Saying the same again does nothing.

        Raises
        ------
        RuntimeError
            If the network has another mask already.
        """
        known = self._masks.get(name)
        if known is None:
            self._store(name, mask, self._params)
        elif known is not mask and not known.equal(mask):
            raise RuntimeError(f"the {name} shares weights and has a mask already, which cannot be replaced")

    def _store(self, name: str, mask: SaliencyMask, values: Mapping[str, Tensor]) -> None:
        """Store the entries of ``mask`` in ``values`` as those of a network, which is not in place afterwards."""
        self.activate(BASE)
        counts = dict(zip(mask.names, mask.tensor_counts(), strict=True))
        self._stored[name] = {
            key: take_entries(values[key], mask.tensor_words(key), count) for key, count in counts.items() if count
        }
        self._masks[name] = mask

    @torch.no_grad()
    def activate(self, name: str) -> None:
        """Put a network's entries in place."""
        if name == self._active:
            return
        for one in (self._active, name):
            for key, values in self._stored.get(one, {}).items():
                param, words = self._params[key], self._masks[one].tensor_words(key)
                others = take_entries(param, words, values.numel())
                put_entries(param, words, values)
                values.copy_(others)
        self._active = name

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of a network's state dict, on the CPU."""
        return {key: value.detach().to("cpu", copy=True) for key, value in self.networks[name].state_dict().items()}

    @torch.no_grad()
    def load(self, name: str, state: Mapping[str, Tensor], mask: SaliencyMask | None) -> None:
        """Load a network's state.

        Parameters
        ----------
        name : str
            The network.
        state : mapping of str to Tensor
            Its whole state.
        mask : SaliencyMask or None
            The entries that are trained; None if there is no mask yet.

        Raises
        ------
        ValueError
            If the state is of another network, or differs from the base outside the mask.
        """
        shapes = [{key: value.shape for key, value in values.items()} for values in (state, self._params)]
        if shapes[0] != shapes[1]:
            different = sorted(key for key, _ in shapes[0].items() ^ shapes[1].items())
            raise ValueError(f"the state is of another network: {different[0]} differs")
        self._stored.pop(name, None)
        self._masks.pop(name, None)
        self.activate(BASE)
        values = {key: state[key].to(param) for key, param in self._params.items()}
        for key, param in self._params.items():
            outside = values[key] if mask is None else torch.where(mask[key], param, values[key])
            if not torch.equal(outside, param):
                raise ValueError(
                    f"share_weights is set, but the {name} in the checkpoint differs from the teacher outside its "
                    f"mask, in {key}: expected no share_weights"
                )
        if mask is not None:
            self._store(name, mask, values)


def _alias(network: nn.Module) -> nn.Module:
    """A copy with parameters of its own in the same memory, which require gradients."""
    memo: dict[int, Any] = {id(param): nn.Parameter(param.detach()) for param in network.parameters()}
    return copy.deepcopy(network, memo)


def _core(network: nn.Module) -> nn.Module:
    """The network inside modules that have no parameters beside its own."""
    while True:
        if next(network.parameters(recurse=False), None) is not None:
            return network
        inner = [child for child in network.children() if next(child.parameters(), None) is not None]
        if len(inner) != 1:
            return network
        network = inner[0]


def _recompute(network: nn.Module) -> None:
    """Let a frozen network keep no activations for the backward pass to its input, which computes them again.

    In theta's loss psi's graph needs psi's weights, so the teacher's graph cannot exist beside it. Autograd begins its
    backward pass with what was computed last: when the teacher's turn comes, psi's graph is done.
    """
    forward, this = type(network).forward, weakref.ref(network)

    def recomputing(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and sample.requires_grad):
            return forward(this(), sample, *args, **kwargs)
        # It is in eval mode: there are no random numbers to draw again.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(partial(forward, this()), sample, *args, **options, **kwargs)

    network.forward = recomputing
