"""How long an audit takes: the exact nearest-neighbour search against torch.cdist, and the two times that were aimed at.

    python benchmarks/audit_time.py [--source SOURCE] [--quick] [--device cpu] [--rounds N] [--json FILE] [--out DIR]

``nearest 10000 50000`` are the nearest of 50,000 images of 32x32 pixels in colour for each of 10,000 samples, and the
nearest other picture, as an audit looks for them, and ``nearest 1000 50000`` the two nearest of any kind;
``audit 300`` is `fastambient audit` on 300 samples, 300 training and 300 held-out images with EfficientNet-Lite0,
mirror images included, reading and report, nothing cached. Both are to take less than 60 s on two cores. Pictures are
smooth ones made here, or those of --source; one sample in ten is a training image, the others are blends of two others.
A tenth of the samples is searched by torch.cdist as well, and distances of those that are no copies have to agree first.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import protocol
import torch

from fastambient.data.sources import open_source
from fastambient.evaluation.audit import audit
from fastambient.evaluation.memorization import nearest_two
from fastambient.evaluation.nearest_pictures import nearest_pictures

SECONDS = 60.0  # aimed at, for each of the two on two cores
PIXELS = 32


def pictures(n: int, seed: int) -> np.ndarray:
    """uint8 [n, 3, 32, 32]: coarse noise, enlarged, and a little fine noise."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(n, 3, PIXELS, PIXELS, dtype=torch.uint8)
    for part in found.split(1000):
        coarse = torch.randn(len(part), 3, 6, 6, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, PIXELS, mode="bicubic")
        fine = torch.randn(smooth.shape, generator=generator)
        part.copy_((127.5 + 50 * smooth + 8 * fine).clamp(0, 255))
    return found.numpy()


def read(spec: str, n: int) -> np.ndarray:
    """The first n pictures of a SOURCE at 32x32."""
    source = open_source(spec, resolution=PIXELS)
    if source.length < n:
        sys.exit(f"{spec} holds {source.length} pictures, expected at least {n}")
    found = np.empty((n, source.channels, PIXELS, PIXELS), np.uint8)
    for i, item in enumerate(source.read()):
        if i == n:
            break
        found[i] = item.image
    return found


def samples_of(images: np.ndarray, n: int) -> np.ndarray:
    """uint8 [n, C, 32, 32]: of ten one is an image, and nine are the mean of two."""
    generator = np.random.default_rng(0)
    a, b = (images[generator.integers(0, len(images), n)].astype(np.uint16) for _ in range(2))
    blends = ((a + b) // 2).astype(np.uint8)
    blends[::10] = a[::10]
    return blends


def by_cdist(samples: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What one would write: blocks of torch.cdist in float32 and the two smallest. (index [N, 2], distance [N, 2])"""
    a, b = (torch.from_numpy(x.reshape(len(x), -1)).float() / 127.5 - 1 for x in (samples, images))
    found = [torch.cdist(block, b).topk(2, largest=False, sorted=True) for block in a.split(256)]
    return torch.cat([f.indices for f in found]).numpy(), torch.cat([f.values for f in found]).numpy()


def search(images: np.ndarray, samples: np.ndarray, rounds: int) -> list[dict[str, Any]]:
    """Rows of the search: a tenth against torch.cdist, and all of it, once."""
    some = samples[: max(len(samples) // 10, 20)]
    ours, theirs = nearest_two(some, images), by_cdist(some, images)
    far = theirs[1][:, 0] > 0.5  # of near pairs cdist keeps no digit in float32: |a|^2 + |b|^2 - 2 a.b
    agreement = float(np.abs(ours.distance[far] / theirs[1][far] - 1).max())
    if agreement > 1e-3:
        sys.exit(f"distances differ by {agreement:.2g} of their value: no time is reported")
    times = protocol.interleave(
        {"ours": lambda: nearest_two(some, images), "torch.cdist": lambda: by_cdist(some, images)},
        rounds=rounds, device=torch.device("cpu"),
    )  # fmt: skip
    size = f"{len(images):,} images, 3x{PIXELS}x{PIXELS}"
    (row,) = protocol.rows_of(
        f"nearest {len(some)} {len(images)}", "ours", times, floor=None, agreement={"torch.cdist": agreement}, size=size
    )
    found = [dataclasses.asdict(row)]
    for flips in (False, True):
        began = time.perf_counter()
        nearest_pictures(samples, images, flips=flips)
        work = f"nearest {len(samples)} {len(images)}{' flips' * flips}"
        found.append(timed(work, size, [time.perf_counter() - began], aim=not flips))
    return found


def whole_audit(images: np.ndarray, count: int, rounds: int) -> dict[str, Any]:
    """The row of an audit of `count` samples against as many training and held-out images."""
    train, holdout = images[:count], images[count : 2 * count]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        files = {n: f"{folder}/{n}.npy" for n in ("samples", "train", "holdout")}
        for name, array in (("samples", samples_of(train, count)), ("train", train), ("holdout", holdout)):
            np.save(files[name], array)
        for _ in range(rounds):
            began = time.perf_counter()
            found = audit(
                files["samples"], files["train"], holdout=files["holdout"], out=Path(folder) / "audit.json"
            ).metrics
            seconds.append(time.perf_counter() - began)
    copies = found["memorization"]["gap_ratio"]["copies"]
    if copies < count // 10:
        sys.exit(f"{copies} copies were found, {count // 10} were planted: no time is reported")
    return timed(f"audit {count}", f"{count} samples, train, held-out, 3x{PIXELS}x{PIXELS}", seconds, aim=True)


def timed(work: str, size: str, seconds: list[float], *, aim: bool) -> dict[str, Any]:
    """A row without a competitor. headroom: how many times the work fits into the time that was aimed at."""
    middle = statistics.median(seconds)
    spread = (protocol.percentile(seconds, 0.8) - protocol.percentile(seconds, 0.2)) / middle
    row = {"work": work, "size": size, "ms": middle * 1e3, "spread": spread}
    return row | ({"headroom": SECONDS / middle} if aim else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    protocol.arguments(parser, rounds=5, competitors=False)
    parser.add_argument("--source", help="pictures to take (default: made here)")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the search, an audit of 30: a rehearsal")
    a = parser.parse_args()
    if a.device.type != "cpu":
        sys.exit("the search runs on the CPU: --device cpu")
    count, samples, each, rounds = (500, 100, 30, 1) if a.quick else (50_000, 10_000, 300, 3)
    images = read(a.source, count) if a.source else pictures(count, 1)
    rows = [*search(images, samples_of(images, samples), a.rounds), whole_audit(images, each, rounds)]
    for row in rows:
        print(
            f"{row['work']:<28}{row['size']:<40}{row['ms'] / 1e3:>9.2f} s"
            + (f", {row['ratio']:.2f}x {row['competitor']}" if "ratio" in row else "")
        )
    protocol.write([], a, results="audit_time-quick" if a.quick else "audit_time", more=rows)


if __name__ == "__main__":
    main()
