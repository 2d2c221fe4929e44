"""Hyper-parameters that the methods of score forgetting share, with the published defaults for CIFAR-10."""

from dataclasses import dataclass
from typing import Literal

from ..checks import check_int, check_literals, check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS
from .destroy import DestroyOptions


@dataclass(frozen=True)
class ScoreForgettingOptions(DestroyOptions):
    """Options of score forgetting.

    The defaults are those published for CIFAR-10. theta is the one-step generator that is kept, psi the score network
    that follows it, phi the pretrained teacher.
    """

    max_train_steps: int = 50_000
    """Iterations: in each, psi and theta take one step."""
    train_batch_size: int = 128
    """Samples of retained classes in a step of psi and in one of theta."""
    forget_batch_size: int | None = None
    """Samples of forgotten classes in each; as many as of retained ones by default."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up for a step."""
    t_init: int = 440
    """Timestep at which the generator is fed pure noise."""
    t_min: int = 38
    """Lowest timestep at which scores are compared."""
    t_max: int = 711
    """Highest timestep at which scores are compared, inclusive."""
    alpha: float = 1.2
    """Weight of the squared term in the distillation loss."""
    score_retain_weight: float = 1.0
    """Weight of retained classes in psi's loss."""
    score_forget_weight: float = 0.01
    """Weight of forgotten classes in psi's loss."""
    generator_retain_weight: float = 1.0
    """Weight of L_distill in theta's loss."""
    generator_forget_weight: float = 0.01
    """Weight of L_forget in theta's loss."""
    regression_weight: float = 0.0
    """Weight of an additional loss ||G(z, c_f) - sg G(z, c_o)||^2 in theta's; 0 leaves it out."""
    score_learning_rate: float = 1e-5
    """Learning rate of psi."""
    generator_learning_rate: float = 1e-5
    """Learning rate of theta."""
    lr_scheduler: Literal["constant", "linear"] = "constant"
    """Learning rates over the run: constant, or falling linearly to lr_end_factor of their start."""
    lr_end_factor: float = 0.1
    """Where the linear scheduler ends."""
    score_guidance_scale: float = 1.0
    """Guidance of the prediction that psi is trained on (kappa_1 of long-short guidance); 1: none."""
    score_eval_guidance_scale: float = 1.0
    """Guidance of psi in theta's loss (kappa_2 and kappa_3)."""
    teacher_guidance_scale: float = 1.0
    """Guidance of the teacher in theta's loss (kappa_4)."""
    condition_dropout: float = 0.1
    """Share of psi's training samples whose condition is dropped if score_guidance_scale is not 1."""
    negative_roles: tuple[bool, bool, bool] = (False, False, True)
    """Text only: whether the negative text replaces the null label for forgotten samples, in psi's training, for psi in
    theta's loss, for the teacher."""
    negative_for_retained: bool = False
    """Text only: use the negative text for retained samples too."""
    score_sees_cover: bool = False
    """Give psi the cover as the label of forgotten samples."""
    adam_beta1: float = 0.0
    """Adam's decay of the first moment; at 0 there is none."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to Adam's denominator."""
    max_grad_value: float | None = 1.0
    """Gradients are clipped to this by value."""
    ema_decay: float | None = 0.9999
    """Decay of the averaged generator, which is evaluated and saved. None: no average."""
    variance: Literal["combined", "retain"] = "combined"
    """Gradient of the second moment of theta's Adam: the whole gradient, or the retain gradient alone."""
    max_update: float | None = None
    """Largest update of an entry of theta, in learning rates."""
    relabel: bool = False
    """Classes only: when training has ended, copy the cover class's row of the class embedding over those of the
    forgotten classes, as the method relabel does. What the weights still know is harder to bring back then."""
    split_batches: bool = False
    """Compute retained samples and then forgotten ones instead of both at once: about half the memory for activations,
    in more and smaller calls. Dropout draws other numbers."""
    cuda_graphs: bool = False
    """Capture the forward and backward passes of a step in CUDA graphs: for networks and batches that are too small to
    keep a GPU busy."""

    @property
    def forget_samples(self) -> int:
        """Samples of forgotten classes in a step."""
        return self.train_batch_size if self.forget_batch_size is None else self.forget_batch_size

    @property
    def guidance_scales(self) -> tuple[float, float, float]:
        """Guidance of psi's training, of psi in theta's loss, of the teacher."""
        return self.score_guidance_scale, self.score_eval_guidance_scale, self.teacher_guidance_scale

    def learning_rate_factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rates in iteration ``iteration`` of ``iterations``."""
        if self.lr_scheduler == "constant":
            return 1.0
        return 1.0 - (1.0 - self.lr_end_factor) * iteration / max(1, iterations - 1)

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        """Check all options. ValueError or TypeError, naming the option, if one is out of range."""
        check_literals(self)
        self.check_destroy()
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps"):
            check_int(name, getattr(self, name), 1)
        check_int("forget_batch_size", self.forget_samples, 1)
        check_int("t_init", self.t_init, 0, num_train_timesteps)
        check_int("t_max", self.t_max, 0, num_train_timesteps)
        check_int("t_min", self.t_min, 0, self.t_max + 1)
        for name in ("alpha", "lr_end_factor"):
            check_number(name, getattr(self, name))
        for name in ("score", "generator"):
            check_number(f"{name}_learning_rate", getattr(self, f"{name}_learning_rate"), open_low=True)
            check_number(f"{name}_retain_weight", getattr(self, f"{name}_retain_weight"))
            check_number(f"{name}_forget_weight", getattr(self, f"{name}_forget_weight"))
        for name in ("score_guidance_scale", "score_eval_guidance_scale", "teacher_guidance_scale"):
            check_number(name, getattr(self, name))
        check_number("condition_dropout", self.condition_dropout, high=1.0)
        roles = self.negative_roles
        if len(roles) != 3 or not all(isinstance(role, bool) for role in roles):
            raise ValueError(f"negative_roles is {roles!r}, expected three of True and False")
        check_number("regression_weight", self.regression_weight)
        check_number("adam_epsilon", self.adam_epsilon)
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, high=1.0)
        for name in ("max_grad_value", "max_update"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), open_low=True)
