"""sslctl knn-eval: weighted nearest neighbours on frozen features."""

from typing import Any

from sslctl.evaluation.knn import Knn
from sslctl.evaluation.runner import evaluate_all


def knn_eval(config: Any) -> None:
    """Classifies the test images by their nearest training images, beside random weights."""
    evaluate_all(config, Knn([config.knn.k], config.knn.temperature))
