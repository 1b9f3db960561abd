"""From weights and seeds to pictures and files."""

from fastambient.sampling.draw import draw_classes, latents, sample
from fastambient.sampling.graph import GraphedDenoiser
from fastambient.sampling.settings import MAX_STEPS, SamplingSettings, check_sampling
from fastambient.sampling.weights import FORMAT, export, load, weights_file
from fastambient.sampling.write import parse_interval, parse_seeds, write_samples

__all__ = [
    "FORMAT", "MAX_STEPS", "GraphedDenoiser", "SamplingSettings", "check_sampling", "draw_classes", "export",
    "latents", "load", "parse_interval", "parse_seeds", "sample", "weights_file", "write_samples",
]  # fmt: skip
