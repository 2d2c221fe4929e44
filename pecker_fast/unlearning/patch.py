"""Patch: forgetting as a sparse change of a one-step generator that has been distilled before.

One mask is computed at the start and confines every step: entries outside it keep their bits, have no moments, and are
not part of the result that has to be shipped. What differs from PECKER with a fixed mask:

* theta starts from a distilled generator and psi from its score network. In one stage every weight has to move to
  become a generator at all, and a mask is in the way (docs/ablation.md).
* The score weighs what is to be forgotten against what is to stay: F_f / (F_r + damping * mean F_r), with F the
  diagonal of the Fisher information of the noise prediction on generated samples.
* The losses of retained and forgotten samples are summed before one backward pass.
* The learning rate rises as the density falls (``sparse_learning_rate``).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..checks import check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS
from .distillation import DistillationPhase
from .fixed_mask import FixedMaskOptions, PatchMasker, in_part
from .options import ScoreForgettingOptions
from .score_forgetting import ScoreForgetting
from .setting import Setting

__all__ = ["Patch", "PatchMasker", "PatchOptions", "in_part", "sparse_learning_rate"]


@dataclass(frozen=True)
class PatchOptions(FixedMaskOptions, ScoreForgettingOptions):
    """Options of a patch.

    ``generator_learning_rate`` is that of density 1; sparser patches are trained at a higher one.
    """

    density: float = 0.1
    """Share of all parameters of theta that the patch may change, in (0, 1]."""
    pack_gradients: bool = True
    """Store gradients of the mask's entries only. That takes some milliseconds an iteration; a small network is faster
    without."""
    score_density: float = 1.0
    """Share of psi's parameters that are trained, chosen as theta's are; 1 trains all of them."""

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        for name in ("density", "score_density"):
            check_number(name, getattr(self, name), high=1.0, open_low=True)
        self.check_fixed_mask()
        if self.variance == "retain":
            raise ValueError('variance is "retain", but a patch sums both gradients in one backward pass: "combined"')


def sparse_learning_rate(rate: float, share: float) -> float:
    """The learning rate for a share of the entries: rate / share, which keeps the sum of an update's magnitudes."""
    return rate / share


class Patch(ScoreForgetting):
    """A sparse patch of a distilled one-step generator: one fixed mask confines every step."""

    name = "patch"
    Options = PatchOptions
    shards = False
    shares_weights = True
    needs_distilled: ClassVar[bool] = True
    # Chosen on the digits (docs/patches.md); a starting point on other data.
    defaults: ClassVar[dict[str, Any]] = {"generator_forget_weight": 0.3, "score_forget_weight": 0.02}

    def __init__(self, setting: Setting, options: PatchOptions) -> None:
        if options.score_density < 1 and setting.placement.score_lora_rank:
            raise ValueError(
                f"score_density is {options.score_density} and score_lora_rank {setting.placement.score_lora_rank}: "
                "two ways to train less of the score network, expected one of them"
            )
        super().__init__(setting, options)
        masker = PatchMasker(setting, options, self.generator, options.density)
        score_masker, score_rate = None, options.score_learning_rate
        if options.score_density < 1:
            score_masker = PatchMasker(setting, options, self.generator, options.score_density, anywhere=True)
            score_rate = sparse_learning_rate(score_rate, options.score_density)
        self.phases.append(
            DistillationPhase(
                setting,
                options,
                self.score,
                self.generator,
                name="forget",
                iterations=options.max_train_steps,
                score_learning_rate=score_rate,
                generator_learning_rate=sparse_learning_rate(options.generator_learning_rate, masker.share),
                masker=masker,
                mask_scope="all",
                score_masker=score_masker,
                packs_gradients=options.pack_gradients,
                shared=self.shared,
            )
        )

    @classmethod
    def confined(cls, options: PatchOptions) -> list[str]:
        # What is destroyed differs from the teacher, wherever it is.
        names = {"score": options.score_density < 1, "generator": options.destroy is None}
        return [name for name, is_confined in names.items() if is_confined]

    @classmethod
    def rehearsal_options(cls, options: PatchOptions, processes: int) -> PatchOptions:
        rehearsed = super().rehearsal_options(options, processes)
        chunks = min(2, options.saliency_chunks)
        return replace(rehearsed, saliency_chunks=chunks, disjoint_from=())
