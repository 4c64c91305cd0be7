"""sslctl knn-eval: weighted nearest neighbours on frozen features."""

from typing import Any

from sslctl.evaluation.knn import knn_records
from sslctl.evaluation.runner import evaluate_all, reader_of


def knn_eval(config: Any) -> None:
    """sslctl knn-eval: weighted nearest neighbours."""
    read = reader_of(config)
    evaluate_all(config, lambda s, task: knn_records(s, task.train, task.test, **config.knn, read=read))
