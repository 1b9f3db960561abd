"""Data sets: sources of images, the prepared store, the order of training, and the loader."""

from fastambient.data.ids import image_id, image_ids
from fastambient.data.order import dataset_indices, permutation
from fastambient.data.preparation import prepare
from fastambient.data.resident import Batch, ResidentLoader
from fastambient.data.sources import Source, open_source
from fastambient.data.store import Split, Store, is_store

__all__ = [
    "Batch", "ResidentLoader", "Source", "Split", "Store", "dataset_indices", "image_id", "image_ids", "is_store",
    "open_source", "permutation", "prepare",
]  # fmt: skip
