"""What a text-conditional network is told about each prompt: one or several tensors, which travel together."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_int

# The keyword argument with the embeddings of the tokens, which every model has.
EMBEDDINGS = "encoder_hidden_states"
# Pooled embedding and size conditions of SDXL.
POOLED, TIME_IDS = "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"
# Larger tables stay on the CPU, and only the batch's rows are copied to the GPU.
MAX_DEVICE_BYTES = 2 << 30


class Conditioning:
    """Tensors about N prompts, which are saved, indexed, cast and moved as one.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Keyword argument of the network to a tensor (N, ...). The name of an argument that is a dictionary is followed
        by a dot and the key: "added_cond_kwargs.text_embeds". ``encoder_hidden_states``, floating (N, tokens, width),
        is required.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are missing or have another shape or dtype, or the tensors are not about the same number of
        prompts.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        embeddings = tensors.get(EMBEDDINGS)
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            raise TypeError("embeddings is not a floating tensor")
        if embeddings.ndim != 3 or len(embeddings) == 0:
            raise ValueError(f"embeddings has shape {tuple(embeddings.shape)}, expected (N, tokens, width) with N >= 1")
        for name, value in tensors.items():
            if len(value) != len(embeddings):
                raise ValueError(f"{name} is about {len(value)} prompts, expected {len(embeddings)}")
        self.tensors = dict(tensors)

    @classmethod
    def of(cls, value: "Conditioning | Tensor") -> "Conditioning":
        """``value`` itself, or embeddings (N, tokens, width) alone."""
        return value if isinstance(value, Conditioning) else cls({EMBEDDINGS: value})

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def embeddings(self) -> Tensor:
        """Embeddings of the tokens, floating (N, tokens, width)."""
        return self.tensors[EMBEDDINGS]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self.tensors.values())

    def __getitem__(self, rows: Any) -> "Conditioning":
        """The prompts at ``rows``: a slice, a list, or an integer tensor on the tensors' device."""
        return Conditioning({name: value[rows] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """The same on another device, floating tensors in another dtype. Integers, such as sizes, stay exact."""
        return Conditioning(
            {
                name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
                for name, value in self.tensors.items()
            }
        )

    def detached(self) -> "Conditioning":
        """The same without gradients."""
        return Conditioning({name: value.detach() for name, value in self.tensors.items()})

    def __or__(self, tensors: Mapping[str, Tensor]) -> "Conditioning":
        """The same with further tensors."""
        return Conditioning({**self.tensors, **tensors})

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors."""
        return iter(self.tensors.items())

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the network."""
        arguments: dict[str, Any] = {}
        for name, value in self.tensors.items():
            argument, _, key = name.partition(".")
            if key:
                arguments.setdefault(argument, {})[key] = value
            else:
                arguments[argument] = value
        return arguments


class PromptTable:
    """The conditioning of prompts, by label. Copies of a network share one table.

    Parameters
    ----------
    conditioning : Conditioning or Tensor
        Row i for prompt i; a tensor is the embeddings alone.
    null_label : int or None
        Label of the empty prompt, which means "no condition"; None if the table does not have it.

    Raises
    ------
    ValueError, TypeError
        As by ``Conditioning``, or if ``null_label`` is out of range.
    """

    def __init__(self, conditioning: Conditioning | Tensor, null_label: int | None = 0) -> None:
        self.conditioning = Conditioning.of(conditioning).detached()
        if null_label is not None:
            check_int("null_label", null_label, 0, len(self.conditioning))
        self.null_label = null_label

    def __len__(self) -> int:
        return len(self.conditioning)

    def __deepcopy__(self, _memo: dict) -> "PromptTable":
        return self

    @property
    def embeddings(self) -> Tensor:
        """Embeddings of all prompts' tokens, floating (N, tokens, width)."""
        return self.conditioning.embeddings

    def to(self, device: torch.device) -> None:
        """Move the table in place, unless it is too large for a GPU."""
        if device.type == "cpu" or self.conditioning.nbytes <= MAX_DEVICE_BYTES:
            self.conditioning = self.conditioning.to(device)

    def __getitem__(self, labels: Tensor) -> Conditioning:
        """Return the conditioning of labels (B,), on the labels' device."""
        return self.conditioning[labels.to(self.embeddings.device)].to(labels.device)
