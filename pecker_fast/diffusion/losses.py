"""The losses of score-based unlearning, one function an equation, on predictions.

Equation numbers are those of PECKER (arXiv 2604.05634). All take tensors (B, ...) of one shape and any floating dtype,
compute in float32, sum over all dimensions but the first and take the mean over the batch. ``weights``, shape (B,),
multiplies the loss of each sample before that mean. Each returns a float32 scalar, and raises ValueError or TypeError
for shapes that do not match.
"""

import torch
from torch import Tensor

from ..checks import check_batch, check_like

# The least omega: what the ancestors divide by where teacher and generator agree.
MIN_DISTILLATION_WEIGHT = 1e-5


def _batch_mean(terms: Tensor, weights: Tensor | None) -> Tensor:
    losses = terms.flatten(1).sum(1)
    if weights is not None:
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights is {type(weights).__name__}, expected a tensor")
        if weights.shape != losses.shape:
            raise ValueError(f"weights has shape {tuple(weights.shape)}, expected ({losses.shape[0]},), the batch's")
        losses = losses * weights.float()
    return losses.mean()


def noise_prediction_loss(eps: Tensor, eps_pred: Tensor, weights: Tensor | None = None) -> Tensor:
    """E ||eps - eps_pred||^2: each term of the pseudo-score loss L_psi (Eq. 3), and the saliency loss L_s (Eq. 8).

    Arguments: ``eps`` the noise added, ``eps_pred`` the network's prediction at x_t; both (B, ...).
    """
    check_batch("eps", eps)
    check_like("eps_pred", eps_pred, "eps", eps)
    return _batch_mean((eps.float() - eps_pred.float()).square(), weights)


@torch.no_grad()
def distillation_weight(x0_teacher: Tensor, x_generated: Tensor) -> Tensor:
    """omega = sg[mean over dimensions of |x0_teacher - x_generated|], at least 1e-5 (SiD's normalisation of Eq. 4-7).

    Arguments: both (B, ...). Returns float32, shape (B, 1, ...), without a gradient.
    """
    check_batch("x_generated", x_generated)
    check_like("x0_teacher", x0_teacher, "x_generated", x_generated)
    distance = (x0_teacher.float() - x_generated.float()).abs()
    dims = tuple(range(1, distance.ndim))
    return distance.mean(dims, keepdim=True).clamp(min=MIN_DISTILLATION_WEIGHT)


def score_distillation_loss(
    x_generated: Tensor, x0_teacher: Tensor, x0_score: Tensor, alpha: float, weights: Tensor | None = None
) -> Tensor:
    """SiD's loss, the form of L_distill and L_forget (Eq. 4-7): with d = x0_teacher - x0_score,

        E sum d ((x0_teacher - x_generated) - alpha d) / omega,   omega = distillation_weight(x0_teacher, x_generated)

    The gradient flows through all three tensors and not through omega. Freeze the weights of teacher and score network,
    not their outputs: those depend on the generator through x_t.

    Arguments, each (B, ...)
    ---------
    x_generated: G_theta(z, c).
    x0_teacher: x_0 as the teacher predicts it at x_t; asked about the cover class in L_forget.
    x0_score: x_0 as the pseudo score network predicts it at the same x_t, asked about c.
    alpha: weight of the squared term; 1.0 or 1.2.
    """
    check_like("x0_score", x0_score, "x_generated", x_generated)
    omega = distillation_weight(x0_teacher, x_generated)
    x_generated, x0_teacher = x_generated.float(), x0_teacher.float()
    difference = x0_teacher - x0_score.float()
    return _batch_mean(difference * ((x0_teacher - x_generated) - alpha * difference) / omega, weights)


def regression_loss(x_forget: Tensor, x_cover: Tensor, weights: Tensor | None = None) -> Tensor:
    """E ||G(z, c_f) - sg[G(z, c_o)]||^2: what is forgotten is drawn to the cover class's sample from the same noise.

    Arguments: ``x_forget`` and ``x_cover``, (B, ...); no gradient flows into ``x_cover``.
    """
    check_batch("x_forget", x_forget)
    check_like("x_cover", x_cover, "x_forget", x_forget)
    return _batch_mean((x_forget.float() - x_cover.detach().float()).square(), weights)
