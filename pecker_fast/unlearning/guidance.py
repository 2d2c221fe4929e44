"""How score network and teacher predict: without guidance, or with long-short guidance (SiD-LSG, arXiv 2406.01561)."""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..diffusion import null_label, predict
from .conditions import Conditions
from .options import ScoreForgettingOptions
from .setting import Setting
from .streams import Streams

# Part of a batch: retained samples, forgotten samples, or both in one call.
Part: TypeAlias = Literal["both", "retain", "forget"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Labels of this process's part of a micro-batch, retained samples first.

    Parameters
    ----------
    labels : Tensor
        Shape (N,), int64. Labels for theta and psi.
    teacher_labels : Tensor
        Shape (N,), int64. Labels for the teacher: covers in place of forgotten labels.
    retained : int
        Number of retained samples.
    rows : slice or Tensor
        This process's rows of the whole micro-batch.
    total : int
        Rows of the whole micro-batch.
    """

    labels: Tensor
    teacher_labels: Tensor
    retained: int
    rows: slice | Tensor
    total: int

    @classmethod
    def of(cls, labels: Tensor, teacher_labels: Tensor, retained: int) -> "Batch":
        """A batch of all rows."""
        return cls(labels, teacher_labels, retained, slice(None), len(labels))

    def part(self, part: Part) -> tuple["Batch", slice]:
        """The samples of one kind, and their place among this process's samples."""
        r = self.retained
        place = {"both": slice(None), "retain": slice(r), "forget": slice(r, None)}[part]
        labels, covers = self.labels[place], self.teacher_labels[place]
        return replace(self, labels=labels, teacher_labels=covers, retained=0 if part == "forget" else r), place


class Guidance:
    """Predictions of psi and phi in their three roles.

    y_u + kappa (y_c - y_u) with the role's kappa; if kappa is 1 the network is called once. y_u uses the null
    label, or for forgotten samples the negative text in the roles that ``negative_roles`` names.

    Parameters
    ----------
    setting : Setting
        Of the method.
    options : ScoreForgettingOptions
        Of the method.
    conditions : Conditions
        Of the phase.

    Raises
    ------
    ValueError
        If a guidance scale is not 1 and the network has no null label.
    """

    def __init__(self, setting: Setting, options: ScoreForgettingOptions, conditions: Conditions) -> None:
        self.options, self.negative = options, conditions.negative
        self._teacher, self._schedule = setting.problem.teacher, setting.problem.schedule
        self._null: int | None = None
        if any(scale != 1 for scale in options.guidance_scales):
            self._null = null_label(self._teacher)
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

    def drawn(self, streams: Streams, batch: Batch) -> list[Tensor]:
        """Draw the random inputs of ``learning``.

        Returns
        -------
        list of Tensor
            bool (samples of this process,): the samples whose condition psi does not see while it learns. Empty without
            condition dropout.
        """
        if self.options.score_guidance_scale == 1 or not self.options.condition_dropout:
            return []
        uniform = streams.uniform("score condition dropout", batch.total)[batch.rows]
        return [uniform < self.options.condition_dropout]

    def learning(self, score: nn.Module, x_t: Tensor, t: Tensor, batch: Batch, dropped: Tensor | None = None) -> Tensor:
        """psi's prediction that it is trained on (kappa_1); ``dropped`` as ``drawn`` returns it."""
        labels, nulls, scale = self._score_labels(batch), self._null_labels(batch, 0), self.options.score_guidance_scale
        if dropped is not None:
            # The negative text is dropped with the prompt.
            labels, nulls = labels.masked_fill(dropped, self._null), nulls.masked_fill(dropped, self._null)
        return predict(score, self._schedule, x_t, t, labels, scale, nulls)

    def score(self, score: nn.Module, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """psi's prediction in theta's loss (kappa_2 and kappa_3)."""
        scale = self.options.score_eval_guidance_scale
        return predict(score, self._schedule, x_t, t, self._score_labels(batch), scale, self._null_labels(batch, 1))

    def teacher(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """phi's prediction in theta's loss (kappa_4): of the cover for forgotten samples."""
        scale, nulls = self.options.teacher_guidance_scale, self._null_labels(batch, 2)
        return predict(self._teacher, self._schedule, x_t, t, batch.teacher_labels, scale, nulls)
