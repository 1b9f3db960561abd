"""Quality and memorization of samples, measured against held-out images, and the report that shows them."""

from fastambient.evaluation.frechet import frechet_distance
from fastambient.evaluation.memorization import Neighbours, nearest_two
from fastambient.evaluation.metrics import evaluate

__all__ = ["Neighbours", "evaluate", "frechet_distance", "nearest_two"]
