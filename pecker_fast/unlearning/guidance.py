"""How score network and teacher are asked: unguided, or with long-short guidance (SiD-LSG, arXiv 2406.01561)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..diffusion import null_label, predict_eps
from .conditions import Conditions
from .options import ScoreForgettingOptions
from .setting import Setting
from .streams import Streams


@dataclass(frozen=True, eq=False)
class Batch:
    """Labels of this process's part of a micro-batch, what is retained first: of theta and psi, and of the teacher.

    ``rows`` are its rows of the whole micro-batch, which has ``total``.
    """

    labels: Tensor
    teacher_labels: Tensor
    retained: int
    rows: slice | Tensor
    total: int

    def part(self, part: Literal["both", "retain", "forget"]) -> tuple["Batch", slice]:
        """The samples of one kind, and where they are among this process's."""
        r = self.retained
        kept = {"both": slice(None), "retain": slice(r), "forget": slice(r, None)}[part]
        labels, covers = self.labels[kept], self.teacher_labels[kept]
        return replace(self, labels=labels, teacher_labels=covers, retained=0 if part == "forget" else r), kept


class Guidance:
    """Noise predictions of psi and phi in the three roles that they have.

    eps_u + kappa (eps_c - eps_u) with kappa of the role; where it is 1 the network is called once. eps_u is of the null
    label, or of the negative text for what is to be forgotten in the roles that ``negative_roles`` says.

    Parameters
    ----------
    setting, options: of the method.
    conditions: of the phase.

    Raises ValueError where guidance is asked for and the network has no null label.
    """

    def __init__(self, setting: Setting, options: ScoreForgettingOptions, conditions: Conditions) -> None:
        self.setting, self.options, self.negative = setting, options, conditions.negative
        self._null: int | None = None
        if any(scale != 1 for scale in options.guidance_scales):
            self._null = null_label(setting.teacher)
            if self._null is None:
                raise ValueError(
                    f"guidance scales are {options.guidance_scales}, expected 1: the network has no null label"
                )

    def _null_labels(self, batch: Batch, role: int) -> Tensor | None:
        if self._null is None:
            return None
        nulls = torch.full_like(batch.labels, self._null)
        if self.negative is not None and self.options.negative_roles[role]:
            nulls[0 if self.options.negative_for_retained else batch.retained :] = self.negative
        return nulls

    def _score_labels(self, batch: Batch) -> Tensor:
        return batch.teacher_labels if self.options.score_sees_cover else batch.labels

    def learning(self, score: nn.Module, x_t: Tensor, t: Tensor, batch: Batch, streams: Streams) -> Tensor:
        """psi's prediction that it is trained on (kappa_1); conditions are dropped at random where it is guided."""
        labels, nulls, scale = self._score_labels(batch), self._null_labels(batch, 0), self.options.score_guidance_scale
        if scale != 1 and self.options.condition_dropout:
            drawn = streams.uniform("score condition dropout", batch.total)[batch.rows]
            dropped = drawn < self.options.condition_dropout
            # The negative text goes with the prompt.
            labels, nulls = labels.masked_fill(dropped, self._null), nulls.masked_fill(dropped, self._null)
        return predict_eps(score, x_t, t, labels, scale, nulls)

    def score(self, score: nn.Module, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """psi's prediction in theta's loss (kappa_2 and kappa_3)."""
        scale = self.options.score_eval_guidance_scale
        return predict_eps(score, x_t, t, self._score_labels(batch), scale, self._null_labels(batch, 1))

    def teacher(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """phi's prediction in theta's loss (kappa_4): of the cover in place of what is to be forgotten."""
        scale, nulls = self.options.teacher_guidance_scale, self._null_labels(batch, 2)
        return predict_eps(self.setting.teacher, x_t, t, batch.teacher_labels, scale, nulls)
