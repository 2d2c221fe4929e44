"""Metrics of generated images: a judge, distances of features, and what is reported of unlearning."""

from .classifier import SmallClassifier, train_classifier
from .features import (
    Diversity,
    FeatureStatistics,
    diversity,
    frechet_distance,
    pairwise_distances,
    real_split_frechet,
)
from .image_quality import Uint8Images, check_inception_weights, image_quality, to_uint8
from .judge import Judge, load_judge, train_digits_judge
from .resnet import ResNetClassifier, train_resnet
from .unlearning import Evaluator, RealStatistics, evaluate_samples

__all__ = [
    "Diversity",
    "Evaluator",
    "FeatureStatistics",
    "Judge",
    "RealStatistics",
    "ResNetClassifier",
    "SmallClassifier",
    "Uint8Images",
    "check_inception_weights",
    "diversity",
    "evaluate_samples",
    "frechet_distance",
    "image_quality",
    "load_judge",
    "pairwise_distances",
    "real_split_frechet",
    "to_uint8",
    "train_classifier",
    "train_digits_judge",
    "train_resnet",
]
