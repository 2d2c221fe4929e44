"""Concept inversion: a new word whose embedding is learned, so that a frozen model draws what it has forgotten.

Textual inversion (Gal et al., arXiv 2208.01618) as an attack on erased concepts (Pham et al., arXiv 2308.01508): the
text encoders, the U-Net and all other words stay as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import Conditioning, PromptTable

# The new word in prompts.
WORD = "<learned>"

# From N prompts to what the network is told about them, with gradients.
Embed = Callable[[Sequence[str]], Conditioning]


class LearnedToken(nn.Module):
    """The embedding of a new word, one for each text encoder.

    Hooks on the encoders put it in the place of the word in every prompt. The encoders' weights are frozen.

    Parameters
    ----------
    encoders : sequence of pairs
        CLIPTokenizer, to which the word is added, and its text encoder, as ``transformers`` has them.
    initial : str
        Text whose embedding, the mean over its tokens, the word starts from.

    Raises
    ------
    ValueError
        If ``initial`` has no token.
    """

    def __init__(self, encoders: Sequence[tuple[Any, nn.Module]], initial: str) -> None:
        super().__init__()
        self.vectors = nn.ParameterList()
        for tokenizer, encoder in encoders:
            ids = tokenizer(initial, add_special_tokens=False).input_ids
            if not ids:
                raise ValueError(f"initial_word is {initial!r}, which has no token: expected a word")
            encoder.requires_grad_(False)
            table = encoder.get_input_embeddings()
            vector = nn.Parameter(table.weight.detach()[ids].mean(0))
            self.vectors.append(vector)
            tokenizer.add_tokens([WORD])
            _insert(encoder, table, tokenizer.convert_tokens_to_ids(WORD), ids[0], vector)


def _insert(encoder: nn.Module, table: nn.Module, token: int, ordinary: int, vector: Tensor) -> None:
    """Hook ``vector`` in wherever ``token`` stands.

    The encoder is given an ``ordinary`` token there: the new one is not in its table, and has the highest number, which
    older configurations of CLIP take for the end of the text.
    """
    places: list[Tensor] = []

    def replace(_encoder: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        places[:] = [ids == token]
        return (ids.masked_fill(places[0], ordinary), *args[1:])

    def insert(_table: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.where(places[0][..., None], vector.to(output.dtype), output)

    encoder.register_forward_pre_hook(replace)
    table.register_forward_hook(insert)


class LearnedTable:
    """A table of prompts of which those with the new word are encoded in every call, with gradients.

    Parameters
    ----------
    table : PromptTable
        All prompts; what the text encoders do not say, such as sizes, is taken from here.
    texts : mapping of int to str
        Label to text of the prompts with the new word. Other labels cannot be asked for.
    embed : callable
        Encodes them.
    """

    def __init__(self, table: PromptTable, texts: Mapping[int, str], embed: Embed) -> None:
        self.table, self.texts, self.embed = table, dict(texts), embed

    def __len__(self) -> int:
        return len(self.table)

    def __deepcopy__(self, _memo: dict) -> "LearnedTable":
        return self

    @property
    def null_label(self) -> int | None:
        return self.table.null_label

    @property
    def conditioning(self) -> Conditioning:
        return self.table.conditioning

    @property
    def embeddings(self) -> Tensor:
        return self.table.embeddings

    def to(self, device: torch.device) -> None:
        """Move the table in place."""
        self.table.to(device)

    def __getitem__(self, labels: Tensor) -> Conditioning:
        """What the network is told about labels (B,), on the labels' device."""
        numbers = labels.tolist()
        distinct = list(dict.fromkeys(numbers))
        fresh = self.embed([self.texts[number] for number in distinct])
        rows = fresh[[distinct.index(number) for number in numbers]].to(labels.device)
        return self.table[labels] | dict(rows.items())

    @torch.no_grad()
    def settled(self) -> PromptTable:
        """A table with the prompts as they are encoded now."""
        labels = list(self.texts)
        fresh, tensors = self.embed([self.texts[label] for label in labels]), dict(self.conditioning.items())
        for name, rows in fresh.items():
            tensors[name] = tensors[name].clone()
            tensors[name][labels] = rows.to(tensors[name])
        return PromptTable(Conditioning(tensors), self.null_label)
