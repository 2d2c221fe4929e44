import pytest
import torch
from pecker_fast.benchmarks.studies import patch_runs

from pecker_fast.models import resolve


@pytest.fixture(autouse=True)
def flags_may_be_set():
    """Once a test has imported torch.testing._internal, it forbids setting global flags in this process."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield


@pytest.fixture
def few_samples(monkeypatch):
    """The masks of the study's runs are estimated from two samples of each kind, unless a condition says how many."""
    monkeypatch.setattr(patch_runs, "CHUNKS", 2)


@pytest.fixture
def small(few_samples, monkeypatch, tmp_path):
    """Runs of two iterations from the pretrained network, and the command's options for them."""
    options = {"max_train_steps": 2, "train_batch_size": 2, "forget_batch_size": 2}
    monkeypatch.setattr(patch_runs, "COMMON", options)
    monkeypatch.setattr(patch_runs, "SAMPLES_PER_CLASS", 3)
    state = resolve(None, shipped="digits").network.state_dict()
    monkeypatch.setattr(patch_runs, "distilled", lambda preset, folder: dict.fromkeys(patch_runs.KINDS, state))
    patch_runs._start.cache_clear()
    yield ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "--places", "digits:0-1"]
    patch_runs._start.cache_clear()
