"""The search finds what is there and nothing where nothing is; its gradient; the second opinion."""

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


def test_latents_stay_where_noise_lies():
    z = torch.randn(5, 2, 3, 4) * torch.rand(5, 1, 1, 1)
    moved = on_sphere(z)
    norms = np.linalg.norm(moved.numpy().reshape(5, -1), axis=1)
    np.testing.assert_allclose(norms, np.sqrt(24), rtol=1e-6)
    np.testing.assert_allclose((moved / z).std(dim=(1, 2, 3)), 0, atol=1e-5)


def test_probability_and_its_gradient():
    network, found = affine(0.4, (0.3, -0.2, 0.1)), examiner()
    z, labels, targets = torch.randn(6, *SHAPE).requires_grad_(), torch.randint(3, (6,)), torch.randint(3, (6,))

    def by_hand(z: torch.Tensor) -> np.ndarray:
        mean = np.clip(generated(network, z, labels), -1, 1).mean((1, 2, 3))[:, None]
        logits = -20 * np.square(mean - np.array([[-0.7, 0.0, 0.7]]))
        return (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(6), targets]

    value = log_probability(network, found, z, targets, labels)
    np.testing.assert_allclose(value.detach().numpy(), by_hand(z.detach()), atol=1e-4)
    (grad,) = torch.autograd.grad(value.sum(), z)
    # Of an entry that is not clamped, by differences.
    inside = np.argwhere(np.abs(generated(network, z.detach(), labels)) < 0.9)
    i = tuple(inside[len(inside) // 2])
    step = torch.zeros_like(z)
    step[i] = 1e-3
    numeric = (by_hand(z.detach() + step) - by_hand(z.detach() - step)).sum() / 2e-3
    assert grad[i].item() == pytest.approx(numeric, rel=1e-2, abs=1e-4)
    # Of one that is clamped it is not lost.
    bright = affine(0.4, (-9.0, -9.0, -9.0))
    grad = torch.autograd.grad(log_probability(bright, found, z, torch.zeros(6).long(), labels).sum(), z)[0]
    assert (grad != 0).all()


def test_search_finds_and_each_latent_for_itself():
    network, found, options = affine(0.0, (0.0, 0.0, 0.0)), examiner(), LatentOptions(steps=60, learning_rate=0.2)
    z = on_sphere(torch.randn(10, *SHAPE))
    targets, labels = torch.zeros(10, dtype=torch.int64), torch.randint(3, (10,))
    ticks = []
    end = search(network, found, z, targets, labels, options, lambda: ticks.append(1))
    before, after = (log_probability(network, found, x, targets, labels) for x in (z, end))
    assert (after > before).all()
    # Batches of 7 here, one by one there.
    assert len(ticks) == 2 * 60
    alone = torch.cat(
        [search(network, found, z[i : i + 1], targets[:1], labels[i : i + 1], options) for i in range(10)]
    )
    torch.testing.assert_close(end, alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(end.flatten(1).norm(dim=1), 4, rtol=1e-5)


def test_rows():
    found, options = examiner(), LatentOptions(latents=3, steps=30, learning_rate=0.2)
    network = affine(0.0, (0.0, 0.0, 0.0))
    network.w.requires_grad_(True)
    ticks = []
    rows = latent(network, found, reference(), options, lambda: ticks.append(1))
    assert network.w.requires_grad and network.w.grad is None
    assert len(ticks) == search_steps(found, options)
    assert {row["group"]: row["searches"] for row in rows} == {
        "forgotten by its label": 3,
        "forgotten by retained labels": 6,
        "retained by its label": 6,
        "retained by another label": 6,
    }
    by_group = {row["group"]: row for row in rows}
    # All labels are alike here: what one finds, all find.
    own, others = by_group["forgotten by its label"], by_group["forgotten by retained labels"]
    for key in own.keys() - {"group", "searches"}:
        assert own[key] == pytest.approx(others[key], rel=1e-4), key
    assert own["probability"] > own["probability_before"] and own["found"] >= own["found_before"]
    # A network that ignores z: 1 - w b = 0.
    b = NoiseSchedule.linear(50).noise(T_INIT).item()
    rows = latent(affine(1 / b, (-2.0, 0.0, -2.0)), found, reference(), options)
    by_group = {row["group"]: row for row in rows}
    assert by_group["forgotten by its label"]["found"] == 0
    assert by_group["forgotten by its label"]["probability"] < 0.01
    kept = by_group["retained by its label"]
    assert kept["found"] == kept["found_before"] == kept["confirmed"] == 100
    assert latent(affine(), found, reference(), options) == latent(affine(), found, reference(), options)


def test_nearest_image():
    images, labels = torch.empty(40, *SHAPE).uniform_(-1, 1), torch.randint(3, (40,))
    labels[:3] = torch.arange(3)
    nearest = NearestImage(LabelledImages(images, labels, ("a", "b", "c")), per_class=9)
    kept = np.concatenate([np.flatnonzero(labels.numpy() == c)[:9] for c in range(3)])
    known = images.double().numpy().reshape(40, -1)[kept]
    asked = torch.empty(7, *SHAPE).uniform_(-1, 1)
    distances = np.linalg.norm(asked.double().numpy().reshape(7, 1, -1) - known[None], axis=2)
    assert nearest(asked).tolist() == labels.numpy()[kept[distances.argmin(1)]].tolist()
    own = np.linalg.norm(known[:, None] - known[None], axis=2)
    np.fill_diagonal(own, np.inf)
    expected = (labels.numpy()[kept][own.argmin(1)] == labels.numpy()[kept]).mean()
    assert nearest.accuracy() == pytest.approx(100 * expected)


def test_through_ddim():
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


def test_wrong_inputs():
    for changes, name in (
        ({"latents": 0}, "latents"),
        ({"steps": 0}, "search_steps"),
        ({"learning_rate": -1.0}, "search_learning_rate"),
    ):
        with pytest.raises(ValueError, match=name):
            LatentOptions(**changes).check()
