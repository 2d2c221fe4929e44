"""FID, sFID, Inception score, KID, precision and recall of images in memory, by torch-fidelity.

All of its arguments are set explicitly, because public code often gets them wrong: generated images are the first
input and real ones the second (otherwise precision and recall are swapped); images are shuffled (the Inception score is
a mean over consecutive parts, which must not have one class each); all pixels have the same scale, in RGB; precision
and recall use the same extractor as the other figures.
"""

import hashlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..archives import load_mapping
from ..hashing import file_sha256

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# Of that file, which pytorch-fid has too, as pt_inception-2015-12-05-6726825d.pth.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# Images in each part of the Inception score, as in the papers.
SCORE_PART = 5000
NEIGHBOURS = 3


def to_uint8(images: Tensor) -> Tensor:
    """Convert floating (N, C, H, W) in [-1, 1] to uint8 (N, 3, H, W), with one scale for all images.

    Grey images get three equal channels, and values outside [-1, 1] are clamped.

    Raises
    ------
    TypeError, ValueError
        If the type or shape is another, or an entry is not finite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError("images is not a floating point tensor")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (N, C, H, W) with 1 or 3 channels")
    if not images.isfinite().all():
        raise ValueError("images has entries that are not finite: the generator has diverged")
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1)


class Uint8Images(torch.utils.data.Dataset):
    """Images as a data set for torch-fidelity.

    Parameters
    ----------
    images : Tensor or callable
        A uint8 tensor (N, 3, H, W), or a function from an index to one image (3, H, W).
    count : int, optional
        N; required for a function.
    """

    def __init__(self, images: Tensor | Callable[[int], Tensor], count: int | None = None) -> None:
        self.images = images
        self.count = len(images) if isinstance(images, Tensor) else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index] if isinstance(self.images, Tensor) else self.images(index)


def check_inception_weights(path: str | Path | None) -> Path:
    """Return the path of Inception's weights.

    Those of another file than ``INCEPTION_FILE`` are loaded once, and a line on stderr says that they are unverified.

    Raises
    ------
    ValueError
        If the file does not exist or has no weights of FID's Inception; the message names the file to download.
    """
    if path is None or not Path(path).is_file():
        state = "is not given" if path is None else f"is {str(path)!r}, no such file"
        raise ValueError(f"inception_weights {state}: {_EXPECTED}")
    path = Path(path)
    if not is_known_inception(path):
        _check_unknown_inception(path)
        print(
            f"pecker-fast: inception_weights {path} are unverified: {_EXPECTED}; figures by other weights compare with "
            "no paper",
            file=sys.stderr,
        )
    return path


_EXPECTED = f"expected {INCEPTION_FILE} from torch-fidelity's release v0.2.0"


def is_known_inception(path: Path) -> bool:
    """Whether a file is the published one, ``INCEPTION_FILE``."""
    return file_sha256(path) == INCEPTION_SHA256


def _check_unknown_inception(path: Path) -> None:
    """Raise ValueError unless the weights fit FID's Inception. torch-fidelity would run code in the file."""
    try:
        weights = load_mapping(path)
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise ValueError("it has weights that are inf or NaN")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        # Said when it is used.
        return
    except ValueError as error:
        raise ValueError(f"inception_weights is {str(path)!r}: {error}: {_EXPECTED}") from error
    try:
        FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:
        # load_state_dict has a line for each parameter.
        raise ValueError(
            f"inception_weights is {str(path)!r}: it has the weights of another network: {_EXPECTED}"
        ) from error


def image_quality(
    generated: Uint8Images,
    real: Uint8Images,
    *,
    feature_extractor: str = INCEPTION,
    weights: str | Path | None = None,
    seed: int = 2020,
    batch_size: int = 64,
    cuda: bool = False,
    cache: Path | None = None,
    verbose: bool = False,
    everything: Uint8Images | None = None,
) -> dict[str, Any]:
    """Measure generated images against real ones.

    Parameters
    ----------
    generated, real : Uint8Images
        At least four images each.
    feature_extractor : str
        FID's Inception, or another extractor that is registered with torch-fidelity.
    weights : str or Path, optional
        File of the extractor's weights. Inception needs it; nothing is downloaded.
    seed : int
        Seed of the shuffling and of KID's subsets.
    batch_size : int
        Images in a call of the extractor.
    cuda : bool
        Whether to compute on the GPU.
    cache : Path, optional
        Folder for Inception's features, keyed by the content of images and weights: the features of the same images are
        not computed again, also after an interruption.
    verbose : bool
        Whether torch-fidelity prints its progress with Inception.
    everything : Uint8Images, optional
        All images of the model, those requested as a forgotten class among them. Measured with Inception alone.

    Returns
    -------
    dict
        With Inception "fid", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall" (k = 3), and with
        ``everything`` "u_fid", its Fréchet distance from the real images. With another
        extractor "extractor_frechet_distance", "extractor_kernel_distance", "extractor_kernel_distance_std",
        "extractor_precision", "extractor_recall" instead. Always "protocol": settings and versions.

    Raises
    ------
    ValueError
        If there are too few images, or the weights are missing.
    ImportError
        If torch-fidelity is not installed.
    """
    for name, images in (("generated", generated), ("real", real)):
        if len(images) <= NEIGHBOURS:
            raise ValueError(f"{name} has {len(images)} images, expected more than {NEIGHBOURS}")
    inception = feature_extractor == INCEPTION
    path = check_inception_weights(weights) if inception else weights
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError("FID needs torch-fidelity: pip install 'pecker-fast[eval]'") from error
    options = {
        "feature_extractor": feature_extractor,
        "samples_shuffle": True,
        "isc_splits": max(1, len(generated) // SCORE_PART),
        "kid_subset_size": min(1000, len(generated), len(real)),
        "prc_neighborhood": NEIGHBOURS,
        "rng_seed": seed,
        "batch_size": batch_size,
        # Precision and recall compute distances in blocks, and no process copies the images.
        "save_cpu_ram": True,
    }
    protocol = {
        **options,
        "generated_images": len(generated),
        "real_images": len(real),
        "input1": "generated",
        "input2": "real",
        "pixels": "uint8, round((x + 1) 127.5), RGB",
        "torch_fidelity": version("torch-fidelity"),
        "torch": torch.__version__,
    }
    # It would print distances in other features as if they were in Inception's.
    arguments = {**options, "input1": generated, "input2": real, "verbose": verbose and inception}
    arguments |= {"cuda": cuda, "cache": False}
    if path is not None:
        arguments["feature_extractor_weights_path"] = str(path)
        protocol["weights_sha256"] = file_sha256(path)
        if inception:
            verified = protocol["weights_sha256"] == INCEPTION_SHA256
            protocol["weights"] = f"{INCEPTION_FILE}, verified" if verified else "unverified: another file"
    if cache is not None and inception:
        key = f"{protocol['weights_sha256'][:16]}-{protocol['torch_fidelity']}"
        arguments |= {"cache": True, "cache_root": str(cache)}
        arguments |= {f"input{i}_cache_name": f"{_content_hash(x)}-{key}" for i, x in ((1, generated), (2, real))}
    metrics = torch_fidelity.calculate_metrics(**arguments, isc=inception, fid=True, kid=True, prc=True)
    result = {
        "fid": metrics["frechet_inception_distance"],
        "kid": metrics["kernel_inception_distance_mean"],
        "kid_std": metrics["kernel_inception_distance_std"],
        "precision": metrics["precision"],
        "recall": metrics["recall"],
    }
    half = max(len(generated), len(real)) // 2
    if options["kid_subset_size"] > half:
        # Subsets that are nearly the whole do not spread.
        protocol["kid_std_subset_size"] = half
        halves = torch_fidelity.calculate_metrics(**{**arguments, "kid_subset_size": half}, kid=True)
        result["kid_std"] = halves["kernel_inception_distance_std"]
    if inception:
        from .extractors import SPATIAL

        # A call of torch-fidelity computes the Fréchet distance of one layer only.
        spatial = torch_fidelity.calculate_metrics(**{**arguments, "feature_extractor": SPATIAL}, fid=True)
        result["sfid"] = spatial["frechet_inception_distance"]
        result |= {"is": metrics["inception_score_mean"], "is_std": metrics["inception_score_std"]}
        if everything is not None:
            whole = {**arguments, "input1": everything}
            if cache is not None:
                whole["input1_cache_name"] = f"{_content_hash(everything)}-{key}"
            result["u_fid"] = torch_fidelity.calculate_metrics(**whole, fid=True)["frechet_inception_distance"]
            protocol["u_fid_images"] = len(everything)
        protocol["resize"] = "to 299 x 299, bilinear as TensorFlow 1 has it, then (x - 128) / 128"
        protocol["sfid_feature_extractor"] = f"{SPATIAL}: first 7 channels of mixed_6/conv, 17 x 17 places"
    else:
        names = {"fid": "frechet_distance", "kid": "kernel_distance", "kid_std": "kernel_distance_std"}
        result = {f"extractor_{names.get(name, name)}": value for name, value in result.items()}
    return {name: float(value) for name, value in result.items()} | {"protocol": protocol}


def _content_hash(images: Uint8Images) -> str:
    """Hash the pixels in order, shortened for a file name."""
    digest = hashlib.sha256(f"{len(images)} {tuple(images[0].shape)}".encode())
    for i in range(len(images)):
        digest.update(images[i].contiguous().numpy())
    return digest.hexdigest()[:16]
