"""Destroying entries of the generator before it forgets, so that training starts from less than the network knew.

UNDO (arXiv 2506.06278) adds noise to a network and then distils what is to stay into it: what was destroyed and is not
taught again is gone, while training alone may only hide it. Here a mask names the entries, as in a patch, and score
forgetting is the distillation: the teacher shows theta the cover class in place of the forgotten one.

The score network is left as it is. It is not part of the result, so there is nothing to remove from it, and theta
learns through the difference of its prediction and the teacher's: a destroyed score network would lead theta's retained
classes astray until it has learnt again.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_left_out, check_number
from ..mask import SaliencyMask
from .fixed_mask import FixedMaskOptions, PatchMasker
from .masking import BaseMasker
from .setting import Setting
from .streams import Streams

KINDS = ("noise", "shrink", "reset")
SCORES = ("ratio", "gradient", "magnitude", "random")


@dataclass(frozen=True)
class DestroyOptions:
    """What is destroyed before the first step that forgets."""

    destroy: Literal["noise", "shrink", "reset"] | None = None
    """Before the first step that forgets, destroy entries of theta: add Gaussian noise, shrink them towards 0, or move
    them towards random numbers with the mean and deviation of their tensor. None: destroy nothing."""
    destroy_share: float = 0.1
    """Share of all entries of theta that are destroyed."""
    destroy_strength: float = 0.5
    """noise: its deviation, in root mean squares of the entry's tensor. shrink: share of the value that is lost. reset:
    how far the value moves to the random one, 1 is all the way."""
    destroy_score: Literal["ratio", "gradient", "magnitude", "random"] = "ratio"
    """What names the entries, as the saliency_score of a patch; random is for comparison."""
    destroy_within: Literal["mask", "all"] = "mask"
    """Of a method that confines every step to one mask (patch): destroy entries of this mask, or any. Entries outside
    it are never trained again, and a patch file has them too."""
    destroy_dense: bool = False
    """For comparison: in place of that change, Gaussian noise of the same norm on all entries (of the mask, if
    destroy_within is mask)."""

    def check_destroy(self) -> None:
        """Check these options. ValueError or TypeError, naming the option, if one is out of range."""
        check_choice("destroy", self.destroy, (None, *KINDS))
        if self.destroy is None:
            further = {item.name: item.default for item in fields(DestroyOptions) if item.name != "destroy"}
            check_left_out(vars(self), further, further, "destroy is None, so that nothing is destroyed")
        check_choice("destroy_score", self.destroy_score, SCORES)
        check_choice("destroy_within", self.destroy_within, ("mask", "all"))
        check_number("destroy_share", self.destroy_share, high=1.0, open_low=True)
        bounded = self.destroy in ("shrink", "reset")
        check_number("destroy_strength", self.destroy_strength, high=1.0 if bounded else math.inf, open_low=True)


@dataclass(frozen=True)
class _Choice(FixedMaskOptions):
    """How the entries to destroy are chosen."""

    t_init: int = 0


class Destroyer(PatchMasker):
    """Chooses entries of the generator, and destroys them.

    Parameters
    ----------
    setting : Setting
        Of the method.
    options : object
        Options of the method, ``DestroyOptions`` among them.
    generator : nn.Module
        theta, which draws the samples for the score.
    confines : BaseMasker, optional
        The one mask that confines all of theta's steps.

    Raises
    ------
    ValueError
        If more is to be destroyed than the mask has.
    """

    def __init__(
        self, setting: Setting, options: Any, generator: nn.Module, confines: BaseMasker | None = None
    ) -> None:
        within = confines if options.destroy_within == "mask" else None
        if within is not None and options.destroy_share > within.share:
            raise ValueError(
                f"destroy_share is {options.destroy_share}, but the mask has {within.share:.3g} of the entries: "
                "expected at most that, or destroy_within all"
            )
        estimate = ("saliency_chunks", "saliency_chunk_size", "saliency_damping")
        own = {name: getattr(options, name) for name in estimate if hasattr(options, name)}
        choice = _Choice(saliency_score=options.destroy_score, t_init=options.t_init, **own)
        super().__init__(setting, choice, generator, options.destroy_share)
        self.kind, self.strength, self.dense = options.destroy, options.destroy_strength, options.destroy_dense
        self._within = within

    def ranking(self, streams: Streams, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        scores, options = super().ranking(streams, network)
        if self._within is not None:
            self._within.mask.apply_(scores)
        return scores, options

    @torch.no_grad()
    def destroy(self, network: nn.Module) -> dict[str, float]:
        """Destroy entries of a network in place.

        Parameters
        ----------
        network : nn.Module
            theta as it was built. The mask that confines its steps has been computed.

        Returns
        -------
        dict
            ``destroyed``: the share of all entries that may have changed. ``destroyed_norm``: the 2-norm of the change
            divided by that of the weights before.
        """
        with torch.enable_grad():
            self.refresh(0, network)
        streams = Streams(self.compute.device, self.compute.seed, "destroy")
        norm = _norm(new - param.detach().float() for param, new in self._destroyed(streams, network))
        before = _norm(param.detach().float() for param in network.parameters())
        where = self.mask
        if self.dense:
            where = None if self._within is None else self._within.mask
            spread = [
                (param, self._noise(streams, name, param, where, "dense")) for name, param in network.named_parameters()
            ]
            scale = norm / _norm(noise for _, noise in spread)
            changed = ((param, param.detach().float() + scale * noise) for param, noise in spread)
        else:
            changed = self._destroyed(streams, network)
        for (name, param), (_, new) in zip(network.named_parameters(), changed, strict=True):
            new = new.to(param.dtype)
            # By where: -0.0 and NaN stay what they are, too.
            param.copy_(new if where is None else torch.where(where[name], new, param))
        share = 1.0 if where is None else where.density
        return {"destroyed": share, "destroyed_norm": norm / before if before else 0.0}

    def _destroyed(self, streams: Streams, network: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its values after the destruction, float32; entries outside the mask have their own."""
        for name, param in network.named_parameters():
            value = param.detach().float()
            if self.kind == "shrink":
                change = torch.where(self.mask[name], -self.strength * value, 0.0)
            elif self.kind == "noise":
                change = self.strength * self._noise(streams, name, param, self.mask)
            else:
                fresh = value.mean() + value.std(correction=0) * self._normal(streams, name, param)
                change = torch.where(self.mask[name], self.strength * (fresh - value), 0.0)
            yield param, value + change

    def _noise(
        self, streams: Streams, name: str, param: Tensor, where: SaliencyMask | None, purpose: str = "sparse"
    ) -> Tensor:
        """Gaussian noise on the entries in ``where``, in root mean squares of the tensor; float32."""
        noise = param.detach().float().square().mean().sqrt() * self._normal(streams, name, param, purpose)
        return noise if where is None else torch.where(where[name], noise, 0.0)

    def _normal(self, streams: Streams, name: str, param: Tensor, purpose: str = "sparse") -> Tensor:
        return torch.randn(param.shape, generator=streams.generator(f"{purpose} {name}"), device=param.device)


def _norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all entries of some tensors together. Waits for the device."""
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))
