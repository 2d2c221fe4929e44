"""Feature extractors registered with torch-fidelity besides its own: Inception's spatial features, and judges.

Imported lazily, because torch-fidelity is an optional package.
"""

from typing import Any

import torch
from torch import Tensor
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from .judge import Judge

SPATIAL = "inception-v3-compat-spatial"
# Channels that sFID uses, of 17 x 17 positions.
SPATIAL_CHANNELS = 7
SPATIAL_LAYER = str(17 * 17 * SPATIAL_CHANNELS)


class _OneLayer(FeatureExtractorBase):
    """torch-fidelity's interface for an extractor with one layer for all metrics."""

    layer = ""

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return (cls.layer,)

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return cls.layer

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros((1, 3, 8, 8), dtype=torch.uint8)


class SpatialInception(_OneLayer):
    """The features of sFID (Nash et al. 2021), as in the evaluator of Dhariwal and Nichol (2021).

    They are the first 7 channels of the graph's ``mixed_6/conv``, here ``Mixed_6d.branch1x1``, after the ReLU and
    without averaging: 7 x 17 x 17 = 2023 numbers per image. Weights, resizing and scaling are torch-fidelity's.
    """

    layer = SPATIAL_LAYER

    def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
        super().__init__(name, features_list)
        # The computation ends at the requested layer: "768" is the first one after the convolution.
        self.inception = FeatureExtractorInceptionV3(name, ["768"], **options)
        self.inception.Mixed_6d.branch1x1.register_forward_hook(self._store)
        self._output: Tensor | None = None

    def _store(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self._output = output[:, :SPATIAL_CHANNELS].flatten(1).float()

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Compute features float32 (N, 2023) of uint8 (N, 3, H, W)."""
        self.inception(images)
        output, self._output = self._output, None
        return (output,)


register_feature_extractor(SPATIAL, SpatialInception)

_judges: dict[str, Judge] = {}


def register_judge(judge: Judge) -> str:
    """Register a judge's features under ``judge.feature_extractor`` and return that name.

    A later judge of the same name replaces an earlier one. ValueError if it is the name of another extractor.
    """
    name = judge.feature_extractor
    if name not in _judges and name in FEATURE_EXTRACTORS_REGISTRY:
        raise ValueError(f"the judge's features have the name of another extractor, {name}")
    if name not in _judges:
        kind = type("JudgeFeatures", (_JudgeFeatures,), {"layer": str(judge.model.config["width"])})
        register_feature_extractor(name, kind)
    _judges[name] = judge
    return name


class _JudgeFeatures(_OneLayer):
    """Features of the judge that is registered under the extractor's name."""

    def __init__(self, name: str, features_list: list[str], **_options: Any) -> None:
        super().__init__(name, features_list)
        self.judge = _judges[name]
        # A submodule, so that it is moved to the device of the images.
        self.model = self.judge.model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Compute features float32 (N, width) of uint8 (N, 3, H, W). A judge of grey images gets the first channel."""
        x = images[:, : self.model.config["channels"]].float() / 127.5 - 1
        return (self.judge(x)[1],)
