"""Patches: what a run changed, bit for bit, as a small file that can be applied, reverted and inspected."""

import os

from ..mask import SaliencyMask
from .apply import Switched, check_patches, switch_
from .delta import apply_delta
from .patch import Patch, PatchTensor, file_kind

__all__ = [
    "Patch",
    "PatchTensor",
    "Switched",
    "apply_delta",
    "check_patches",
    "file_kind",
    "patch_mask",
    "switch_",
]


def patch_mask(file: str | os.PathLike) -> SaliencyMask:
    """Read the positions of a patch file as a mask.

    Parameters
    ----------
    file : path-like
        The patch file.

    Returns
    -------
    SaliencyMask
        Over all tensors of the network, by name: True where an entry changes. It is read without the base.

    Raises
    ------
    ValueError
        If it is not a patch file, or is damaged.

    Examples
    --------
    >>> free = ~(pf.patch_mask("first.safetensors") | pf.patch_mask("second.safetensors"))
    """
    return Patch.load(file).mask()
