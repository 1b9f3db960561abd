"""Quality and memorization of samples, measured against held-out images, and the report that shows them."""

from fastambient.evaluation.frechet import frechet_distance
from fastambient.evaluation.memorization import Neighbours, nearest_two
from fastambient.evaluation.metrics import Evaluation, Score, evaluate
from fastambient.evaluation.similarity import Similar, most_similar

__all__ = [
    "Evaluation",
    "Neighbours",
    "Score",
    "Similar",
    "evaluate",
    "frechet_distance",
    "most_similar",
    "nearest_two",
]
