"""FID, sFID, Inception score, KID, precision and recall, by torch-fidelity, on images in memory.

Its arguments are set one by one here, since the public code of the field goes wrong in each: generated images come
first and real ones second (precision and recall change places otherwise); all are shuffled (the Inception score is a
mean over consecutive parts, which must not be one class each); pixels are mapped by one scale for all images, in RGB;
the extractor of precision and recall is that of the rest.
"""

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hashing import file_sha256

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# Images in each part of the Inception score, as the papers take them.
SCORE_PART = 5000
NEIGHBOURS = 3


def to_uint8(images: Tensor) -> Tensor:
    """float (N, C, H, W) in [-1, 1] to uint8 (N, 3, H, W): one scale for all images, grey as three equal channels.

    Values outside are cut off. Raises TypeError or ValueError for another type or shape, and for NaN.
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
    """Images as torch-fidelity takes them.

    Parameters
    ----------
    images: a uint8 tensor (N, 3, H, W), or a function from an index to one image (3, H, W).
    count: N, where ``images`` is a function.
    """

    def __init__(self, images: Tensor | Callable[[int], Tensor], count: int | None = None) -> None:
        self.images = images
        self.count = len(images) if isinstance(images, Tensor) else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index] if isinstance(self.images, Tensor) else self.images(index)


def check_inception_weights(path: str | Path | None) -> Path:
    """The file of Inception's weights. ValueError, saying which file is meant, where it is not there."""
    if path is None or not Path(path).is_file():
        given = "is not given" if path is None else f"is {str(path)!r}, no such file"
        raise ValueError(
            f"inception_weights {given}: expected {INCEPTION_FILE}, which torch-fidelity's release v0.2.0 has"
        )
    return Path(path)


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
) -> dict[str, Any]:
    """Measures generated images against real ones.

    Parameters
    ----------
    generated, real: at least four images each.
    feature_extractor: Inception of FID, or another one that is registered with torch-fidelity.
    weights: file of the extractor's weights; Inception needs it, nothing is downloaded.
    seed: of the shuffling and of KID's subsets.
    cache: folder in which Inception's features are kept, by the images' and the weights' content: the same images are
        not gone through twice, nor those that were done before an interruption. None: nothing is kept.

    Returns
    -------
    With Inception "fid", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall" (k = 3). With another
    extractor none of these names: "extractor_frechet_distance", "extractor_kernel_distance",
    "extractor_kernel_distance_std", "extractor_precision", "extractor_recall".
    Always "protocol": what was done, with versions.

    Raises ValueError for too few images or missing weights, ImportError where torch-fidelity is not installed.
    """
    for name, images in (("generated", generated), ("real", real)):
        if len(images) <= NEIGHBOURS:
            raise ValueError(f"{name} has {len(images)} images, expected more than {NEIGHBOURS}")
    inception = feature_extractor == INCEPTION
    path = check_inception_weights(weights) if inception else weights
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError("FID needs torch-fidelity: pip install 'pecker-fast[demo]'") from error
    options = {
        "feature_extractor": feature_extractor,
        "samples_shuffle": True,
        "isc_splits": max(1, len(generated) // SCORE_PART),
        "kid_subset_size": min(1000, len(generated), len(real)),
        "prc_neighborhood": NEIGHBOURS,
        "rng_seed": seed,
        "batch_size": batch_size,
        # Distances for precision and recall block by block, and no processes that copy the images.
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
    given = {**options, "input1": generated, "input2": real, "cuda": cuda, "verbose": verbose, "cache": False}
    if path is not None:
        given["feature_extractor_weights_path"] = str(path)
        protocol["weights_sha256"] = file_sha256(path)
    if cache is not None and inception:
        by = f"{protocol['weights_sha256'][:16]}-{protocol['torch_fidelity']}"
        given |= {"cache": True, "cache_root": str(cache)}
        given |= {f"input{i}_cache_name": f"{_content_hash(x)}-{by}" for i, x in ((1, generated), (2, real))}
    found = torch_fidelity.calculate_metrics(**given, isc=inception, fid=True, kid=True, prc=True)
    measured = {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "kid_std": found["kernel_inception_distance_std"],
        "precision": found["precision"],
        "recall": found["recall"],
    }
    if inception:
        from .extractors import SPATIAL

        # torch-fidelity takes one layer for Fréchet distances in a call.
        spatial = torch_fidelity.calculate_metrics(**{**given, "feature_extractor": SPATIAL}, fid=True)
        measured["sfid"] = spatial["frechet_inception_distance"]
        measured |= {"is": found["inception_score_mean"], "is_std": found["inception_score_std"]}
        protocol["resize"] = "to 299 x 299, bilinear as TensorFlow 1 has it, then (x - 128) / 128"
        protocol["sfid_feature_extractor"] = f"{SPATIAL}: first 7 channels of mixed_6/conv, 17 x 17 places"
    else:
        names = {"fid": "frechet_distance", "kid": "kernel_distance", "kid_std": "kernel_distance_std"}
        measured = {f"extractor_{names.get(name, name)}": value for name, value in measured.items()}
    return {name: float(value) for name, value in measured.items()} | {"protocol": protocol}


def _content_hash(images: Uint8Images) -> str:
    """Of the pixels and their order, shortened: part of a file's name."""
    digest = hashlib.sha256(f"{len(images)} {tuple(images[0].shape)}".encode())
    for i in range(len(images)):
        digest.update(images[i].contiguous().numpy())
    return digest.hexdigest()[:16]
