"""Closed-form edit of linear layers that see text: UCE (Gandikota et al., arXiv 2308.14761) with weighted terms.

For text vectors c_i to edit, c_i* to draw in their place, and c_j to preserve, the edited W minimises

    erase_scale sum_i ||W c_i - W_old c_i*||^2 + preserve_scale sum_j ||(W - W_old) c_j||^2
        + regularization ||W - W_old||^2,

which the normal equations solve with W = W_old T:

    T M = erase_scale sum_i c_i* c_i^T + preserve_scale sum_j c_j c_j^T + regularization I,
    M   = erase_scale sum_i c_i c_i^T + preserve_scale sum_j c_j c_j^T + regularization I.

With all weights 1 and without the last term it is the paper's equation. T is the same for every layer, so there is one
system to solve.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_literals, check_number

# Below this ratio of its extreme eigenvalues, float64 does not solve the system.
SINGULAR = 1e-13


@dataclass(frozen=True)
class ClosedFormOptions:
    """What is edited and what is preserved."""

    edited_tokens: Literal["last", "all"] = "last"
    """Text vectors that are edited. last, as in the paper one for each prompt to forget: that of the last token of the
    concept, where the prompt differs from its cover. all: at every place of a prompt, onto the cover's vector there."""
    preserved_tokens: Literal["last", "all"] = "last"
    """Text vectors of the prompts to keep that are preserved: of the last token, or of every place. Those of the empty
    prompt are always preserved."""
    erase_scale: float = 1.0
    """Weight of the vectors to edit."""
    preserve_scale: float = 1.0
    """Weight of the vectors to preserve."""
    regularization: float = 0.1
    """Weight of the distance of the weights from the old ones; the paper's equation has none. 0: the vectors have to
    span the whole space."""

    def check_edit(self) -> None:
        """Check these options. ValueError or TypeError, naming the option, if one is out of range."""
        check_literals(self)
        check_number("erase_scale", self.erase_scale, open_low=True)
        check_number("preserve_scale", self.preserve_scale)
        check_number("regularization", self.regularization)


def own_token(tokens: Sequence[int], other: Sequence[int]) -> int:
    """Find the last token in which a text differs from another.

    Parameters
    ----------
    tokens, other : sequence of int
        Of the two texts; the first and the last mark start and end.

    Returns
    -------
    int
        Place of the last token before the words that both texts end with. If the text has no words of its own, the
        place of its last token.
    """
    start = next((i for i, pair in enumerate(zip(tokens, other, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(tokens), len(other)) if start is None else start
    end = 0
    while end < min(len(tokens), len(other)) - start and tokens[-1 - end] == other[-1 - end]:
        end += 1
    return last_token(tokens) if len(tokens) - end <= start else len(tokens) - end - 1


def last_token(tokens: Sequence[int]) -> int:
    """Place of a text's last token; of an empty text that of the mark of its end."""
    return max(len(tokens) - 2, 1)


def edit_matrix(edited: Tensor, targets: Tensor, preserved: Iterable[Tensor], options: ClosedFormOptions) -> Tensor:
    """Solve for T.

    Parameters
    ----------
    edited, targets : Tensor
        c_i and c_i*, floating (E, d).
    preserved : iterable of Tensor
        c_j, floating (P, d), in parts.
    options : ClosedFormOptions
        The weights.

    Returns
    -------
    Tensor
        float64 (d, d): the edited weights are the old ones times it.

    Raises
    ------
    ValueError
        If the vectors do not determine the weights.
    """
    c, moved, width = edited.double(), (targets.double() - edited.double()), edited.shape[1]
    system = options.erase_scale * (c.T @ c)
    for part in preserved:
        vectors = part.double()
        system += options.preserve_scale * (vectors.T @ vectors)
    system += options.regularization * torch.eye(width, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(system)
    if not eigenvalues[0] > SINGULAR * eigenvalues[-1]:
        raise ValueError(
            f"regularization is {options.regularization:g}, and the vectors to edit and to preserve do not span all "
            f"{width} dimensions of the text: expected more of it, or more prompts to keep"
        )
    # T - I, which is small beside the identity: (T - I) M = erase_scale sum (c* - c) c^T.
    change = options.erase_scale * (moved.T @ c)
    factor = torch.linalg.cholesky(system)
    return torch.eye(width, dtype=torch.float64) + torch.cholesky_solve(change.T, factor).T
