"""The losses of score-based unlearning, one function per equation, on predictions.

Equation numbers are PECKER's (arXiv 2604.05634). Each loss takes tensors (B, ...) of one shape and any floating dtype,
computes in float32, sums over all dimensions but the first, and returns the mean over the batch, a float32 scalar.
"""

import torch
from torch import Tensor

from ..checks import check_batch, check_like

# Lower bound of omega, as in the public code of SiD and SFD: teacher and generator may agree exactly.
MIN_DISTILLATION_WEIGHT = 1e-5


def _batch_mean(terms: Tensor, weights: Tensor | None = None) -> Tensor:
    losses = terms.flatten(1).sum(1)
    if weights is not None:
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights is {type(weights).__name__}, expected a tensor")
        if weights.shape != losses.shape:
            raise ValueError(f"weights has shape {tuple(weights.shape)}, expected ({losses.shape[0]},), the batch's")
        losses = losses * weights.float()
    return losses.mean()


def prediction_loss(target: Tensor, prediction: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute E ||target - prediction||^2: each term of L_psi (Eq. 3), the saliency loss L_s (Eq. 8).

    Parameters
    ----------
    target : Tensor
        What is to be predicted (``Parametrisation.target``), (B, ...): the noise that was added, or the velocity.
    prediction : Tensor
        The network's prediction at x_t, (B, ...).
    weights : Tensor, optional
        Factor of each sample's loss before the mean, (B,).

    Returns
    -------
    Tensor
        Scalar, float32.

    Raises
    ------
    ValueError, TypeError
        If shapes do not match, or an argument is not a floating tensor.
    """
    check_batch("target", target)
    check_like("prediction", prediction, "target", target)
    return _batch_mean((target.float() - prediction.float()).square(), weights)


@torch.no_grad()
def distillation_weight(x0_teacher: Tensor, x_generated: Tensor) -> Tensor:
    """Compute omega = sg[mean of |x0_teacher - x_generated| over a sample], at least 1e-5; SiD divides Eq. 4-7 by it.

    Parameters
    ----------
    x0_teacher, x_generated : Tensor
        (B, ...).

    Returns
    -------
    Tensor
        float32, (B, 1, ...), without a gradient.

    Raises
    ------
    ValueError, TypeError
        If shapes do not match, or an argument is not a floating tensor.
    """
    check_batch("x_generated", x_generated)
    check_like("x0_teacher", x0_teacher, "x_generated", x_generated)
    distance = (x0_teacher.float() - x_generated.float()).abs()
    dims = tuple(range(1, distance.ndim))
    return distance.mean(dims, keepdim=True).clamp(min=MIN_DISTILLATION_WEIGHT)


def score_distillation_loss(x_generated: Tensor, x0_teacher: Tensor, x0_score: Tensor, alpha: float) -> Tensor:
    """Compute SiD's loss, which L_distill and L_forget share (Eq. 4-7).

    With d = x0_teacher - x0_score and omega = distillation_weight(x0_teacher, x_generated),

        E sum d ((x0_teacher - x_generated) - alpha d) / omega

    The gradient flows through all three tensors and not through omega. Freeze the weights of the teacher and the score
    network, not their outputs, which depend on the generator through x_t.

    Parameters
    ----------
    x_generated : Tensor
        G_theta(z, c), (B, ...).
    x0_teacher : Tensor
        The teacher's prediction of x_0 at x_t, (B, ...); for the cover class in L_forget.
    x0_score : Tensor
        The pseudo score network's prediction of x_0 at the same x_t for c, (B, ...).
    alpha : float
        Weight of the squared term; 1.0 or 1.2.

    Returns
    -------
    Tensor
        Scalar, float32.

    Raises
    ------
    ValueError, TypeError
        If shapes do not match, or an argument is not a floating tensor.
    """
    check_like("x0_score", x0_score, "x_generated", x_generated)
    omega = distillation_weight(x0_teacher, x_generated)
    x_generated, x0_teacher = x_generated.float(), x0_teacher.float()
    difference = x0_teacher - x0_score.float()
    return _batch_mean(difference * ((x0_teacher - x_generated) - alpha * difference) / omega)


def regression_loss(x_forget: Tensor, x_cover: Tensor) -> Tensor:
    """Compute E ||G(z, c_f) - sg[G(z, c_o)]||^2: the distance from the cover class's sample of the same noise.

    Parameters
    ----------
    x_forget : Tensor
        Samples of the forgotten class, (B, ...).
    x_cover : Tensor
        Samples of the cover class, (B, ...), into which no gradient flows.

    Returns
    -------
    Tensor
        Scalar, float32.

    Raises
    ------
    ValueError, TypeError
        If shapes do not match, or an argument is not a floating tensor.
    """
    check_batch("x_forget", x_forget)
    check_like("x_cover", x_cover, "x_forget", x_forget)
    return _batch_mean((x_forget.float() - x_cover.detach().float()).square())
