"""Distillation alone (SiD, arXiv 2404.04057): a one-step generator of all conditions, and its score network.

Nothing is forgotten. Unlearning that starts from the two takes fewer iterations: the generator draws already, and the
score network knows what it draws.
"""

from dataclasses import dataclass

from ..diffusion import NUM_TRAIN_TIMESTEPS
from .distillation import DistillationPhase
from .options import ScoreForgettingOptions
from .score_forgetting import ScoreForgetting
from .setting import Setting


@dataclass(frozen=True)
class DistilOptions(ScoreForgettingOptions):
    """Options of distillation. The defaults are those published for CIFAR-10."""

    score_forget_weight: float = 0.0
    generator_forget_weight: float = 0.0
    score_learning_rate: float = 3e-5

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        for name in ("score_forget_weight", "generator_forget_weight", "regression_weight"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name):g}, expected 0: distil forgets nothing")
        if self.relabel:
            raise ValueError("relabel is true, expected false: distil forgets nothing")
        if self.destroy is not None:
            raise ValueError(f"destroy is {self.destroy!r}, expected None: distil forgets nothing")


class Distillation(ScoreForgetting):
    """The loop of score forgetting on retained samples of all conditions."""

    name = "distil"
    Options = DistilOptions
    # The presets' values are for forgetting.
    defaults = {  # noqa: RUF012
        "max_train_steps": DistilOptions.max_train_steps,
        "score_learning_rate": DistilOptions.score_learning_rate,
        "score_forget_weight": 0.0,
        "generator_forget_weight": 0.0,
    }
    forgets = False
    # The whole score network is kept.
    trains_adapters = False

    def __init__(self, setting: Setting, options: DistilOptions) -> None:
        super().__init__(setting, options)
        phase = DistillationPhase(
            setting,
            options,
            self.score,
            self.generator,
            name="distil",
            iterations=options.max_train_steps,
            score_learning_rate=options.score_learning_rate,
            forget=False,
        )
        self.phases.append(phase)
