"""The real detectors, whose packages have their weights, on pictures of scikit-image; skipped where they are missing.

pip install nudenet scikit-image; pip install --no-deps facenet-pytorch
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pecker_fast.metrics import ConceptMeter, NudeNetDetector, detectors
from pecker_fast.metrics.celebrities import CROP, FaceClassifier, MTCNNFaces, crop_faces


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec("skimage")
    if found is None:
        pytest.skip("scikit-image is not installed")
    return Path(found.submodule_search_locations[0]) / "data"


@pytest.fixture(scope="module")
def pictures(folder) -> torch.Tensor:
    """uint8 (2, 3, 400, 400): an astronaut with a face, and a cup of coffee."""
    images = [
        np.array(Image.open(folder / name).convert("RGB"))[:400, :400] for name in ("astronaut.png", "coffee.png")
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_nudenet(pictures, folder, tmp_path, monkeypatch):
    pytest.importorskip("nudenet")
    detector = NudeNetDetector(min_prob=0.5)
    # Neither picture is unsafe.
    assert detector(pictures).tolist() == [False, False] and int(detector.describe()["version"].split(".")[0]) >= 3
    # It does see the astronaut's face, in the very pixels: files, order of colours and confidences are right.
    monkeypatch.setitem(detectors.NUDENET_UNSAFE, "FACE_FEMALE", "FACE_FEMALE")
    assert detector(pictures).tolist() == [True, False]
    Image.fromarray(pictures[0].permute(1, 2, 0).contiguous().numpy()).save(tmp_path / "a.png")
    score = max(part["score"] for part in detector.detector.detect(str(tmp_path / "a.png")))
    assert 0.5 < score < 1
    for min_prob, shown in ((score - 0.01, True), (score + 0.01, False)):
        detector.min_prob = min_prob
        assert detector(pictures[:1]).tolist() == [shown]
    detector.min_prob = 0.5
    meter = ConceptMeter(["a woman", "a cup"], 1, unsafe=[detector])
    meter.add(pictures)
    assert meter.result()["nudenet_probability"] == 50 and meter.ua() == 50 and meter.attack_success_rate() == 50
    assert [row["inappropriate_probability"] for row in meter.by_prompt()] == [100, 0]


def test_mtcnn(pictures):
    pytest.importorskip("facenet_pytorch")
    find = MTCNNFaces()
    boxes = find(pictures[0])
    assert boxes.shape == (1, 4) and boxes.dtype is torch.float32 and len(find(pictures[1])) == 0
    # Where the face is in the picture.
    left, top, right, bottom = boxes[0].tolist()
    assert 160 < left < 200 and 40 < top < 90 and 250 < right < 290 and 150 < bottom < 200
    faces = crop_faces(pictures[0], boxes)
    assert faces.shape == (1, 3, CROP, CROP) and 0.2 < faces.mean() < 0.9
    names = FaceClassifier(lambda faces: torch.tensor([[0.9, 0.1]]).repeat(len(faces), 1), ["Eileen", "x"], find, {})
    meter = ConceptMeter(["a woman", "a cup"], 1, celebrities=names, names=["Eileen"] * 2)
    meter.add(pictures)
    result = meter.result()
    assert result["no_face_share"] == 0.5 and result["gcd_score"] == pytest.approx(0.9) and meter.ua() == 50
