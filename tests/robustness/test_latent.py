"""Latent search: hits, misses, its gradient, and confirmation by the nearest real image."""

import numpy as np
import pytest
import torch

from pecker_fast.data import LabelledImages
from pecker_fast.diffusion import NoiseSchedule, ddim_through, sample_ddim
from pecker_fast.robustness import LatentOptions, NearestImage, latent, search_steps
from pecker_fast.robustness.latent import log_probability, on_sphere, search
from tests.robustness.toy import SHAPE, T_INIT, affine, examiner, generated


def reference() -> NearestImage:
    images = torch.tensor([-0.7, 0.0, 0.7]).repeat(4).view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
    return NearestImage(LabelledImages(images, torch.arange(3).repeat(4), ("dark", "grey", "bright")))


def test_on_sphere_keeps_directions_and_sets_the_norm():
    z = torch.randn(5, 2, 3, 4) * torch.rand(5, 1, 1, 1)
    scaled = on_sphere(z)
    norms = np.linalg.norm(scaled.numpy().reshape(5, -1), axis=1)
    np.testing.assert_allclose(norms, np.sqrt(24), rtol=1e-6)
    np.testing.assert_allclose((scaled / z).std(dim=(1, 2, 3)), 0, atol=1e-5)


def test_probability_and_its_gradient():
    network, subject = affine(0.4, (0.3, -0.2, 0.1)), examiner()
    z, labels, targets = torch.randn(6, *SHAPE).requires_grad_(), torch.randint(3, (6,)), torch.randint(3, (6,))

    def by_hand(z: torch.Tensor) -> np.ndarray:
        mean = np.clip(generated(network, z, labels), -1, 1).mean((1, 2, 3))[:, None]
        logits = -20 * np.square(mean - np.array([[-0.7, 0.0, 0.7]]))
        return (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(6), targets]

    value = log_probability(network, subject, z, targets, labels)
    np.testing.assert_allclose(value.detach().numpy(), by_hand(z.detach()), atol=1e-4)
    (grad,) = torch.autograd.grad(value.sum(), z)
    # An entry that is not clamped, by finite differences.
    inside = np.argwhere(np.abs(generated(network, z.detach(), labels)) < 0.9)
    i = tuple(inside[len(inside) // 2])
    step = torch.zeros_like(z)
    step[i] = 1e-3
    numeric = (by_hand(z.detach() + step) - by_hand(z.detach() - step)).sum() / 2e-3
    assert grad[i].item() == pytest.approx(numeric, rel=1e-2, abs=1e-4)
    # The gradient passes through clamped entries.
    bright = affine(0.4, (-9.0, -9.0, -9.0))
    grad = torch.autograd.grad(log_probability(bright, subject, z, torch.zeros(6).long(), labels).sum(), z)[0]
    assert (grad != 0).all()


def test_searches_succeed_independently_of_each_other():
    network, subject, options = affine(0.0, (0.0, 0.0, 0.0)), examiner(), LatentOptions(steps=60, learning_rate=0.2)
    z = on_sphere(torch.randn(10, *SHAPE))
    targets, labels = torch.zeros(10, dtype=torch.int64), torch.randint(3, (10,))
    ticks = []
    end = search(network, subject, z, targets, labels, options, lambda: ticks.append(1))
    before, after = (log_probability(network, subject, x, targets, labels) for x in (z, end))
    assert (after > before).all()
    # In batches of 7, and below one by one.
    assert len(ticks) == 2 * 60
    alone = torch.cat(
        [search(network, subject, z[i : i + 1], targets[:1], labels[i : i + 1], options) for i in range(10)]
    )
    torch.testing.assert_close(end, alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(end.flatten(1).norm(dim=1), 4, rtol=1e-5)


def test_rows():
    subject, options = examiner(), LatentOptions(latents=5, steps=30, learning_rate=0.2)
    network = affine(0.0, (0.0, 0.0, 0.0))
    network.w.requires_grad_(True)
    ticks = []
    rows = latent(network, subject, reference(), options, lambda: ticks.append(1))
    assert network.w.requires_grad and network.w.grad is None
    assert len(ticks) == search_steps(subject, options)
    assert {row["group"]: row["searches"] for row in rows} == {
        "forgotten by its label": 5,
        "forgotten by retained labels": 2,
        "retained by its label": 2,
        "retained by another label": 2,
    }
    by_group = {row["group"]: row for row in rows}
    own, others = by_group["forgotten by its label"], by_group["forgotten by retained labels"]
    # All labels are equivalent here, so all searches from the first latent have the same result.
    alone = latent(network, subject, reference(), LatentOptions(latents=1, steps=30, learning_rate=0.2))[0]
    for key in own.keys() - {"group", "searches"}:
        assert alone[key] == pytest.approx(others[key], rel=1e-4), key
    assert own["probability"] > own["probability_before"] and own["found"] >= own["found_before"]
    # This network ignores z, because 1 - w b = 0.
    b = NoiseSchedule.linear(50).noise(T_INIT).item()
    rows = latent(affine(1 / b, (-2.0, 0.0, -2.0)), subject, reference(), options)
    by_group = {row["group"]: row for row in rows}
    assert by_group["forgotten by its label"]["found"] == 0
    assert by_group["forgotten by its label"]["probability"] < 0.01
    retained = by_group["retained by its label"]
    assert retained["found"] == retained["found_before"] == retained["confirmed"] == 100
    assert latent(affine(), subject, reference(), options) == latent(affine(), subject, reference(), options)


def test_nearest_image():
    images, labels = torch.empty(40, *SHAPE).uniform_(-1, 1), torch.randint(3, (40,))
    labels[:3] = torch.arange(3)
    nearest = NearestImage(LabelledImages(images, labels, ("a", "b", "c")), per_class=9)
    chosen = np.concatenate([np.flatnonzero(labels.numpy() == c)[:9] for c in range(3)])
    known = images.double().numpy().reshape(40, -1)[chosen]
    queries = torch.empty(7, *SHAPE).uniform_(-1, 1)
    distances = np.linalg.norm(queries.double().numpy().reshape(7, 1, -1) - known[None], axis=2)
    assert nearest(queries).tolist() == labels.numpy()[chosen[distances.argmin(1)]].tolist()
    own = np.linalg.norm(known[:, None] - known[None], axis=2)
    np.fill_diagonal(own, np.inf)
    expected = (labels.numpy()[chosen][own.argmin(1)] == labels.numpy()[chosen]).mean()
    assert nearest.accuracy() == pytest.approx(100 * expected)


def test_gradient_through_ddim():
    network, schedule = affine(0.4, (0.3, -0.2, 0.1)), NoiseSchedule.linear(50)
    labels = torch.tensor([0, 2])
    generator = torch.Generator().manual_seed(5)
    torch.randint(2**32, (), generator=generator)
    z = torch.stack([torch.randn(SHAPE, generator=generator) for _ in labels]).requires_grad_()
    images = ddim_through(network, schedule, z, labels, 6)
    assert torch.equal(images.detach().clamp(-1, 1), sample_ddim(network, schedule, labels, 6, seed=5))
    (grad,) = torch.autograd.grad(images.sum(), z)
    step = 1e-2 * torch.randn_like(z)
    with torch.no_grad():
        ends = [ddim_through(network, schedule, z + sign * step, labels, 6).double().sum().item() for sign in (1, -1)]
    assert (grad * step).sum().item() == pytest.approx((ends[0] - ends[1]) / 2, rel=5e-2, abs=1e-3)


def test_invalid_options():
    for changes, name in (
        ({"latents": 0}, "latents"),
        ({"steps": 0}, "search_steps"),
        ({"learning_rate": -1.0}, "search_learning_rate"),
    ):
        with pytest.raises(ValueError, match=name):
            LatentOptions(**changes).check()
