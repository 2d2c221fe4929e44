"""PECKER (arXiv 2604.05634): score forgetting whose forget gradient reaches salient parameters only."""

from dataclasses import dataclass, replace
from typing import Literal

from ..diffusion import NUM_TRAIN_TIMESTEPS
from .distillation import DistillationPhase
from .masking import Masker, SaliencyOptions
from .options import ScoreForgettingOptions
from .score_forgetting import ScoreForgetting, process_share
from .setting import Setting


@dataclass(frozen=True)
class PeckerOptions(SaliencyOptions, ScoreForgettingOptions):
    """Options of PECKER."""

    mask_scope: Literal["forget", "all"] = "forget"
    """What the mask confines: the forget gradient, or the whole step of the generator."""
    update: Literal["joint", "alternate"] = "joint"
    """One step with both gradients, or a masked step on the forget gradient and then one on the retain gradient."""

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        self.check_saliency()
        if self.variance == "retain" and (self.mask_scope == "all" or self.update == "alternate"):
            raise ValueError(
                'variance is "retain", which needs both gradients in one step: mask_scope="forget" and update="joint"'
            )


class Pecker(ScoreForgetting):
    """PECKER: before the generator's step, the mask is taken from the noise-prediction gradient on forgotten classes;
    the forget gradient reaches the mask's entries, the retain gradient all."""

    name = "pecker"
    Options = PeckerOptions

    def __init__(self, setting: Setting, options: PeckerOptions) -> None:
        super().__init__(setting, options)
        self.phases.append(
            DistillationPhase(
                setting,
                options,
                self.score,
                self.generator,
                name="forget",
                iterations=options.max_train_steps,
                score_learning_rate=options.score_learning_rate,
                masker=Masker(setting, options, options.t_init),
                update=options.update,
                mask_scope=options.mask_scope,
            )
        )

    @classmethod
    def rehearsal_options(cls, options: PeckerOptions, processes: int) -> PeckerOptions:
        return replace(
            super().rehearsal_options(options, processes),
            saliency_batch_size=process_share("saliency_batch_size", options.saliency_batch_size, processes),
            saliency_batches=min(2, options.saliency_batches),
        )
