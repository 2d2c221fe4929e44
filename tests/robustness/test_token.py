"""A learned word: where it stands in prompts, its gradient, and what stays as it is."""

import copy

import pytest
import torch

from pecker_fast.diffusion import PromptTable
from pecker_fast.models import StableDiffusion
from pecker_fast.models.loaded import read_stable_diffusion
from pecker_fast.robustness.token import WORD, LearnedTable, LearnedToken
from tests.diffusion.tiny_sd import write_stable_diffusion
from tests.diffusion.tiny_sdxl import write_sdxl

WRITERS = {"1.x": write_stable_diffusion, "xl": write_sdxl}


@pytest.fixture(scope="module", params=WRITERS)
def parts(request, tmp_path_factory) -> StableDiffusion:
    return read_stable_diffusion(WRITERS[request.param](tmp_path_factory.mktemp("model") / "model"))


def tensors(conditioning) -> list[torch.Tensor]:
    return [value for _, value in conditioning.items()]


def test_a_word_that_starts_as_another_is_encoded_as_it(parts):
    """ "man" is a single token of the tokenizer, so the prompts must be the same."""
    expected, _ = parts.encode(["a photo of man on man", "dog"])
    encoders = parts.load_encoders()
    LearnedToken(encoders, "man")
    for one, other in zip(
        tensors(parts.embed(encoders, [f"a photo of {WORD} on {WORD}", "dog"])), tensors(expected), strict=True
    ):
        torch.testing.assert_close(one, other)
    # Prompts without the word are not touched by what it is.
    token = LearnedToken(fresh := parts.load_encoders(), "dog")
    with torch.no_grad():
        for vector in token.parameters():
            vector.add_(1)
    torch.testing.assert_close(tensors(parts.embed(fresh, ["a photo of man on man"]))[0], tensors(expected)[0][:1])


def test_the_gradient_is_that_of_the_word_alone(parts):
    """Against central differences in float64."""
    encoders = [(tokenizer, encoder.double()) for tokenizer, encoder in parts.load_encoders()]
    before = copy.deepcopy([encoder.state_dict() for _, encoder in encoders])
    token = LearnedToken(encoders, "man")
    prompts = [f"{WORD} and a dog", f"a {WORD}"]

    def value() -> torch.Tensor:
        return sum((0.1 * rows.cos() + rows.square()).sum() for rows in tensors(parts.embed(encoders, prompts)))

    value().backward()
    for (_, encoder), state in zip(encoders, before, strict=True):
        assert all(param.grad is None for param in encoder.parameters())
        assert all(torch.equal(now, state[name]) for name, now in encoder.state_dict().items())
    for vector in token.parameters():
        assert vector.dtype is torch.float64
        for entry in (0, len(vector) - 1):
            values = []
            with torch.no_grad():
                for change in (1e-5, -1e-5):
                    vector[entry] += change
                    values.append(value().item())
                    vector[entry] -= change
            assert vector.grad[entry].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_a_table_encodes_the_word_in_every_call(parts):
    texts = ["", "a man", f"a {WORD}", f"{WORD} in the sun"]
    encoders = parts.load_encoders()
    conditioning, _ = parts.encode(texts)
    network = parts.network(conditioning)
    token = LearnedToken(encoders, "dog")
    table = LearnedTable(network.table, {2: texts[2], 3: texts[3]}, lambda prompts: parts.embed(encoders, prompts))
    settled = table.settled()
    rows = table[torch.tensor([3, 2, 3])]
    for (name, value), (_, fixed) in zip(rows.items(), settled[torch.tensor([3, 2, 3])].items(), strict=True):
        torch.testing.assert_close(value, fixed, msg=name)
    # Other prompts and sizes are those of the whole table.
    others = torch.tensor([0, 1])
    for (_, now), (_, was) in zip(settled[others].items(), network.table[others].items(), strict=True):
        assert torch.equal(now, was)
    assert rows.keywords().keys() == network.table[torch.tensor([1])].keywords().keys()
    with torch.no_grad():
        next(iter(token.parameters())).add_(1)
    assert not torch.equal(table[torch.tensor([2])].embeddings, settled[torch.tensor([2])].embeddings)
    assert isinstance(settled, PromptTable) and table.null_label == 0 and len(table) == 4
    with pytest.raises(KeyError):
        table[torch.tensor([1])]


def test_an_initial_word_without_a_token(parts):
    with pytest.raises(ValueError, match="initial_word is ''"):
        LearnedToken(parts.load_encoders(), "")
