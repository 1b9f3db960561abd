"""What a user should hear once before a run that is not what it seems."""

from __future__ import annotations

from fastambient.data.store import is_store
from fastambient.system import bf16_on_cpu, slow_operators
from fastambient.training.config import Settings
from fastambient.training.data import TrainingSet


def notes(s: Settings, data: TrainingSet, device: str) -> list[str]:
    """Sentences for `warn`; none for an ordinary run. `device`: "cpu" or "cuda", what is trained on here."""
    found = [slow] if (slow := slow_operators(device)) else []
    t, d = s.training, s.data
    handed_out = d.clean is not None or s.noise.regime == "ambient"
    if is_store(d.source) and not handed_out and not d.stream and (d.holdout or 0) < 2:
        found.append(
            f"{d.source} holds {d.holdout or 'no'} held-out images: evaluate needs 2, and without them no copy rate can"
            " be told from chance; prepare it with a larger --holdout first"
        )
    pairs = data.mirrored_pairs
    if pairs and s.noise.sigma_tn and (s.data.xflip or t.augment > 0):
        found.append(
            f"{pairs:,} pairs of training images mirror each other, each with a noise of its own: under x-flips two"
            " noised observations of one picture; leave one of each pair out, or switch x-flips and augmentation off"
        )
    if t.precision == "bf16" and device == "cpu" and not bf16_on_cpu():
        found.append("precision bf16: this CPU has no bfloat16 units, so float32 is many times faster here")
    if s.noise.mode == "fresh" and s.noise.sigma_tn:
        found.append("noise.mode fresh: new noise at every draw undoes the method, its minimiser is plain EDM's")
    if s.training.augment > 0 and s.noise.sigma_tn:
        if s.training.augment_ambient == "reference":
            found.append("augment_ambient reference: the same noise under augmented images leaks the clean image")
        else:
            found.append("geometric augmentation acts on clean-regime draws only; ambient draws are mirrored at most")
    return found
