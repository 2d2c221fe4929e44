"""Each attack's loss against numpy, what it trains, and that it restores a forgotten class."""

import copy

import numpy as np
import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule, OneStepGenerator
from pecker_fast.robustness import ATTACKS, EMBEDDING, RelearnOptions, attacks_on, relearn
from pecker_fast.robustness.relearn import matching_loss
from pecker_fast.unlearning.streams import Streams
from tests.robustness.toy import SHAPE, T_INIT, affine, examiner, generated


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(count, *SHAPE).uniform_(-1, 1), torch.randint(3, (count,))


def first_loss(network, attack: str, images, labels, t_init=T_INIT, **options) -> float:
    rows = relearn(network, examiner(t_init), images, labels, attack, RelearnOptions(steps=(1,), **options))
    assert rows[0]["loss"] is None and rows[0]["step"] == 0
    return rows[-1]["loss"]


def test_regression_uses_fixed_latents():
    network, (images, labels) = affine(0.4, (0.3, -0.2, 0.1)), batch()
    z = Streams(torch.device("cpu"), 3, "relearn").normal("regression z", len(images), SHAPE)
    expected = np.square(generated(network, z, labels) - images.double().numpy()).sum((1, 2, 3)).mean()
    for attack in ("regression", "inversion"):
        assert first_loss(network, attack, images, labels) == pytest.approx(expected, rel=1e-5)
    # With the same latents in every step, the loss decreases monotonically.
    rows = relearn(network, examiner(), images, labels, "regression", RelearnOptions(steps=(1, 2, 3, 4, 200)))
    losses = [row["loss"] for row in rows[1:]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_matching_takes_the_nearest_sample():
    network, (images, labels) = affine(0.1, (0.3, -0.2, 0.1)), batch(5)
    pool = torch.randn(5, 6, *SHAPE)
    one_step = OneStepGenerator(NoiseSchedule.linear(50), T_INIT)
    samples = np.stack([generated(network, pool[i], labels[i].expand(6)) for i in range(5)])
    distances = np.square(samples - images.double().numpy()[:, None]).sum((2, 3, 4))
    loss = matching_loss(network, one_step, images, labels, pool)
    assert loss.item() == pytest.approx(distances.min(1).mean(), rel=1e-5)
    assert distances.min(1).mean() < distances.mean() - 1e-3
    loss.backward()
    assert network.w.grad.abs() > 0


def test_denoising_uses_the_loss_of_diffusion_models():
    network, (images, labels) = affine(0.4, (0.3, -0.2, 0.1)), batch()
    streams = Streams(torch.device("cpu"), 3, "relearn", 1)
    t = streams.timesteps("denoising t", 4, 0, 49)
    eps = streams.normal("denoising eps", 4, SHAPE).double().numpy()
    alpha = np.cumprod(1 - np.linspace(1e-4, 2e-2, 50))[t.numpy()].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(alpha) * images.double().numpy() + np.sqrt(1 - alpha) * eps
    w, v = network.parts(labels)
    expected = np.square(eps - w * x_t - v).sum((1, 2, 3)).mean()
    assert first_loss(network, "denoising", images, labels) == pytest.approx(expected, rel=1e-5)
    assert first_loss(network, "denoising", images, labels, t_init=None) == pytest.approx(expected, rel=1e-5)
    assert first_loss(network, "inversion", images, labels, t_init=None) == pytest.approx(expected, rel=1e-5)


class Spy:
    """An examiner that stores copies of the networks that it measures."""

    def __init__(self, t_init=T_INIT) -> None:
        self.real, self.seen = examiner(t_init), []
        self.sampler, self.seed = self.real.sampler, self.real.seed
        self.schedule, self.by_ddim = self.real.schedule, self.real.by_ddim

    def measure(self, network, sampler):
        self.seen.append((sampler.name, copy.deepcopy(network.state_dict())))
        return self.real.measure(network, sampler)


@pytest.mark.parametrize("attack", ATTACKS)
def test_which_parameters_change(attack):
    network, (images, labels) = affine(0.4, (0.3, -0.2, 0.1)), batch()
    before, spy, ticks = copy.deepcopy(network.state_dict()), Spy(), []
    options = RelearnOptions(steps=(2, 5), learning_rate=1e-2, starts=1)
    rows = relearn(network, spy, images, labels, attack, options, lambda: ticks.append(1))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert len(ticks) == 5
    names = ["one step at 25", "DDIM, 5 steps"] if attack == "denoising" else ["one step at 25"]
    assert [(row["step"], row["sampler"]) for row in rows] == [(step, name) for step in (0, 2, 5) for name in names]
    last = spy.seen[-1][1]
    assert torch.equal(last["w"], before["w"]) == (attack in EMBEDDING)
    assert not torch.equal(last["class_embedding.weight"], before["class_embedding.weight"])
    untouched = [c for c in range(3) if c not in labels]
    assert torch.equal(last["class_embedding.weight"][untouched], before["class_embedding.weight"][untouched])
    assert [row["images"] for row in rows[:: len(names)]] == [0, 2 * len(images), 5 * len(images)]
    assert rows == relearn(network, examiner(), images, labels, attack, options)


def test_inversion_takes_the_best_of_random_starts():
    network, labels = affine(0.9, (-2.0, 0.0, -2.0)), torch.zeros(6, dtype=torch.int64)
    dark, spy, ticks = torch.full((6, *SHAPE), -0.7), Spy(), []
    options = RelearnOptions(steps=(1, 3), embedding_learning_rate=0.5, starts=4)
    rows = relearn(network, spy, dark, labels, "inversion_random", options, lambda: ticks.append(1))
    assert len(ticks) == 4 * 3 == options.work("inversion_random") and options.work("inversion") == 3
    assert [row["step"] for row in rows] == [0, 1, 3] and [row["images"] for row in rows] == [0, 24, 72]
    # Four curves of three measurements: other starts each, all other weights those of the network.
    starts = [spy.seen[3 * i][1]["class_embedding.weight"] for i in range(4)]
    table = network.class_embedding.weight.detach()
    assert len({start[0].item() for start in starts}) == 4
    assert all(torch.equal(start[1:], table[1:]) and start[0] != table[0] for start in starts)
    assert all(torch.equal(state["w"], network.w) for _, state in spy.seen)
    for place, row in enumerate(rows):
        uas = []
        for start in range(4):
            measured = affine(0.9, (0.0, 0.0, 0.0)).requires_grad_(False)
            measured.load_state_dict(spy.seen[3 * start + place][1])
            uas.append(examiner().measure(measured)["ua"])
        assert row["ua"] == min(uas) == uas[row["start"]], (uas, row)
    # The normal numbers of the starts have the scale of the table.
    many = RelearnOptions(steps=(1,), starts=200)
    spy = Spy()
    relearn(network, spy, dark, labels, "inversion_random", many)
    values = torch.stack([state["class_embedding.weight"][0, 0] for _, state in spy.seen[::2]])
    assert abs(values.mean() - table.mean()) < 0.3 * table.std() and values.std() / table.std() == pytest.approx(
        1, abs=0.2
    )


def test_images_of_the_class_restore_it_and_others_do_not():
    # Class 0 should be dark, but the network draws it bright like class 2.
    forgotten, bright_labels = affine(0.9, (-2.0, 0.0, -2.0)), torch.full((6,), 2)
    dark, bright = torch.full((6, *SHAPE), -0.7), torch.full((6, *SHAPE), 0.7)
    options = RelearnOptions(steps=(1, 150), learning_rate=3e-2, embedding_learning_rate=3e-2)
    for attack in ("regression", "matching", "inversion"):
        rows = relearn(forgotten, examiner(), dark, torch.zeros(6, dtype=torch.int64), attack, options)
        assert [row["ua"] for row in rows][:1] == [100] and rows[-1]["ua"] < 20, (attack, rows)
    rows = relearn(forgotten, examiner(), bright, bright_labels, "regression", options)
    assert [row["ua"] for row in rows] == [100, 100, 100]


def test_applicable_attacks():
    one_step, many_steps = examiner().sampler, examiner(None).sampler
    assert attacks_on(one_step, "forgotten") == ATTACKS
    assert attacks_on(one_step, "retained") == ("regression", "matching", "denoising")
    assert attacks_on(many_steps, "forgotten") == ("denoising", *EMBEDDING)
    assert attacks_on(many_steps, "retained") == ("denoising",)
    assert attacks_on(one_step, "retained", ("inversion", "denoising")) == ("denoising",)
    images, labels = batch()
    with pytest.raises(ValueError, match="'matching', which needs a one-step generator"):
        attacks_on(many_steps, "forgotten", ("denoising", "matching"))
    with pytest.raises(ValueError, match="'regression', which needs"):
        relearn(affine(), examiner(None), images, labels, "regression", RelearnOptions())
    with pytest.raises(ValueError, match="attack is 'fine-tuning', expected one of regression"):
        relearn(affine(), examiner(), images, labels, "fine-tuning", RelearnOptions())
    for changes, name in (
        ({"images": 0}, "relearn_images"),
        ({"steps": ()}, "relearn_steps is empty"),
        ({"steps": (5, 2)}, "ascending"),
        ({"steps": (0, 2)}, "relearn_steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"embedding_learning_rate": -1.0}, "embedding_learning_rate"),
        ({"pool": 0}, "pool"),
        ({"starts": 0}, "inversion_starts"),
    ):
        with pytest.raises(ValueError, match=name):
            RelearnOptions(**changes).check()
