"""One-step generators of text-to-image models as they are published: which there are, and how each of them draws."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .ldm_names import PREFIX
from .offline import read_config
from .pickled import read_pickle, state_of
from .stable_diffusion import FILES, Prediction
from .unet_files import build_unet
from .weight_files import find_weight_files

# Suffixes of files with the weights of a U-Net.
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")


@dataclass(frozen=True)
class OneStep:
    """How a U-Net draws in one step.

    Parameters
    ----------
    t_init : int
        Timestep at which it is fed noise.
    prediction : Prediction
        What it predicts, and of which input.
    """

    t_init: int
    prediction: Prediction


@dataclass(frozen=True)
class KnownGenerator:
    """A published one-step generator.

    Parameters
    ----------
    title : str
        Its name.
    pattern : str
        Regular expression for the name of its file or folder, or its name on the hub, in lower case with hyphens.
    relatives : str
        The same for files of its family that are made for several steps.
    one_step : OneStep
        How it draws.
    pixels : int
        Size of the images that it was trained for.
    licence : str
        Licence of its weights, as its page states it.
    page : str
        Where it is published.
    """

    title: str
    pattern: str
    one_step: OneStep
    pixels: int
    licence: str
    page: str
    relatives: str = field(default="(?!)", repr=False)

    def __str__(self) -> str:
        prediction = self.one_step.prediction
        noise = ", noise of variance 1" if prediction.unit_noise else ""
        predicts = {"epsilon": "the noise", "sample": "x_0", "v_prediction": "v"}[prediction.prediction_type]
        return (
            f"{self.title}: one step at timestep {self.one_step.t_init}{noise}; predicts {predicts}; "
            f"{self.pixels} pixels; licence {self.licence} ({self.page})"
        )


KNOWN: dict[str, KnownGenerator] = {
    # Euler's first step with trailing timesteps: x = sigma z / sqrt(sigma^2 + 1) = b z at 999.
    "sdxl-turbo": KnownGenerator(
        "SDXL-Turbo",
        r"sdxl-turbo|sd-xl-turbo",
        OneStep(999, Prediction()),
        512,
        "Stability AI non-commercial (sai-nc-community)",
        "huggingface.co/stabilityai/sdxl-turbo",
    ),
    "sdxl-lightning": KnownGenerator(
        "SDXL-Lightning, 1 step",
        r"sdxl-lightning-1step",
        OneStep(999, Prediction("sample")),
        1024,
        "CreativeML Open RAIL++-M (openrail++)",
        "huggingface.co/ByteDance/SDXL-Lightning",
        relatives=r"sdxl-lightning-\d+step",
    ),
    "dmd2": KnownGenerator(
        "DMD2 of SDXL, 1 step",
        r"dmd2-sdxl-1step",
        OneStep(399, Prediction(unit_noise=True)),
        1024,
        "CC BY-NC 4.0 (cc-by-nc-4.0)",
        "huggingface.co/tianweiy/DMD2",
        relatives=r"dmd2-sdxl-\d+step",
    ),
}
# Ways to say how a generator draws: by its record or its name, as a known one, or as the pretrained model.
AUTO, PLAIN = "auto", "plain"


def known_generator(path: str | os.PathLike) -> str | None:
    """The key in ``KNOWN`` of a file, folder or name on the hub, by its name; None if it is none of them.

    ValueError if it is the file of a generator for several steps.
    """
    # A snapshot of the hub is called by its commit, three levels below the model's name.
    parts = [re.sub(r"[_.]", "-", part.lower()) for part in Path(path).parts[-4:]]
    for key, known in KNOWN.items():
        if any(re.search(known.pattern, part) for part in parts):
            return key
        if any(re.search(known.relatives, part) for part in parts[-1:]):
            raise ValueError(
                f"{path} is made for several steps, expected a generator of one step such as {known.title}"
            )
    return None


def recorded_one_step(path: str | os.PathLike) -> OneStep | None:
    """How the one-step pipeline in a folder draws, as its own files say; None if it is none.

    ``path`` is its folder, or that of its U-Net.
    """
    for folder in (Path(path), Path(path).parent):
        try:
            index = read_config(folder / "model_index.json")
            scheduler = read_config(folder / "scheduler" / FILES["scheduler"])
            kind = scheduler.get("prediction_type", "epsilon")
            return OneStep(int(index["t_init"]), Prediction(kind, bool(index.get("unit_noise", False))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def one_step_of(path: str | os.PathLike, kind: str = AUTO) -> OneStep | None:
    """How a one-step generator draws.

    Parameters
    ----------
    path : str or PathLike
        A file, a folder, or a name on the hub.
    kind : str
        "auto": as its folder records it, otherwise by its name; "plain": None; or a key of ``KNOWN``.

    Returns
    -------
    OneStep or None
        None: as the pretrained model predicts, at a timestep that nothing records.

    Raises
    ------
    ValueError
        If there is no such kind, or it is made for several steps.
    """
    if kind not in (AUTO, PLAIN, *KNOWN):
        raise ValueError(f"generator_kind is {kind!r}, expected one of {', '.join([AUTO, PLAIN, *KNOWN])}")
    if kind == PLAIN:
        return None
    if kind == AUTO:
        recorded = recorded_one_step(path)
        if recorded is not None:
            return recorded
        key = known_generator(path)
        return None if key is None else KNOWN[key].one_step
    return KNOWN[kind].one_step


def read_unet_file(path: str | os.PathLike, config: Mapping[str, Any]) -> nn.Module:
    """Read a U-Net from one file: safetensors, or a file of torch.save, of which no code is run.

    Parameters
    ----------
    path : str or PathLike
        The file. Its weights have the names of diffusers, or of the original Stable Diffusion code.
    config : mapping
        Configuration of the U-Net, as diffusers has it, which the file does not say.

    Returns
    -------
    UNet2DConditionModel
        float32 on the CPU in eval mode.

    Raises
    ------
    ValueError
        If it cannot be read, or its weights do not fit the configuration.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        (files,) = find_weight_files(path)
        state: dict[str, Tensor] = files.weights
    else:
        state = state_of(read_pickle(path))
    if any(name.startswith(PREFIX) for name in state):
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        # Without the autoencoder and the text encoders of a whole checkpoint.
        state = convert_ldm_unet_checkpoint(
            {name: value for name, value in state.items() if name.startswith(PREFIX)}, dict(config)
        )
    return build_unet(dict(config), {name: value.float() for name, value in state.items()}, str(path))
