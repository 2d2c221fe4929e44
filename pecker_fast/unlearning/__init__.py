"""Unlearning methods, one file each, on one protocol of ordered phases."""

from .conditions import COVER_RANDOM, Conditions, ForgetRequest, PromptRequest, RetainRequest
from .protocol import MemoryPlan, Method, Phase, TrainedNetwork
from .registry import method_class, method_names
from .setting import Compute, Images, Placement, Problem, Setting

__all__ = [
    "COVER_RANDOM",
    "Compute",
    "Conditions",
    "ForgetRequest",
    "Images",
    "MemoryPlan",
    "Method",
    "Phase",
    "Placement",
    "Problem",
    "PromptRequest",
    "RetainRequest",
    "Setting",
    "TrainedNetwork",
    "method_class",
    "method_names",
]
