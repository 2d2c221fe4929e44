"""Relabelling the forgotten classes when training has ended: an option of the one-step methods."""

import pytest
import torch

from pecker_fast.unlearning.distil import DistilOptions
from pecker_fast.unlearning.setting import Placement
from pecker_fast.unlearning.sfd import SFD, SFDOptions
from tests.diffusion.tiny_sd import tiny_text_network
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits
from tests.unlearning.test_methods import build
from tests.unlearning.test_prompts import make_text

STEPS = 2
OPTIONS = {"max_train_steps": STEPS, "train_batch_size": 4, "forget_batch_size": 2, "ema_decay": 0.5}
PATCH = {"density": 0.3, "saliency_chunks": 2}


@pytest.fixture(scope="module")
def teacher():
    return tiny_unet()


def trained(teacher, name: str, steps: int = STEPS, **options):
    """The last phase of a method after some iterations."""
    extra = PATCH if name == "patch" else {}
    phase = build(name, teacher=teacher, **{**OPTIONS, **extra, **options}).phases[-1]
    phase.start(None)
    for iteration in range(steps):
        phase.step(iteration)
    return phase


def state(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("name", ["sfd", "pecker", "patch"])
def test_the_result_differs_in_the_rows_of_the_forgotten_classes_only(teacher, name):
    phase, plain = trained(teacher, name, relabel=True), trained(teacher, name)
    request = phase.setting.problem.request
    forgotten, cover = list(request.forget_classes), request.cover_class
    live = state(phase.generator)
    with phase.averaged() as network:
        result = state(network)
    with plain.averaged() as network:
        expected = state(network)
    rows = expected["class_embedding.weight"]
    assert not same_bits(rows[forgotten[0]], rows[cover])
    rows[forgotten] = rows[cover].clone()
    for key, value in expected.items():
        assert same_bits(result[key], value), key
    # What is trained is as it was.
    for key, value in state(phase.generator).items():
        assert same_bits(value, live[key]), key


def test_classes_are_relabelled_when_training_has_ended_and_not_before(teacher):
    phase = trained(teacher, "sfd", STEPS - 1, relabel=True)
    request = phase.setting.problem.request
    with phase.averaged() as network:
        table = network.class_embedding.weight
        assert not same_bits(table[request.forget_classes[0]], table[request.cover_class])
    phase.step(STEPS - 1)
    with phase.averaged() as network:
        table = network.class_embedding.weight
        assert same_bits(table[request.forget_classes[0]], table[request.cover_class])


@pytest.mark.parametrize("done", [STEPS - 1, STEPS])
def test_a_resumed_run_has_the_same_result(teacher, done):
    whole, part = trained(teacher, "patch", relabel=True), trained(teacher, "patch", done, relabel=True)
    resumed = trained(teacher, "patch", 0, relabel=True)
    resumed.load_state_dict(part.state_dict())
    for iteration in range(done, STEPS):
        resumed.step(iteration)
    with whole.averaged() as network:
        expected = state(network)
    with resumed.averaged() as network:
        for key, value in state(network).items():
            assert same_bits(value, expected[key]), key


def test_what_has_no_row_is_refused():
    with pytest.raises(ValueError, match="relabel is true, but the request has prompts"):
        make_text("sfd", tiny_text_network(), relabel=True)
    with pytest.raises(ValueError, match="relabel is true, expected false: distil forgets nothing"):
        DistilOptions(relabel=True).check()
    with pytest.raises(ValueError, match="fsdp is set, and so is relabel"):
        Placement(fsdp=True).check_method(SFD, SFDOptions(relabel=True), processes=2, compile=False)
