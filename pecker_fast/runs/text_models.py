"""Stable Diffusion on the command line: found in a folder or on the hub, prompts encoded once, samples drawn."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..diffusion import TextConditioned, sample_ddim
from ..files import save_tensors
from ..hashing import file_sha256
from ..models import StableDiffusion, load_text_unet
from ..report import save_before_after, save_grid
from ..unlearning import Method
from .options import CHECKPOINTS, HUB_NAME, fetch_from_hub

HUB_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/*",
)
HUB_WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
EMBEDDINGS = "prompts.safetensors"
# Pictures show images of at most this height.
SHOWN_PIXELS = 128


def load_stable_diffusion(path: str | None) -> tuple[StableDiffusion, str]:
    """The model, and where it came from: a folder or a name on the hub. ValueError where there is none."""
    if path is None:
        raise ValueError(
            "pretrained_model_name_or_path is not given: expected the folder of a Stable Diffusion 1.x or 2.x, or its "
            "name on the hub, such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    try:
        if Path(path).is_dir():
            return StableDiffusion(Path(path)), str(path)
        if not Path(path).exists() and HUB_NAME.fullmatch(path) and Path(path).suffix not in CHECKPOINTS:
            root = fetch_from_hub(path, HUB_FILES)
            # Before the weights are fetched, which are some gigabytes.
            StableDiffusion(root)
            # A snapshot's folder is named by its commit: nothing is mixed where the model changes meanwhile.
            return StableDiffusion(fetch_from_hub(path, HUB_WEIGHTS, root.name)), f"hub:{path}"
        raise ValueError("there is no such folder")
    except ValueError as error:
        raise ValueError(f"pretrained_model_name_or_path is {str(path)!r}: {error}") from error


def load_initial_unet(name: str, path: str | None) -> nn.Module | None:
    """The U-Net to start from that the argument ``name`` gives: a folder, or its ``unet``. ValueError otherwise."""
    if path is None:
        return None
    try:
        folder = Path(path)
        return load_text_unet(folder / "unet" if (folder / "unet").is_dir() else folder)
    except ValueError as error:
        raise ValueError(f"{name} is {path!r}: {error}") from error


def encoded(
    model: StableDiffusion, prompts: Sequence[str], folder: Path, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Text embeddings of ``prompts``, of ``dtype`` on the CPU: read from the run's folder, or computed and kept there.

    What is there is of the same prompts and the same text encoder, or it is computed anew.
    """
    path = folder / EMBEDDINGS
    digest = hashlib.sha256(json.dumps([list(prompts), str(dtype)]).encode())
    for file in sorted((model.folder / "text_encoder").glob("*.safetensors")):
        digest.update(file_sha256(file).encode())
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


class TextPictures:
    """Samples of fixed prompts and noise, in pictures: of the pretrained model once, and of the run as it goes on.

    The VAE is in memory only while a picture is made.

    Parameters
    ----------
    model: whose VAE decodes.
    method: of the run.
    prompts, labels: what is drawn, and its labels in the network's table; the first ``forgotten`` are framed.
    per_prompt: images of each.
    folder: where pictures go.
    """

    def __init__(
        self,
        model: StableDiffusion,
        method: Method,
        prompts: Sequence[str],
        labels: Sequence[int],
        forgotten: int,
        per_prompt: int,
        folder: Path,
    ) -> None:
        self.model, self.method, self.folder = model, method, folder
        self.prompts, self.framed = tuple(prompts), range(forgotten)
        self.labels = torch.tensor(labels).repeat_interleave(per_prompt)
        self.rows = torch.arange(len(prompts)).repeat_interleave(per_prompt)

    def _images(self, latents: Tensor) -> Tensor:
        images = self.model.decode(latents, self.method.setting.compute.device, batch_size=1)
        factor = max(1, images.shape[-1] // SHOWN_PIXELS)
        return nn.functional.avg_pool2d(images, factor) if factor > 1 else images

    def before(self, guidance_scale: float, steps: int) -> Tensor:
        """Images of the pretrained model, by DDIM, which are kept in before.png."""
        problem, compute = self.method.setting.problem, self.method.setting.compute
        with compute.autocast():
            latents = sample_ddim(
                problem.teacher,
                problem.schedule,
                self.labels,
                steps,
                batch_size=1,
                seed=compute.seed,
                guidance_scale=guidance_scale,
                clip_sample=False,
            )
        images = self._images(latents)
        self._save("before", images)
        return images

    def after(self, network: nn.Module, name: str = "after") -> Tensor:
        """Images of a network of the run, which are kept under ``name``."""
        seed = self.method.setting.compute.seed
        images = self._images(self.method.sample(network, self.labels, seed=seed, batch_size=1))
        self._save(name, images)
        return images

    def both(self, before: Tensor, after: Tensor) -> None:
        """before_after.png."""
        place = self.folder / "before_after.png"
        save_before_after(place, before, after, self.rows, self._names, highlight=self.framed)

    @property
    def _names(self) -> list[str]:
        return [str(i + 1) for i in range(len(self.prompts))]

    def _save(self, name: str, images: Tensor) -> None:
        save_grid(self.folder / f"{name}.png", images, self.rows, self._names, highlight=self.framed)


def on_network(model: StableDiffusion, unet: nn.Module | None, network: TextConditioned) -> TextConditioned | None:
    """``unet`` with the prompts of ``network``, None where there is none."""
    if unet is None:
        return None
    return TextConditioned(
        unet, network.table, network.schedule, network.prediction_type, network.config["sample_size"]
    )
