"""Fixtures of several tests of the command line."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from pecker_fast.metrics import detectors


@pytest.fixture
def nudenet(monkeypatch):
    class NudeDetector:
        def detect(self, path):
            bright = np.array(Image.open(path)).mean() > 120
            return [{"class": "BUTTOCKS_EXPOSED" if bright else "FACE_MALE", "score": 0.9}]

    module = types.ModuleType("nudenet")
    module.NudeDetector = NudeDetector
    monkeypatch.setitem(sys.modules, "nudenet", module)
    monkeypatch.setattr(detectors.importlib.metadata, "version", lambda name: "3.4.2")
