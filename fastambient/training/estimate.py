"""What a run will cost: parameters counted, memory and time measured on a few images and scaled up."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fastambient import models
from fastambient.console import duration
from fastambient.training.config import Settings, network_config

_PROBE_SECONDS = 0.5  # forward and backward of ever more images are measured until they take this long
_STATE_BYTES = 20  # a parameter: float32 weight, gradient, two moments, EMA


def estimate_run(settings: Settings, *, channels: int, num_classes: int) -> str:
    """One paragraph: parameters, memory a rank, time of the whole run on this machine."""
    t = settings.training
    device = torch.device(t.device)
    config = network_config(settings, channels=channels, num_classes=num_classes)
    network = models.build(config).to(device)
    parameters = sum(p.numel() for p in network.parameters())
    micro = t.batch_gpu or t.batch // t.ranks
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def probe(images: int) -> float:
        """Seconds of forward and backward."""
        x = torch.randn(images, channels, config["img_resolution"], config["img_resolution"], device=device)
        labels = torch.zeros(images, config["label_dim"], device=device) if config["label_dim"] else None
        augment = torch.zeros(images, config["augment_dim"], device=device) if config["augment_dim"] else None
        saved.clear()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=t.precision == "bf16"):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
                out = network(x, torch.zeros(images, device=device), labels, augment)
            out.float().square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    images = 1
    seconds = min(probe(images), probe(images))  # the first pays for allocation
    while images < micro and seconds < _PROBE_SECONDS:
        images = min(2 * images, micro)
        seconds = min(probe(images), probe(images))
    activations = sum(size for pointer, size in saved.items() if pointer not in weights) / images
    memory = parameters * _STATE_BYTES + activations * micro
    total = t.kimg * 1000 / (images / seconds) / t.ranks
    return (
        f"{parameters:,} parameters; about {memory / 2**30:.2f} GiB a rank ({micro} images at once);"
        f" about {duration(total)} for {t.kimg:g} kimg on {t.ranks} rank(s), scaled from {images} images timed now"
    )
