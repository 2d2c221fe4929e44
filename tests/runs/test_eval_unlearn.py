"""A model as a technique of eval-unlearn: what its runner calls, and how it finds it."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pecker_fast.runs.eval_unlearn import PeckerFastTechnique
from pecker_fast.runs.prompts.sampling import PromptSampler, SamplerOptions, read_model
from tests.diffusion.tiny_sd import SIZE, write_stable_diffusion


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_stable_diffusion(tmp_path_factory.mktemp("sd") / "model"))


def test_images_are_those_of_evaluate_concept(model):
    prompts = ["a dog", "a man", "a dog"]
    config = {"model_id": model, "device": "cpu", "num_inference_steps": 2, "batch_size": 2, "erase_concept": "nudity"}
    technique = PeckerFastTechnique(**config)
    images = technique.generate(prompts=prompts, seed=5)
    assert [image.size for image in images] == [(2 * SIZE, 2 * SIZE)] * 3
    sampler = PromptSampler(read_model(model), SamplerOptions("ddim", num_inference_steps=2), prompts)
    expected = sampler.drawing(prompts)(torch.tensor([[0, 5], [1, 6], [2, 7]]))
    drawn = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    assert (drawn.int() - expected.int()).abs().max() <= 1
    # The same prompt with other noise.
    assert not torch.equal(drawn[0], drawn[2]) and technique.erase_concept == "nudity"
    assert technique.generate(["a dog"], seed=5)[0].tobytes() == images[0].tobytes()
    assert len(technique.generate([], seed=1)) == 0 and len(technique.generate(["a dog"])) == 1


def test_wrong_options(model):
    with pytest.raises(ValueError, match="t_init is not given"):
        PeckerFastTechnique(model_id=model, sampler="one_step")
    with pytest.raises(ValueError, match="model is '/no/such'"):
        PeckerFastTechnique(model_id="/no/such")
    with pytest.raises(TypeError, match="lora"):
        PeckerFastTechnique(model_id=model, lora="x")


def test_it_is_named_where_the_benchmarks_look():
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    for group in ("eval_unlearn.techniques", "eval_learn.techniques"):
        named = re.search(rf'entry-points\."{re.escape(group)}"\]\npecker_fast = "([\w.]+):(\w+)"', project)
        assert getattr(importlib.import_module(named[1]), named[2]) is PeckerFastTechnique
