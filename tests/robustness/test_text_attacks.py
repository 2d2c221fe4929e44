"""Attacks on a tiny text-to-image model whose judge looks at the mean of its latents."""

import copy
from dataclasses import replace

import pytest
import torch

from pecker_fast.diffusion import Sampler
from pecker_fast.models.loaded import read_stable_diffusion
from pecker_fast.robustness import WORD, TextAdversary, TextExaminer, TextRelearnOptions, attack_text, text_attacks_on
from tests.diffusion.tiny_sd import LATENTS, SIZE, write_stable_diffusion
from tests.diffusion.tiny_sdxl import write_sdxl

TEXTS = ("", "a photo of man", "a dog", f"a photo of {WORD}")
ONE = Sampler("one_step", t_init=625, batch_size=8)
DDIM = Sampler("ddim", num_inference_steps=4, guidance_scale=2.0, batch_size=8)


def judge(latents, rows):
    return {"ua": 100 * (latents.float().mean((1, 2, 3)) < 1).double().mean().item()}


def judge_near(latents, rows):
    return {"near_mean": latents.float().mean().item()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return read_stable_diffusion(write_stable_diffusion(tmp_path_factory.mktemp("sd") / "model"))


class Case:
    """A model with its prompts, and an adversary with two images that are bright everywhere."""

    def __init__(self, parts, sampler: Sampler) -> None:
        self.parts = parts
        conditioning, _ = parts.encode(TEXTS)
        self.network = parts.network(conditioning)
        self.examiner = TextExaminer(
            parts.schedule, sampler, DDIM, [1] * 6, [2] * 2, lambda latents: latents, judge, judge_near, seed=3
        )
        latents = 2 + 0.1 * torch.randn(2, LATENTS, SIZE, SIZE)
        one = torch.ones(2, dtype=torch.int64)
        self.adversary = TextAdversary(latents, one, {3: TEXTS[3]}, 3 * one, [3] * 6, "dog")

    def attack(self, name: str, options: TextRelearnOptions, **more):
        arguments = (self.network, self.examiner, self.adversary, name, options)
        return attack_text(*arguments, self.parts.load_encoders, self.parts.embed, **more)


def options(**changes) -> TextRelearnOptions:
    values = {"images": 2, "steps": (1, 30), "learning_rate": 3e-3, "inversion_steps": (1, 2), "batch_size": 1}
    return TextRelearnOptions(**{**values, **changes})


@pytest.mark.parametrize("name", ["regression", "matching"])
def test_fine_tuning_brings_the_concept_back(parts, name):
    case, ticks, shown = Case(parts, ONE), [], []
    show = lambda step, sampler, images: shown.append((step, sampler.name, images))  # noqa: E731
    rows = case.attack(name, options(), tick=lambda: ticks.append(1), shown=show)
    assert [(row["step"], row["images"], row["sampler"]) for row in rows] == [
        (0, 0, "one step at 625"), (1, 2, "one step at 625"), (30, 60, "one step at 625"),
    ]  # fmt: skip
    assert rows[0]["ua"] == 100 and rows[-1]["ua"] == 0 and rows[-1]["loss"] < rows[1]["loss"] and len(ticks) == 30
    assert rows[0]["loss"] is None and all(row["attack"] == name and "near_mean" in row for row in rows)
    assert [part[0] for part in shown] == [0, 1, 30] and all(len(part[2]) == 6 for part in shown)


def test_denoising_is_measured_by_ddim_too(parts):
    case = Case(parts, ONE)
    rows = case.attack("denoising", options(steps=(2,)))
    assert [(row["step"], row["sampler"]) for row in rows] == [
        (step, sampler.name) for step in (0, 2) for sampler in (ONE, DDIM)
    ]
    case = Case(parts, DDIM)
    assert [row["sampler"] for row in case.attack("denoising", options(steps=(1,)))] == [DDIM.name] * 2


@pytest.mark.parametrize("sampler", [ONE, DDIM], ids=["one_step", "ddim"])
def test_inversion_changes_no_weight(parts, sampler):
    case = Case(parts, sampler)
    before = copy.deepcopy(case.network.state_dict())
    rows = case.attack("inversion", options(inversion_steps=(1, 25), embedding_learning_rate=0.05))
    assert all(torch.equal(value, before[name]) for name, value in case.network.state_dict().items())
    # Before the first step the word is the one that it starts from.
    conditioning, _ = parts.encode(["a photo of dog"])
    case.network.table.conditioning.embeddings[3] = conditioning.embeddings[0]
    assert rows[0]["ua"] == case.examiner.measure(case.network, sampler, [3] * 6)[0]["ua"]
    assert [row["step"] for row in rows] == [0, 1, 25] and rows[2]["near_mean"] == rows[0]["near_mean"]
    if sampler is ONE:
        # The same noise in every step, so the loss is a curve.
        assert rows[2]["loss"] < rows[1]["loss"]


def test_the_size_of_batches_changes_no_gradient(parts, monkeypatch):
    """Of a loss without noise, since parts draw noise of their own."""

    def loss(network, examiner, images, labels, streams):
        return (network(images, torch.full((len(images),), 10), labels)[0] - images).square().flatten(1).sum(1).mean()

    grads: list[torch.Tensor] = []
    monkeypatch.setattr("pecker_fast.robustness.text.attack_loss", lambda *_: loss)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: grads.extend(p.grad.clone() for p in params_of(self)))
    case = Case(parts, DDIM)
    case.network.double()
    latents = case.adversary.latents.double()
    latents[1] *= 3
    case.adversary = replace(case.adversary, latents=latents)
    for size in (1, 2):
        case.attack("denoising", options(steps=(1,), batch_size=size))
    half = len(grads) // 2
    assert half > 50
    for one, two in zip(grads[:half], grads[half:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def params_of(optimizer) -> list:
    return [param for group in optimizer.param_groups for param in group["params"]]


def test_only_what_is_chosen_is_trained(parts):
    case = Case(parts, ONE)
    before = copy.deepcopy(case.network.state_dict())
    case.attack("regression", options(steps=(1,), trained="x"))
    moved = {name for name, value in case.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(".attn2." in name for name in moved)


def test_sdxl(tmp_path):
    """Both text encoders learn, and the pooled embedding follows."""
    parts = read_stable_diffusion(write_sdxl(tmp_path / "model"))
    case = Case(parts, Sampler("one_step", t_init=999, batch_size=8))
    rows = case.attack("inversion", options(inversion_steps=(2, 20), embedding_learning_rate=0.05))
    assert rows[2]["loss"] < rows[1]["loss"]
    pooled = case.network.table.conditioning.tensors["added_cond_kwargs.text_embeds"]
    assert not torch.equal(pooled[3], parts.encode(["a photo of dog"])[0].tensors["added_cond_kwargs.text_embeds"][0])
    rows = case.attack("regression", options(steps=(1,)))
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("sampler", "name", "changes", "message"),
    [
        (DDIM, "matching", {}, "needs a one-step generator"),
        (ONE, "latent", {}, "attacks is 'latent'"),
        (ONE, "denoising", {"trained": "y"}, "trained is 'y'"),
        (ONE, "denoising", {"batch_size": 0}, "batch_size is 0"),
        (ONE, "inversion", {"inversion_steps": (2, 2)}, "inversion_steps is"),
        (ONE, "inversion", {"steps": ()}, "relearn_steps is empty"),
    ],
)
def test_wrong_options(parts, sampler, name, changes, message):
    with pytest.raises(ValueError, match=message):
        Case(parts, sampler).attack(name, options(**changes))
    assert text_attacks_on(DDIM) == ("denoising", "inversion")
