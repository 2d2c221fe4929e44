"""Celebrity detectors: crops of faces, classifiers from files and modules, invalid ones."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pecker_fast.metrics import celebrities as c


class Softmax(torch.nn.Module):
    """Probabilities from how red, green and blue a face is."""

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        return (5 * faces.mean((2, 3))).softmax(1)


def halves(image):
    """One face in the left half and one in the right half; none in a black image."""
    height, width = image.shape[1:]
    if int(image.max()) == 0:
        return torch.empty(0, 4)
    return torch.tensor([[0, 0, width / 2, height], [width / 2, 0, width, height]])


def stand_in():
    return c.FaceClassifier(Softmax(), ("Red_Man", "Green Man", "Blue Man"), halves, {"classifier": "stand-in"})


def test_faces_of_each_image_are_named():
    images = torch.zeros(3, 3, 40, 60, dtype=torch.uint8)
    images[0, 0, :, :30] = 255
    images[0, 2, :, 30:] = 255
    images[2, 1] = 255
    result = stand_in()(images)
    assert [tuple(rows.shape) for rows in result] == [(2, 3), (0, 3), (2, 3)]
    assert result[0].argmax(1).tolist() == [0, 2] and result[2].argmax(1).tolist() == [1, 1]
    # The margin adds 3 columns of the right half to the 30 of the left half.
    expected = torch.tensor([5 * 30 / 33, 0.0, 5 * 3 / 33]).softmax(0)
    torch.testing.assert_close(result[0][0], expected, atol=2e-2, rtol=0)
    description = stand_in().describe()
    assert description["labels"] == 3 and description["margin"] == 0.2
    assert description["faces"]["name"].endswith("test_celebrities:halves")


def test_crops():
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    crops = c.crop_faces(image, torch.tensor([[100.0, 40.0, 300.0, 240.0], [390.0, 290.0, 500.0, 400.0]]))
    assert crops.shape == (2, 3, 224, 224) and crops.min() >= 0 and crops.max() <= 1
    # 200 pixels and a margin of 20 on each side: columns 80 to 320, rows 20 to 260.
    part = image[None, :, 20:260, 80:320].float() / 255
    torch.testing.assert_close(crops[0], torch.nn.functional.interpolate(part, (224, 224), mode="bilinear",
                               antialias=True)[0], atol=1e-6, rtol=0)  # fmt: skip
    assert c.crop_faces(image, torch.tensor([[500.0, 0.0, 600.0, 100.0], [50.0, 50.0, 50.0, 50.0]])).shape[0] == 0
    # A crop of the right size is not resized.
    same = c.crop_faces(image, torch.tensor([[10.0, 10.0, 234.0, 234.0]]), margin=0)
    torch.testing.assert_close(same[0], image[:, 10:234, 10:234].float() / 255, atol=1e-6, rtol=0)


def test_names_match_in_other_spellings():
    labels = ["Brad_Pitt", "Angelina Jolie [actress]", "Other"]
    assert c.label_of(labels, "brad pitt") == 0 and c.label_of(labels, "ANGELINA  jolie") == 1
    assert c.label_of(labels, "brad") is None


def test_torchscript_file(tmp_path, monkeypatch):
    torch.jit.trace(Softmax(), torch.rand(2, 3, 224, 224)).save(tmp_path / "model.pt")
    (tmp_path / "labels.txt").write_text("Red_Man\n\nGreen Man\nBlue Man\n")
    module = types.ModuleType("faces_of_mine")
    module.find, module.nothing = halves, 3
    monkeypatch.setitem(sys.modules, "faces_of_mine", module)
    path, labels = str(tmp_path / "model.pt"), tmp_path / "labels.txt"
    detector = c.load_celebrity_detector(path, labels, "faces_of_mine:find")
    images = torch.randint(0, 256, (2, 3, 30, 30), dtype=torch.uint8)
    for actual, expected in zip(detector(images), stand_in()(images), strict=True):
        torch.testing.assert_close(actual, expected)
    assert detector.labels == ("Red_Man", "Green Man", "Blue Man") and detector.describe()["classifier"] == path
    with pytest.raises(ValueError, match="expected a function"):
        c.load_celebrity_detector(path, labels, "faces_of_mine:nothing")
    with pytest.raises(ValueError, match="cannot be imported"):
        c.load_celebrity_detector(path, labels, "faces_of_mine:other")
    with pytest.raises(ValueError, match="expected module:function"):
        c.load_celebrity_detector(path, labels, "mtcnn")
    (tmp_path / "labels.txt").write_text("Red_Man\nGreen Man\n")
    with pytest.raises(ValueError, match=r"returns \(2, 3\) for 2 faces and 2 labels"):
        c.load_celebrity_detector(path, labels, "faces_of_mine:find")(images)


def exported_softmax():
    """The program of torch.export of ``Softmax``, for any number of faces."""
    faces = torch.export.Dim("faces")
    return torch.export.export(Softmax(), (torch.rand(2, 3, 224, 224),), dynamic_shapes=({0: faces},))


def test_exported_program(tmp_path, monkeypatch):
    torch.export.save(exported_softmax(), tmp_path / "model.pt2")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    module = types.ModuleType("faces_of_mine")
    module.find = halves
    monkeypatch.setitem(sys.modules, "faces_of_mine", module)
    detector = c.load_celebrity_detector(str(tmp_path / "model.pt2"), tmp_path / "labels.txt", "faces_of_mine:find")
    images = torch.randint(0, 256, (1, 3, 30, 30), dtype=torch.uint8)
    torch.testing.assert_close(detector(images)[0], stand_in()(images)[0])


def test_onnx_file(tmp_path, monkeypatch):
    class Session:
        def __init__(self, path, providers):
            assert path.endswith("model.onnx") and providers == ["CPU"]

        def get_inputs(self):
            return [types.SimpleNamespace(name="faces")]

        def run(self, outputs, inputs):
            return [Softmax()(torch.from_numpy(inputs["faces"])).numpy()]

    module = types.ModuleType("onnxruntime")
    module.InferenceSession, module.get_available_providers = Session, lambda: ["CPU"]
    faces = types.ModuleType("faces_of_mine")
    faces.find = halves
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setitem(sys.modules, "faces_of_mine", faces)
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    detector = c.load_celebrity_detector(str(tmp_path / "model.onnx"), tmp_path / "labels.txt", "faces_of_mine:find")
    images = torch.randint(0, 256, (1, 3, 30, 30), dtype=torch.uint8)
    torch.testing.assert_close(detector(images)[0], stand_in()(images)[0])


def test_function_of_a_module(monkeypatch):
    module = types.ModuleType("celebrities_of_mine")
    module.make, module.wrong = stand_in, lambda: object()
    monkeypatch.setitem(sys.modules, "celebrities_of_mine", module)
    assert c.load_celebrity_detector("celebrities_of_mine:make").labels[1] == "Green Man"
    with pytest.raises(ValueError, match="without labels"):
        c.load_celebrity_detector("celebrities_of_mine:wrong")
    with pytest.raises(ValueError, match="has its own labels"):
        c.load_celebrity_detector("celebrities_of_mine:make", labels="x")


@pytest.mark.parametrize("rows", [[[2.0, -1.0, 0.0]], [[0.5, 0.4, 0.0]], [[float("nan")] * 3]])
def test_invalid_probabilities(rows):
    detector = c.FaceClassifier(
        lambda faces: torch.tensor(rows).expand(len(faces), 3), ("a", "b", "c"), halves, {"classifier": "x"}
    )
    with pytest.raises(ValueError, match="does not return probabilities"):
        detector(torch.full((1, 3, 8, 8), 9, dtype=torch.uint8))


def test_missing_files_and_packages(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected a file or module:function"):
        c.load_celebrity_detector(str(tmp_path / "none.pt"))
    path, labels = tmp_path / "model.pt", tmp_path / "labels.txt"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="celebrity_labels is None"):
        c.load_celebrity_detector(str(path))
    labels.write_text("\n")
    with pytest.raises(ValueError, match="has no name"):
        c.load_celebrity_detector(str(path), labels)
    labels.write_text("a\n")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        c.load_celebrity_detector(str(path), labels)
    for name in ("facenet_pytorch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    torch.jit.trace(Softmax(), torch.rand(2, 3, 224, 224)).save(path)
    with pytest.raises(ImportError, match="pip install --no-deps facenet-pytorch"):
        c.load_celebrity_detector(str(path), labels)
    path.rename(tmp_path / "model.onnx")
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        c.load_celebrity_detector(str(tmp_path / "model.onnx"), labels)


def test_mtcnn(monkeypatch):
    all_options = {}

    class MTCNN:
        def __init__(self, **options):
            all_options.update(options)

        def detect(self, pixels):
            assert pixels.shape == (6, 5, 3)
            return (None, [None]) if pixels.max() == 0 else ([[1.0, 1.0, 3.0, 4.0]], [0.9])

    module = types.ModuleType("facenet_pytorch")
    module.MTCNN = MTCNN
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)
    finder = c.MTCNNFaces()
    assert all_options["thresholds"] == [0.6, 0.7, 0.7]
    assert all_options["min_face_size"] == 20 and all_options["keep_all"]
    assert finder(torch.zeros(3, 6, 5, dtype=torch.uint8)).shape == (0, 4)
    assert finder(torch.ones(3, 6, 5, dtype=torch.uint8)).tolist() == [[1.0, 1.0, 3.0, 4.0]]


def test_boxes_as_facenet_pytorch_returns_them(monkeypatch):
    """Version 2.6 returns arrays of Python objects, of one image the first entry."""
    boxes = np.array([[[1.5, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0]]], dtype=object)[0]
    module = types.ModuleType("facenet_pytorch")
    module.MTCNN = lambda **_: types.SimpleNamespace(detect=lambda pixels: (boxes, [0.9, 0.8]))
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)
    found = c.MTCNNFaces()(torch.zeros(3, 6, 5, dtype=torch.uint8))
    assert found.dtype is torch.float32 and found.tolist() == [[1.5, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0]]


def test_a_real_face():
    """The real package finds the face of scikit-image's astronaut, and nothing in noise."""
    pytest.importorskip("facenet_pytorch")
    skimage = importlib.util.find_spec("skimage")
    if skimage is None:
        pytest.skip("needs scikit-image")
    path = Path(skimage.origin).parent / "data" / "astronaut.png"
    image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    (box,) = c.MTCNNFaces()(image).tolist()
    assert box == pytest.approx([181, 62, 268, 172], abs=8)
    assert c.crop_faces(image, torch.tensor([box])).shape == (1, 3, c.CROP, c.CROP)
