"""Feature extractors registered with torch-fidelity beside its own: Inception's spatial features, and judges.

Imported only where torch-fidelity is used, which is an optional package.
"""

import torch
from torch import Tensor
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from .judge import Judge

SPATIAL = "inception-v3-compat-spatial"
# Channels that sFID takes, of 17 x 17 places.
SPATIAL_CHANNELS = 7
SPATIAL_LAYER = str(17 * 17 * SPATIAL_CHANNELS)


class _OneLayer(FeatureExtractorBase):
    """What torch-fidelity asks of an extractor, for one that gives a single layer for every metric."""

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
    """The features of sFID (Nash et al. 2021, as the evaluator of Dhariwal and Nichol 2021 takes them): the first 7
    channels, after the ReLU, of the graph's ``mixed_6/conv``, which is ``Mixed_6d.branch1x1``. Nothing is averaged:
    7 x 17 x 17 = 2023 numbers an image. Weights, resizing and scaling are those of torch-fidelity's Inception.
    """

    layer = SPATIAL_LAYER

    def __init__(self, name: str, features_list: list[str], **options) -> None:
        super().__init__(name, features_list)
        # The layer that is asked for only says how far it is to compute: "768" is the next that it can end at.
        self.inception = FeatureExtractorInceptionV3(name, ["768"], **options)
        self.inception.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._kept: Tensor | None = None

    def _keep(self, _module, _inputs, output: Tensor) -> None:
        self._kept = output[:, :SPATIAL_CHANNELS].flatten(1).float()

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """uint8 (N, 3, H, W) to float32 (N, 2023)."""
        self.inception(images)
        kept, self._kept = self._kept, None
        return (kept,)


register_feature_extractor(SPATIAL, SpatialInception)

_judges: dict[str, Judge] = {}


def register_judge(judge: Judge) -> str:
    """Registers a judge's features under ``judge.feature_extractor``, which is returned. The last of a name counts."""
    name = judge.feature_extractor
    if name not in _judges and name in FEATURE_EXTRACTORS_REGISTRY:
        raise ValueError(f"the judge's features are called {name}, which is the name of another extractor")
    if name not in _judges:
        kind = type("JudgeFeatures", (_JudgeFeatures,), {"layer": str(judge.model.config["width"])})
        register_feature_extractor(name, kind)
    _judges[name] = judge
    return name


class _JudgeFeatures(_OneLayer):
    """Features of the judge that is registered under the extractor's name."""

    def __init__(self, name: str, features_list: list[str], **_options) -> None:
        super().__init__(name, features_list)
        self.judge = _judges[name]
        # Registered as a part, so that it is moved to where the images are.
        self.model = self.judge.model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """uint8 (N, 3, H, W) to float32 (N, width). A judge of grey images sees the first channel."""
        x = images[:, : self.model.config["channels"]].float() / 127.5 - 1
        return (self.judge(x)[1],)
