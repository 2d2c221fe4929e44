"""What a run's networks are told about its prompts, which is computed once and saved in its folder."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch

from ...diffusion import Conditioning
from ...diffusion.conditioning import EMBEDDINGS
from ...files import save_tensors
from ...models import StableDiffusion

FILE = "prompts.safetensors"
# Name of a tensor to that in the file, if it is another.
NAMES = {EMBEDDINGS: "embeddings"}


def embed_prompts(
    model: StableDiffusion, prompts: Sequence[str], folder: Path, device: torch.device, dtype: torch.dtype
) -> Conditioning:
    """Read the conditioning of prompts from a run's folder, or compute it and save it there.

    Parameters
    ----------
    model : StableDiffusion
        Whose text encoders compute it.
    prompts : sequence of str
        N texts.
    folder : Path
        Of the run. What is in it of other prompts, or by another text encoder, is replaced.
    device, dtype
        Where it is computed, and what it is stored as.

    Returns
    -------
    Conditioning
        Of N prompts, of ``dtype``, on the CPU.
    """
    path = folder / FILE
    digest = hashlib.sha256(json.dumps([list(prompts), str(dtype)]).encode())
    for text_encoder in model.text_encoder_hashes():
        digest.update(text_encoder.encode())
    key = digest.hexdigest()
    try:
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                names = {value: name for name, value in NAMES.items()}
                return Conditioning({names.get(name, name): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        pass
    conditioning, cut = model.encode(prompts, device, dtype)
    if cut:
        print(
            f"pecker-fast: {len(cut)} prompts are longer than the text encoder takes, such as {cut[0]!r}; they are cut",
            file=sys.stderr,
        )
    tensors = {NAMES.get(name, name): value.contiguous() for name, value in conditioning.items()}
    save_tensors(path, tensors, {"key": key})
    return conditioning
