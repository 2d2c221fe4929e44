"""Unlearning methods, one file each, on one protocol of ordered phases."""

from .conditions import Conditions, PromptRequest
from .protocol import Method, Phase
from .registry import method_class, method_names
from .setting import COVER_RANDOM, Compute, ForgetRequest, Setting

__all__ = [
    "COVER_RANDOM",
    "Compute",
    "Conditions",
    "ForgetRequest",
    "Method",
    "Phase",
    "PromptRequest",
    "Setting",
    "method_class",
    "method_names",
]
