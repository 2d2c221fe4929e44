"""Celebrity detectors: find, crop and name the faces in images. The user provides the models; nothing is downloaded.

A celebrity detector has ``labels`` (names) and ``describe()`` (JSON for the protocol). Called with uint8 images
(N, 3, H, W), it returns a list with a float tensor of probabilities (faces, labels) for each image.
"""

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .clip import check_images

# As in the published detector: MTCNN's thresholds, least height of a face, margin around it, size of crops in pixels.
MTCNN_THRESHOLDS, MIN_FACE, MARGIN, CROP = (0.6, 0.7, 0.7), 20, 0.2, 224
SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# Takes a uint8 image (3, H, W) and returns float boxes (faces, 4): left, top, right, bottom in pixels.
FaceFinder = Callable[[Tensor], Tensor]


class CelebrityDetector(Protocol):
    """Names the faces in images."""

    labels: Sequence[str]

    def describe(self) -> dict[str, Any]: ...

    def __call__(self, images: Tensor) -> list[Tensor]: ...


def plain_name(name: str) -> str:
    """Normalise a name for comparisons: lower case, without underscores and text in brackets."""
    return " ".join(re.sub(r"[\[(].*?[\])]", " ", name).replace("_", " ").lower().split())


def label_of(labels: Sequence[str], name: str) -> int | None:
    """Return the index of ``name`` among ``labels``, or None if it is not there."""
    name = plain_name(name)
    return next((i for i, label in enumerate(labels) if plain_name(label) == name), None)


class MTCNNFaces:
    """Finds faces with facenet-pytorch's MTCNN, which includes its weights. ImportError if it is not installed."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from facenet_pytorch import MTCNN
        except ImportError as error:
            raise ImportError(
                f"finding faces needs facenet-pytorch ({error}): pip install --no-deps facenet-pytorch (it "
                "requires an old torch, but works with newer ones), or give another face finder as module:function"
            ) from error
        self.finder = MTCNN(
            keep_all=True, thresholds=list(MTCNN_THRESHOLDS), min_face_size=MIN_FACE, post_process=False, device=device
        )

    def describe(self) -> dict[str, Any]:
        return {
            "name": "facenet-pytorch MTCNN",
            "version": importlib.metadata.version("facenet-pytorch"),
            "thresholds": list(MTCNN_THRESHOLDS),
            "min_face_size": MIN_FACE,
        }

    def __call__(self, image: Tensor) -> Tensor:
        boxes, _ = self.finder.detect(image.permute(1, 2, 0).contiguous().numpy())
        # facenet-pytorch 2.6 returns arrays of Python objects.
        return torch.from_numpy(np.array([] if boxes is None else boxes, dtype=np.float32)).reshape(-1, 4)


def crop_faces(image: Tensor, boxes: Tensor, margin: float = MARGIN, size: int = CROP) -> Tensor:
    """Crop faces from a uint8 image (3, H, W).

    Parameters
    ----------
    image : Tensor
        uint8 (3, H, W).
    boxes : Tensor
        Left, top, right, bottom in pixels, (faces, 4). Boxes outside the image are skipped.
    margin : float
        Total widening of a box as a share of its sides; it ends at the image's border.
    size : int
        Height and width of the crops.

    Returns
    -------
    Tensor
        float32 (faces, 3, size, size) in [0, 1].
    """
    height, width = image.shape[1:]
    crops = []
    for left, top, right, bottom in boxes.double().tolist():
        margin_x, margin_y = (right - left) * margin / 2, (bottom - top) * margin / 2
        x0, y0 = max(0, int(left - margin_x)), max(0, int(top - margin_y))
        x1, y1 = min(width, round(right + margin_x)), min(height, round(bottom + margin_y))
        if x1 <= x0 or y1 <= y0:
            continue
        face = image[None, :, y0:y1, x0:x1].float() / 255
        face = torch.nn.functional.interpolate(face, (size, size), mode="bilinear", align_corners=False, antialias=True)
        crops.append(face.clamp(0, 1))
    return torch.cat(crops) if crops else torch.empty(0, 3, size, size)


class FaceClassifier:
    """A celebrity detector from a face finder and a classifier of faces.

    Calls raise ValueError if the classifier does not return probabilities, one row for each face.

    Parameters
    ----------
    classify : callable
        Takes faces float32 (F, 3, 224, 224), RGB in [0, 1], and returns probabilities (F, labels).
    labels : sequence of str
        Names.
    find : callable
        The face finder.
    description : dict
        Description of the classifier, JSON.
    """

    def __init__(
        self,
        classify: Callable[[Tensor], Tensor],
        labels: Sequence[str],
        find: FaceFinder,
        description: dict[str, Any],
    ) -> None:
        self.classify, self.labels, self.find, self.description = classify, tuple(labels), find, description

    def describe(self) -> dict[str, Any]:
        finder = self.find.describe() if hasattr(self.find, "describe") else {"name": _name_of(self.find)}
        return {**self.description, "labels": len(self.labels), "faces": finder, "margin": MARGIN, "crop": CROP}

    def __call__(self, images: Tensor) -> list[Tensor]:
        check_images(images)
        rows = []
        for image in images.cpu():
            faces = crop_faces(image, torch.as_tensor(self.find(image)).reshape(-1, 4))
            rows.append(self._probabilities(faces) if len(faces) else torch.empty(0, len(self.labels)))
        return rows

    def _probabilities(self, faces: Tensor) -> Tensor:
        with torch.no_grad():
            rows = torch.as_tensor(self.classify(faces)).float().cpu()
        if rows.shape != (len(faces), len(self.labels)):
            raise ValueError(
                f"the celebrity classifier returns {tuple(rows.shape)} for {len(faces)} faces and "
                f"{len(self.labels)} labels, expected ({len(faces)}, {len(self.labels)})"
            )
        sums = rows.sum(1)
        # Written so that NaN fails too.
        if not bool(((rows >= -1e-6) & (rows <= 1 + 1e-6)).all() and ((sums - 1).abs() < 1e-3).all()):
            raise ValueError("the celebrity classifier does not return probabilities: rows in [0, 1] that sum to 1")
        return rows.clamp(0, 1)


def load_celebrity_detector(
    detector: str,
    labels: str | Path | None = None,
    faces: str | None = None,
    device: torch.device | str = "cpu",
) -> CelebrityDetector:
    """Load the user's detector, such as Giphy's public one after conversion.

    Parameters
    ----------
    detector : str
        "module:function", a function without arguments that returns a celebrity detector; or the file of a classifier
        of faces: ONNX (.onnx), a program of torch.export (.pt2), or TorchScript. A classifier takes faces float32
        (F, 3, 224, 224), RGB in [0, 1], and returns probabilities (F, labels).
    labels : str or Path, optional
        Required for a file: a text file with one name per line, in the order of the classifier's outputs.
    faces : str, optional
        For a file: "module:function" of a face finder; MTCNN of facenet-pytorch by default.
    device : torch.device or str
        Where to compute.

    Returns
    -------
    CelebrityDetector
        The detector.

    Raises
    ------
    ValueError
        If a file, module or function is missing or of another kind.
    ImportError
        If a package is not installed.
    """
    if SPEC.fullmatch(detector):
        if labels is not None or faces is not None:
            raise ValueError(f"celebrity_detector is {detector!r}, which has its own labels and faces: give neither")
        result = _from_module("celebrity_detector", detector)()
        missing = [name for name in ("labels", "describe", "__call__") if not hasattr(result, name)]
        if missing:
            raise ValueError(f"celebrity_detector is {detector!r}, which returns an object without {missing[0]}")
        return result
    path = Path(detector)
    if not path.is_file():
        raise ValueError(f"celebrity_detector is {detector!r}, expected a file or module:function")
    if labels is None or not Path(labels).is_file():
        raise ValueError(f"celebrity_labels is {labels!r}, expected the file with the names of {detector}")
    names = [line.strip() for line in Path(labels).read_text("utf-8").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"celebrity_labels {labels} has no name")
    load = {".onnx": _onnx, ".pt2": _exported}.get(path.suffix, _torchscript)
    classify = load(path, device)
    find = MTCNNFaces(device) if faces is None else _from_module("face_detector", faces)
    return FaceClassifier(classify, names, find, {"classifier": str(path)})


def _torchscript(path: Path, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    try:
        model = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"celebrity_detector {path} is not a TorchScript file: {error}") from error
    return lambda faces: model(faces.to(device))


def _exported(path: Path, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    try:
        model = torch.export.load(path).module().to(device)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"celebrity_detector {path} is not a file of torch.export: {error}") from error
    return lambda faces: model(faces.to(device))


def _onnx(path: Path, _device: torch.device | str) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"an ONNX classifier needs onnxruntime ({error}): pip install onnxruntime") from error
    session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
    input_name = session.get_inputs()[0].name
    return lambda faces: torch.from_numpy(session.run(None, {input_name: faces.numpy()})[0])


def _from_module(name: str, spec: str) -> Callable:
    if not SPEC.fullmatch(spec):
        raise ValueError(f"{name} is {spec!r}, expected module:function")
    module, function = spec.split(":")
    try:
        result = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} is {spec!r}, which cannot be imported: {error}") from error
    if not callable(result):
        raise ValueError(f"{name} is {spec!r}, expected a function")
    return result


def _name_of(function: Callable) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"
