"""Metrics of generated images: accuracies of a judge, distances of features, and scores of concepts."""

from .accuracy import confusion_counts, retained_accuracy, unlearning_accuracy
from .by_class import class_figures, forgotten_share, percentage_of_unlearning
from .celebrities import load_celebrity_detector
from .classifier import SmallClassifier, train_classifier
from .clip import ClipModel
from .concept_meter import ConceptMeter
from .concepts import (
    celebrity_scores,
    clip_score,
    inappropriate_probability,
    max_expected_inappropriateness,
    nudity_scores,
)
from .detectors import NudeNetDetector, Q16Detector
from .features import (
    Diversity,
    FeatureStatistics,
    diversity,
    frechet_distance,
    pairwise_distances,
    real_split_frechet,
)
from .image_quality import Uint8Images, check_inception_weights, image_quality, to_uint8
from .judge import DIGITS_RECIPE, Judge, load_judge, train_digits_judge, train_mnist_judge
from .resnet import ResNetClassifier, train_resnet
from .unlearning import Evaluator, RealStatistics, evaluate_samples

__all__ = [
    "DIGITS_RECIPE",
    "ClipModel",
    "ConceptMeter",
    "Diversity",
    "Evaluator",
    "FeatureStatistics",
    "Judge",
    "NudeNetDetector",
    "Q16Detector",
    "RealStatistics",
    "ResNetClassifier",
    "SmallClassifier",
    "Uint8Images",
    "celebrity_scores",
    "check_inception_weights",
    "class_figures",
    "clip_score",
    "confusion_counts",
    "diversity",
    "evaluate_samples",
    "forgotten_share",
    "frechet_distance",
    "image_quality",
    "inappropriate_probability",
    "load_celebrity_detector",
    "load_judge",
    "max_expected_inappropriateness",
    "nudity_scores",
    "pairwise_distances",
    "percentage_of_unlearning",
    "real_split_frechet",
    "retained_accuracy",
    "to_uint8",
    "train_classifier",
    "train_digits_judge",
    "train_mnist_judge",
    "train_resnet",
    "unlearning_accuracy",
]
