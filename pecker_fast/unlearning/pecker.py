"""PECKER (arXiv 2604.05634): score forgetting whose forget gradient reaches salient parameters only."""

from dataclasses import dataclass
from typing import Literal

from .distillation import DistillationPhase, ScoreForgetting
from .masking import Masker, SaliencyOptions
from .options import ScoreForgettingOptions
from .setting import Setting


@dataclass(frozen=True)
class PeckerOptions(SaliencyOptions, ScoreForgettingOptions):
    """Options of PECKER."""

    mask_scope: Literal["forget", "all"] = "forget"
    """What the mask confines: the forget gradient, or the whole step of the generator."""
    update: Literal["joint", "alternate"] = "joint"
    """One step with both gradients, or a masked step on the forget gradient and then one on the retain gradient."""

    def check(self, num_train_timesteps: int) -> None:
        super().check(num_train_timesteps)
        self.check_saliency()
        if self.mask_scope not in ("forget", "all"):
            raise ValueError(f'mask_scope is {self.mask_scope!r}, expected "forget" or "all"')
        if self.update not in ("joint", "alternate"):
            raise ValueError(f'update is {self.update!r}, expected "joint" or "alternate"')
        if self.variance == "retain" and (self.mask_scope == "all" or self.update == "alternate"):
            raise ValueError(
                'variance is "retain", which needs both gradients in one step: mask_scope="forget" and update="joint"'
            )


class Pecker(ScoreForgetting):
    """PECKER: before the generator's step, the mask is taken of the noise-prediction gradient on what is to be
    forgotten; the forget gradient reaches the mask's entries, the retain gradient all."""

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
