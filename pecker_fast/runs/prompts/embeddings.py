"""The text embeddings of a run's prompts, which are computed once and saved in its folder."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ...files import save_tensors
from ...models import StableDiffusion

EMBEDDINGS = "prompts.safetensors"


def embed_prompts(
    model: StableDiffusion, prompts: Sequence[str], folder: Path, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Read the embeddings of prompts from a run's folder, or compute them and save them there.

    Parameters
    ----------
    model : StableDiffusion
        Whose text encoder computes them.
    prompts : sequence of str
        N texts.
    folder : Path
        Of the run. Embeddings in it of other prompts, or by another text encoder, are replaced.
    device, dtype
        Where they are computed, and what they are stored as.

    Returns
    -------
    Tensor
        Shape (N, tokens, width), of ``dtype``, on the CPU.
    """
    path = folder / EMBEDDINGS
    digest = hashlib.sha256(json.dumps([list(prompts), str(dtype)]).encode())
    for text_encoder in model.text_encoder_hashes():
        digest.update(text_encoder.encode())
    key = digest.hexdigest()
    try:
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("embeddings")
    except (OSError, safetensors.SafetensorError):
        pass
    embeddings, cut = model.encode(prompts, device, dtype)
    if cut:
        print(
            f"pecker-fast: {len(cut)} prompts are longer than the text encoder takes, such as {cut[0]!r}; they are cut",
            file=sys.stderr,
        )
    save_tensors(path, {"embeddings": embeddings.contiguous()}, {"key": key})
    return embeddings
