"""Data sets: sources of images, the prepared store, the order of training, and the loaders.

Names are loaded on first use: a process that only decodes pictures does without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Batch": "loaders",
    "Loader": "loaders",
    "ResidentLoader": "resident",
    "Rows": "rows",
    "Share": "loaders",
    "Source": "items",
    "Split": "store",
    "Store": "store",
    "StoreRows": "rows",
    "choose": "loaders",
    "dataset_indices": "order",
    "image_id": "ids",
    "image_ids": "ids",
    "is_store": "store",
    "make_loader": "loaders",
    "open_source": "sources",
    "permutation": "order",
    "prepare": "preparation",
}

__all__ = [*_WHERE]

if TYPE_CHECKING:
    from fastambient.data.ids import image_id as image_id
    from fastambient.data.ids import image_ids as image_ids
    from fastambient.data.items import Source as Source
    from fastambient.data.loaders import Batch as Batch
    from fastambient.data.loaders import Loader as Loader
    from fastambient.data.loaders import Share as Share
    from fastambient.data.loaders import choose as choose
    from fastambient.data.loaders import make_loader as make_loader
    from fastambient.data.order import dataset_indices as dataset_indices
    from fastambient.data.order import permutation as permutation
    from fastambient.data.preparation import prepare as prepare
    from fastambient.data.resident import ResidentLoader as ResidentLoader
    from fastambient.data.rows import Rows as Rows
    from fastambient.data.rows import StoreRows as StoreRows
    from fastambient.data.sources import open_source as open_source
    from fastambient.data.store import Split as Split
    from fastambient.data.store import Store as Store
    from fastambient.data.store import is_store as is_store


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"fastambient.data.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'fastambient.data' has no attribute {name!r}")
