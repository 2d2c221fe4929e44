"""SFD, score forgetting distillation (Chen et al., arXiv 2409.11219), in one stage or two."""

from dataclasses import dataclass

from ..checks import check_int, check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS
from .distillation import DistillationPhase
from .options import ScoreForgettingOptions
from .score_forgetting import ScoreForgetting
from .setting import Setting


@dataclass(frozen=True)
class SFDOptions(ScoreForgettingOptions):
    """Options of SFD."""

    two_stage: bool = False
    """First distil all classes (SiD), then forget; the teacher stays the pretrained network throughout."""
    first_stage_steps: int = 50_000
    """Iterations of the first of two stages."""
    first_stage_score_learning_rate: float = 3e-5
    """Learning rate of psi in the first of two stages."""

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        check_int("first_stage_steps", self.first_stage_steps, 1)
        check_number("first_stage_score_learning_rate", self.first_stage_score_learning_rate, open_low=True)


class SFD(ScoreForgetting):
    """Score forgetting distillation: the forget gradient reaches every parameter.

    In two stages the second starts from the first one's averaged generator and its score network; the teacher is the
    pretrained network in both (the public code takes the score network for it).
    """

    name = "sfd"
    Options = SFDOptions

    def __init__(self, setting: Setting, options: SFDOptions) -> None:
        super().__init__(setting, options)
        common = (setting, options, self.score, self.generator)
        if options.two_stage:
            self.phases.append(
                DistillationPhase(
                    *common,
                    name="distil",
                    iterations=options.first_stage_steps,
                    score_learning_rate=options.first_stage_score_learning_rate,
                    forget=False,
                )
            )
        self.phases.append(
            DistillationPhase(
                *common,
                name="forget",
                iterations=options.max_train_steps,
                score_learning_rate=options.score_learning_rate,
            )
        )
