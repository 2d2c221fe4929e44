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
from .judge import Judge, load_judge, train_digits_judge
from .unlearning import Evaluator, RealStatistics, evaluate_samples

__all__ = [
    "Diversity",
    "Evaluator",
    "FeatureStatistics",
    "Judge",
    "RealStatistics",
    "SmallClassifier",
    "diversity",
    "evaluate_samples",
    "frechet_distance",
    "load_judge",
    "pairwise_distances",
    "real_split_frechet",
    "train_classifier",
    "train_digits_judge",
]
