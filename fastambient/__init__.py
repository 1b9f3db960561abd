"""fastambient: train diffusion models that copy their training set less, and measure by how much.

from fastambient import EDMDenoiser, ambient_loss, ambient_noise, image_ids, load, sample
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use, so that `fastambient --help` and an import of one part do not pay for all.
_WHERE = {
    "EDMDenoiser": "fastambient.diffusion.edm",
    "ambient_loss": "fastambient_kernels",
    "ambient_noise": "fastambient_kernels",
    "dpmpp_2m": "fastambient.diffusion.samplers",
    "draw_sigma": "fastambient.diffusion.edm",
    "heun": "fastambient.diffusion.samplers",
    "image_ids": "fastambient.data.ids",
    "load": "fastambient.sampling",
    "sample": "fastambient.sampling",
    "two_regime_loss": "fastambient.diffusion.ambient",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from fastambient.data.ids import image_ids as image_ids
    from fastambient.diffusion.ambient import two_regime_loss as two_regime_loss
    from fastambient.diffusion.edm import EDMDenoiser as EDMDenoiser
    from fastambient.diffusion.edm import draw_sigma as draw_sigma
    from fastambient.diffusion.samplers import dpmpp_2m as dpmpp_2m
    from fastambient.diffusion.samplers import heun as heun
    from fastambient.sampling import load as load
    from fastambient.sampling import sample as sample
    from fastambient_kernels import ambient_loss as ambient_loss
    from fastambient_kernels import ambient_noise as ambient_noise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fastambient' has no attribute {name!r}")
