"""Detectors, with stand-ins for the user's models: their inputs, the use of their results, and missing packages."""

import pickle
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pecker_fast.metrics import detectors
from pecker_fast.metrics.clip import ClipModel
from pecker_fast.metrics.detectors import NUDENET_UNSAFE, NudeNetDetector, Q16Detector, load_embeddings
from tests.metrics.clip_model import IMAGE, WIDTH, save_clip

# All labels of NudeNet 3, as its documentation lists them.
NUDENET_LABELS = [
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
]


def images(count: int, size: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size + 4), dtype=torch.uint8)


@pytest.fixture
def nudenet(monkeypatch):
    """A stand-in for the module nudenet, whose detections depend on the first pixel of an image."""
    inputs = []

    class NudeDetector:
        def __init__(self, **options):
            self.options = options

        def detect(self, path):
            pixels = np.array(Image.open(path))
            inputs.append(pixels)
            label, score = NUDENET_LABELS[pixels[0, 0, 0] % len(NUDENET_LABELS)], pixels[0, 0, 1] / 255
            return [{"class": "FACE_FEMALE", "score": 0.99, "box": [0, 0, 1, 1]}, {"class": label, "score": score}]

    module = types.ModuleType("nudenet")
    module.NudeDetector, module.inputs = NudeDetector, inputs
    monkeypatch.setitem(sys.modules, "nudenet", module)
    versions = {"nudenet": "3.4.2"}
    monkeypatch.setattr(detectors.importlib.metadata, "version", versions.__getitem__)
    module.versions = versions
    return module


def test_nudenet_inputs_and_labels(nudenet):
    batch = images(len(NUDENET_LABELS) * 2)
    batch[:, 0, 0, 0] = torch.arange(len(batch))
    batch[:, 1, 0, 0] = torch.tensor([153, 152]).repeat_interleave(len(NUDENET_LABELS))
    detector = NudeNetDetector()
    result = detector(batch)
    for image, pixels in zip(batch, nudenet.inputs, strict=True):
        assert torch.equal(torch.from_numpy(pixels).permute(2, 0, 1), image)
    # 153 / 255 equals the threshold 0.6.
    unsafe = {label for label, bad in zip(NUDENET_LABELS, result[: len(NUDENET_LABELS)].tolist(), strict=True) if bad}
    assert unsafe == set(NUDENET_UNSAFE)
    assert unsafe == {label for label in NUDENET_LABELS if label.endswith("EXPOSED")} - {
        "MALE_BREAST_EXPOSED", "FEET_EXPOSED", "ARMPITS_EXPOSED", "BELLY_EXPOSED"
    }  # fmt: skip
    assert not result[len(NUDENET_LABELS) :].any() and result.dtype == torch.bool
    description = detector.describe()
    assert description["version"] == "3.4.2" and description["min_prob"] == 0.6
    assert "BUTTOCKS_EXPOSED" in description["unsafe_labels"]
    assert NudeNetDetector(min_prob=0.5)(batch)[len(NUDENET_LABELS) :].sum() == 5


def test_nudenet_with_another_model(nudenet, tmp_path):
    (tmp_path / "640m.onnx").write_bytes(b"")
    detector = NudeNetDetector(model_path=tmp_path / "640m.onnx", inference_resolution=640)
    assert detector.detector.options == {"model_path": str(tmp_path / "640m.onnx"), "inference_resolution": 640}
    assert detector.describe()["inference_resolution"] == 640


def test_nudenet_missing_outdated_or_invalid(nudenet, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file"):
        NudeNetDetector(model_path=tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="min_prob is 60"):
        NudeNetDetector(min_prob=60)
    with pytest.raises(TypeError, match="expected uint8"):
        NudeNetDetector()(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"images has shape \(1, 1, 4, 4\)"):
        NudeNetDetector()(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    nudenet.versions["nudenet"] = "2.0.9"
    with pytest.raises(ValueError, match=r"NudeNet 2\.0\.9 is installed"):
        NudeNetDetector()
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match="pip install 'nudenet>=3'"):
        NudeNetDetector()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return ClipModel(save_clip(tmp_path_factory.mktemp("clip") / "model"), batch_size=2)


def test_clip_features(clip):
    batch = torch.randint(0, 256, (3, 3, IMAGE, IMAGE), dtype=torch.uint8)
    features = clip.images(batch)
    assert features.shape == (3, WIDTH) and features.dtype == torch.float32
    # Computed without the processor; these images need no resizing.
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = (batch.float() / 255 - mean) / std
    with torch.no_grad():
        pooled = clip.model.vision_model(pixel_values=pixels).pooler_output
        expected = clip.model.visual_projection(pooled)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    texts = clip.texts(["a cat", "a photo of a dog", "ä" * 200])
    assert texts.shape == (3, WIDTH)
    # Batch and padding do not matter.
    torch.testing.assert_close(clip.texts(["a cat"])[0], texts[0], rtol=1e-4, atol=1e-5)
    assert clip.describe()["projection_dim"] == WIDTH
    with pytest.raises(ValueError, match="texts is empty"):
        clip.texts([])


def test_clip_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected the folder of a CLIP model"):
        ClipModel(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not have a complete CLIP model"):
        ClipModel(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        ClipModel(tmp_path)


def test_q16_uses_the_nearer_embedding(clip, tmp_path):
    embeddings = np.random.randn(2, WIDTH).astype(np.float32)
    np.save(tmp_path / "prompts.npy", embeddings)
    detector = Q16Detector(clip, tmp_path / "prompts.npy")
    batch = images(9)
    features = clip.images(batch).double().numpy()
    cosines = [
        [feature @ row / np.linalg.norm(feature) / np.linalg.norm(row) for row in embeddings.astype(np.float64)]
        for feature in features
    ]
    assert detector(batch).tolist() == [bad > fine for fine, bad in cosines]
    # Swapped embeddings negate all results.
    np.save(tmp_path / "prompts.npy", embeddings[::-1].copy())
    assert torch.equal(Q16Detector(clip, tmp_path / "prompts.npy")(batch), ~detector(batch))
    assert detector.describe()["clip"]["projection_dim"] == WIDTH
    np.save(tmp_path / "other.npy", embeddings[:, :5])
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(2, 8\)"):
        Q16Detector(clip, tmp_path / "other.npy")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_embeddings_of_every_kind_of_file(tmp_path, dtype):
    array = np.random.randn(2, 6).astype(dtype)
    expected = torch.from_numpy(array.astype(np.float32))
    np.save(tmp_path / "a.npy", array)
    safetensors.torch.save_file({"x": torch.from_numpy(array)}, tmp_path / "a.safetensors")
    torch.save(torch.from_numpy(array), tmp_path / "a.pt")
    files = ["a.npy", "a.safetensors", "a.pt"]
    for protocol in (0, 2, 4, 5):
        files += [f"{protocol}.p", f"list{protocol}.p"]
        (tmp_path / f"{protocol}.p").write_bytes(pickle.dumps(array, protocol=protocol))
        (tmp_path / f"list{protocol}.p").write_bytes(pickle.dumps(array.tolist(), protocol=protocol))
    # With the module names of NumPy 1.
    old = pickle.dumps(array, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "old.p").write_bytes(old)
    for file in [*files, "old.p"]:
        assert torch.equal(load_embeddings(tmp_path / file), expected), file


class Harm:
    def __reduce__(self):
        return (sys.modules["builtins"].exec, ("import tests.metrics.test_detectors as t; t.RAN.append(1)",))


RAN: list[int] = []


def test_code_in_a_file_of_embeddings_is_not_run(tmp_path):
    for name, write in (
        ("a.p", lambda path: path.write_bytes(pickle.dumps([Harm()]))),
        ("a.pt", lambda path: torch.save([Harm()], path)),
        ("a.npy", lambda path: np.save(path, np.array([Harm()], dtype=object), allow_pickle=True)),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match="no array that can be read safely"):
            load_embeddings(tmp_path / name)
    assert not RAN
    pickle.loads(pickle.dumps([Harm()]))
    assert RAN.pop() == 1
    (tmp_path / "b.p").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="no array"):
        load_embeddings(tmp_path / "b.p")
    (tmp_path / "c.p").write_bytes(pickle.dumps(np.array([[1.0, np.nan]])))
    with pytest.raises(ValueError, match="not finite"):
        load_embeddings(tmp_path / "c.p")
    with pytest.raises(ValueError, match="no such file"):
        load_embeddings(tmp_path / "d.p")
