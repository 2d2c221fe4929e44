"""Each loss and its gradient against formulas written out in float64."""

import numpy as np
import pytest
import torch

from pecker_fast.diffusion import (
    NoiseSchedule,
    OneStepGenerator,
    distillation_weight,
    predict,
    prediction_loss,
    regression_loss,
    score_distillation_loss,
)

from .toy import AffineNetwork, assert_close, double

SHAPE = (5, 2, 3, 4)


def leaves(count, dtype=torch.float32):
    return [torch.randn(SHAPE).to(dtype).requires_grad_() for _ in range(count)]


def sum_dims(values):
    return values.reshape(len(values), -1).sum(1)


@pytest.fixture(params=[False, True], ids=["plain", "weighted"])
def weights(request):
    return torch.rand(SHAPE[0]) + 0.5 if request.param else None


def factors(weights):
    """Factor of each sample's sum in the loss: weight / B."""
    values = np.ones(SHAPE[0]) if weights is None else double(weights)
    return values / SHAPE[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_loss(weights, dtype):
    eps, eps_pred = leaves(2, dtype)
    loss = prediction_loss(eps, eps_pred, weights)
    loss.backward()
    error = double(eps) - double(eps_pred)
    factor = factors(weights)
    assert loss.shape == ()
    assert_close(loss, (factor * sum_dims(error**2)).sum())
    # Gradients have the leaf's dtype, so bfloat16 rounds them once more.
    rounding = 64 if dtype == torch.float32 else 2**16
    assert_close(eps_pred.grad.float(), -2 * error * factor.reshape(-1, 1, 1, 1), factor=rounding)


def test_distillation_weight():
    x, teacher = leaves(2)
    with torch.no_grad():
        teacher[2] = x[2]
        teacher[3] = x[3] + 1e-6
    omega = distillation_weight(teacher, x)
    assert not omega.requires_grad and omega.shape == (SHAPE[0], 1, 1, 1)
    mean = sum_dims(np.abs(double(teacher) - double(x))) / np.prod(SHAPE[1:])
    assert_close(omega, np.maximum(mean, 1e-5).reshape(-1, 1, 1, 1))
    assert omega[2].item() == omega[3].item() == np.float32(1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_score_distillation_loss(alpha):
    x, teacher, score = leaves(3)
    loss = score_distillation_loss(x, teacher, score, alpha)
    loss.backward()
    g, f, s = (double(v) for v in (x, teacher, score))
    omega = np.maximum(np.abs(f - g).mean((1, 2, 3), keepdims=True), 1e-5)
    d = f - s
    # The other form of the equation, which the function does not compute.
    terms = ((1 - alpha) * d**2 + d * (s - g)) / omega
    size = ((1 + alpha) * d**2 + np.abs(d * (s - g))) / omega
    factor = factors(None)
    assert loss.shape == ()
    assert_close(loss, (factor * sum_dims(terms)).sum(), (factor * sum_dims(size)).sum())
    factor = factor.reshape(-1, 1, 1, 1) / omega
    size = (factor * (np.abs(f - g) + np.abs(d) * (1 + 2 * alpha))).max()
    assert_close(x.grad, -factor * d, size)
    assert_close(teacher.grad, factor * ((f - g) + d - 2 * alpha * d), size)
    assert_close(score.grad, factor * (2 * alpha * d - (f - g)), size)


def test_score_distillation_if_teacher_and_generator_agree():
    x, _, score = leaves(3)
    loss = score_distillation_loss(x, x.detach().clone(), score, 1.0)
    loss.backward()
    d = double(x) - double(score)
    assert_close(loss, -sum_dims(d**2).mean() / 1e-5)


def test_regression_loss():
    forget, cover = leaves(2)
    loss = regression_loss(forget, cover)
    loss.backward()
    error = double(forget) - double(cover)
    factor = factors(None)
    assert_close(loss, (factor * sum_dims(error**2)).sum())
    assert_close(forget.grad, 2 * error * factor.reshape(-1, 1, 1, 1))
    assert cover.grad is None


@pytest.mark.parametrize("cover", [False, True], ids=["distill", "forget"])
def test_generator_loss_by_the_chain_rule(cover):
    """L_distill and L_forget of affine networks: every gradient by hand, through x_t as well as directly."""
    schedule = NoiseSchedule.linear()
    generator = OneStepGenerator(schedule, 440)
    theta, phi, psi = AffineNetwork(), AffineNetwork(), AffineNetwork()
    for network in (phi, psi):
        network.requires_grad_(False)
    z, eps = torch.randn(2, 3, 1, 2, 2)
    labels, t, alpha = torch.tensor([0, 2, 0]), torch.tensor([50, 300, 700]), 1.2
    teacher_labels = (labels + 1) % 4 if cover else labels
    x_g = generator(theta, z, labels)
    x_g.retain_grad()
    x_t = schedule.add_noise(x_g, eps, t)
    x0_phi = schedule.predict_x0(x_t, predict(phi, schedule, x_t, t, teacher_labels), t)
    x0_psi = schedule.predict_x0(x_t, predict(psi, schedule, x_t, t, labels), t)
    score_distillation_loss(x_g, x0_phi, x0_psi, alpha).backward()

    a_i, b_i, a, b = (double(v) for s in (440, t) for v in (schedule.signal(s), schedule.noise(s)))
    x_init = b_i * double(z)
    w, v = theta.parts(labels)
    g = (x_init - b_i * (w * x_init + v + theta.s * 440)) / a_i
    noised = a * g + b * double(eps)

    def x0(network, labels):
        w, v = network.parts(labels)
        slope = (1 - b * w) / a
        return slope * noised - b / a * (v + network.s * double(t).reshape(-1, 1, 1, 1)), slope

    (f, f_slope), (s, s_slope) = x0(phi, teacher_labels), x0(psi, labels)
    omega = np.abs(f - g).mean((1, 2, 3), keepdims=True)
    d = f - s
    # dL/dg: the direct part, and f and s through x_t = a g + b eps.
    parts = [-d, ((f - g) + d - 2 * alpha * d) * f_slope * a, (2 * alpha * d - (f - g)) * s_slope * a]
    grad_g = sum(parts) / omega / 3
    size = sum(np.abs(part) for part in parts) / omega / 3
    dg_dw, dg_dv = -b_i * x_init / a_i, -b_i / a_i
    # x0 is divided by a, which is only 0.08 at t = 700, and multiplied by it again: this amplifies rounding errors.
    wide = 1000
    assert_close(x_g.grad, grad_g, size, factor=wide)
    # No part is negligible: a gradient that stops at the teacher's or the score network's output fails this test.
    for part in parts:
        assert (np.abs(part) / omega / 3 > 0.01 * size).any()
    assert_close(theta.w.grad, (grad_g * dg_dw).sum(), np.abs(size * dg_dw).sum(), factor=wide)
    by_class = np.zeros((4, 1))
    for i, label in enumerate(labels.tolist()):
        by_class[label] += (grad_g[i] * dg_dv[0]).sum()
    assert_close(theta.class_embedding.weight.grad, by_class, np.abs(size * dg_dv).sum(), factor=wide)
    for network in (phi, psi):
        assert all(parameter.grad is None for parameter in network.parameters())


def test_pseudo_score_loss_reaches_psi_only():
    schedule = NoiseSchedule.linear()
    theta, psi = AffineNetwork(), AffineNetwork()
    z, eps = torch.randn(2, 3, 1, 2, 2)
    labels, t = torch.tensor([0, 2, 1]), torch.tensor([50, 300, 700])
    x_g = OneStepGenerator(schedule, 440)(theta, z, labels).detach()
    x_t = schedule.add_noise(x_g, eps, t)
    prediction_loss(eps, predict(psi, schedule, x_t, t, labels)).backward()
    w, v = psi.parts(labels)
    error = double(eps) - (w * double(x_t) + v + psi.s * double(t).reshape(-1, 1, 1, 1))
    terms = -2 * error * double(x_t) / 3
    assert_close(psi.w.grad, terms.sum(), np.abs(terms).sum())
    assert theta.w.grad is None and theta.class_embedding.weight.grad is None


def test_bad_arguments():
    x = torch.randn(3, 1, 2, 2)
    for name, call in {
        "prediction": lambda: prediction_loss(x, x[:1]),
        "x0_score": lambda: score_distillation_loss(x, x, x[..., :1], 1.0),
        "x0_teacher": lambda: score_distillation_loss(x, x[:2], x, 1.0),
        "x_cover": lambda: regression_loss(x, x[:, :, 0]),
        "weights": lambda: prediction_loss(x, x, torch.ones(2)),
        "target": lambda: prediction_loss(torch.randn(3), torch.randn(3)),
        "x_forget": lambda: regression_loss(x[:0], x[:0]),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name} has shape"):
            call()
    with pytest.raises(TypeError, match=r"prediction is torch\.int64"):
        prediction_loss(x, x.long())
    with pytest.raises(TypeError, match="weights is float"):
        prediction_loss(x, x, 1.0)
