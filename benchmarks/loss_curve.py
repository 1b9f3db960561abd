"""Does the trainer's fast path learn what the reference's arrangement learns? Loss curves of `digits`, step for step.

    python benchmarks/loss_curve.py [--steps N] [--plot FILE] [--json FILE] [--out DIR]

Three trainings of the same 100 digits: ours, the reference (`baselines.py`: float32, eager, every operator apart) from
the same weights on the same images, sigma and noise, and the reference from another seed. Rounding grows with the
steps, so the curves part in time: by how much is held against the two seeds of the reference. Curves are means over a
window of steps; the band is the root mean square of the relative difference between the seeds, and ours must stay
inside it at every step. Two minutes a curve on 2 cores.
"""

from __future__ import annotations

import argparse
import copy
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import protocol
import torch
from step_time import competitor, draws, make_trainer

from fastambient.console import progress
from fastambient.files import write_bytes
from fastambient.training.loop import Trainer
from fastambient.training.optimizer import learning_rate

PRESET, BATCH = "digits", 64
WINDOW = 100  # steps; single ones scatter with their sigmas
POINTS = 100  # of a curve, in the row file and the plot


def train_ours(trainer: Trainer, steps: int) -> list[float]:
    """Loss of each step of the trainer."""
    with progress("ours", steps, "steps") as advance:
        losses = []
        for k in range(steps):
            losses.append(trainer.step(k * BATCH).loss)
            advance(1)
    return losses


def train_reference(trainer: Trainer, steps: int, name: str) -> list[float]:
    """The same from the trainer's weights and draws, in the reference's arrangement; the trainer stays as it is."""
    weights = copy.deepcopy(trainer.network.state_dict())
    step = competitor("reference", trainer, weights)
    losses = []
    with progress(name, steps, "steps") as advance:
        for k in range(steps):
            batch, sigma, noises = draws(trainer, torch.arange(k * BATCH, (k + 1) * BATCH))
            for group in step.optimizer.optimizer.param_groups:
                group["lr"] = learning_rate(k * BATCH, trainer.settings.training)
            losses.append(step(batch.images, batch.flips, sigma, noises))
            advance(1)
    return losses


def smooth(losses: list[float], window: int) -> np.ndarray:
    """Means over `window` consecutive steps, float64 [len(losses) - window + 1]."""
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")


def compare(ours: list[float], reference: list[float], other: list[float], *, window: int) -> dict[str, Any]:
    """Largest relative deviation of ours from the reference, and the band of the reference's two seeds."""
    mine, theirs, seed = (smooth(losses, window) for losses in (ours, reference, other))
    deviation = float(np.abs(mine / theirs - 1).max())
    band = float(np.sqrt(np.mean((seed / theirs - 1) ** 2)))
    first = np.argmax(np.abs(np.array(ours) / np.array(reference) - 1) > 1e-3)
    return {
        "deviation": deviation,
        "band": band,
        "deviation_over_band": deviation / band,
        "inside": deviation <= band,
        "steps_within_1e-3": int(first) if abs(ours[first] / reference[first] - 1) > 1e-3 else len(ours),
        "window": window,
    }


def plot(curves: dict[str, list[float]], steps: list[int]) -> bytes:
    """The smoothed curves as SVG, the same bytes for the same numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loss", "font.family": "sans-serif"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        styles = {"other seed": {"color": "0.7"}, "reference": {"linewidth": 3.0}, "ours": {"linestyle": "--"}}
        for name, style in styles.items():
            axes.plot(steps, curves[name], label=name, **style)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (sum over pixels)")
        axes.grid(alpha=0.2)
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of each curve, at least 2 (default 2000)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG of the curves (default: none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the row to FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", default=protocol.RESULTS, help="folder of the row")
    arguments = parser.parse_args()
    steps, cpu = arguments.steps, torch.device("cpu")
    if steps < 2:
        parser.error(f"--steps must be 2 or more, got {steps}")
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            make_trainer(Path(folder) / str(seed), PRESET, BATCH, cpu, "fp32", seed=seed) for seed in (0, 1)
        )
        losses = {
            "reference": train_reference(first, steps, "reference"),
            "other seed": train_reference(second, steps, "reference, other seed"),
            "ours": train_ours(first, steps),
        }
    window = min(WINDOW, steps // 2)
    found = compare(losses["ours"], losses["reference"], losses["other seed"], window=window)
    at = np.unique(np.linspace(0, steps - window, POINTS).astype(int))
    curves = {name: smooth(values, window)[at].tolist() for name, values in losses.items()}
    row = {"work": f"loss {PRESET} {steps}", "size": f"batch {BATCH}"} | found
    shown = {"steps": (at + window).tolist(), "curves": curves}
    text = protocol.write_json(arguments.out / f"loss_curve-{PRESET}-cpu.json", cpu, [row], **shown)
    if arguments.json is not None:
        arguments.json.write_text(text)
    if arguments.plot is not None:
        write_bytes(arguments.plot, plot(curves, shown["steps"]))
    print(
        f"{row['work']}: ours deviates by at most {found['deviation']:.2e} of the smoothed loss, two seeds by"
        f" {found['band']:.2e} (rms): {'inside' if found['inside'] else 'OUTSIDE'} the band;"
        f" the first {found['steps_within_1e-3']} steps agree to 1e-3"
    )


if __name__ == "__main__":
    main()
