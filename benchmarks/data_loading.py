"""How fast batches come: the three loaders and the reference's way, and how long a training step waits for them.

    python benchmarks/data_loading.py [--wait-preset cifar10-ddpmpp|none] [--json FILE]

A store of random smooth pictures with float16 noised copies is made in a temporary folder. Ours deliver a batch as the
trainer takes it: ids, flips, labels, images and noised images, in memory of the device. The reference's way is written
from its description: a zip of PNG files, one decoded for each sample; its noise drawn by numpy, from a seed of its own;
a mask; torch's DataLoader, here with as many processes as ours has. Before any time is taken every loader's batches are
compared with the store, byte for byte, and the reference's pictures too.

Each loader is opened anew in each round and emptied of what it had read ahead, so that what is timed is what it can
keep up. CPU time is that of this process and of all processes that it started.

`load R LOADER`    batches of RxR pictures against `reference-loader`; "floor": its bytes at the copy rate, whole way
`gather R`         the resident loader's device part alone
`wait PRESET LOADER`   share of a training step in which the device had no batch to work on
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import protocol
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastambient.allocator import keep_freed_memory
from fastambient.data import Loader, Share, Store, StoreRows, dali, make_loader, open_source, prepare
from fastambient.data.loaders import cpus
from fastambient.planning import PIXELS
from fastambient.training.distributed import World
from fastambient.training.loop import Trainer
from fastambient.training.request import TrainRequest, plan
from fastambient.training.run import RunFolder
from fastambient.training.start import create_run

SEED, SIGMA_TN = 5, 1.0
LOADERS = ("resident", "dali", "workers")
_WAIT_STEPS, _WAIT_BATCH = 6, {"digits": 64, "small16": 32}  # else 4: a step of a large network takes seconds on a CPU


def make_store(folder: Path, size: int, images: int) -> Store:
    """`images` pictures of size x size pixels: smooth, with some grain, so that PNG files are of a photograph's size."""
    rng = np.random.default_rng(size)
    coarse = torch.from_numpy(rng.normal(128, 60, (images, 3, 8, 8)).astype(np.float32))
    pictures = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    pictures += torch.from_numpy(rng.normal(0, 6, (1, 3, size, size)).astype(np.float32))
    np.savez(folder / "set.npz", images=pictures.clamp(0, 255).byte().numpy(), labels=np.arange(images) % 10)
    store = prepare(open_source(folder / "set.npz"), folder / "store", holdout=0, sigma_tn=SIGMA_TN, noisy="float16")
    (folder / "set.npz").unlink()
    return store


def make_zip(store: Store, path: Path, images: int) -> None:
    """The first `images` rows of the store as PNG files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for k, picture in enumerate(store.train.images[:images]):
            png = io.BytesIO()
            Image.fromarray(picture.transpose(1, 2, 0)).save(png, "PNG")
            file.writestr(f"{k:06d}.png", png.getvalue())


class ReferenceSet(Dataset):
    """A sample at a time, from a zip that each process opens when it first reads."""

    def __init__(self, path: Path, labels: np.ndarray) -> None:
        self.path, self.labels = path, labels
        self._zip: zipfile.ZipFile | None = None

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        if self._zip is None:
            self._zip = zipfile.ZipFile(self.path)
        with self._zip.open(f"{k:06d}.png") as file:
            image = np.array(Image.open(file)).transpose(2, 0, 1)
        rng = np.random.RandomState(k)  # the noise is fixed by the picture's number
        noise = (SIGMA_TN * rng.randn(*image.shape)).astype(np.float32)
        mask = np.full((1, 1, 1), rng.rand() < 0.5, np.float32)
        if rng.rand() < 0.5:
            image = image[:, :, ::-1]
        return image.copy(), noise, mask, int(self.labels[k])


class Endless:
    """Shuffled epochs of 0 .. n - 1, one number after another."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(SEED)
        while True:
            yield from rng.permutation(self.n).tolist()


@contextlib.contextmanager
def reference(
    path: Path, store: Store, images: int, batch: int, device: torch.device
) -> Iterator[Callable[[], object]]:
    """A call that takes the next batch to the device."""
    loader = DataLoader(
        ReferenceSet(path, store.train.labels[:images]), batch_size=batch, sampler=Endless(images),  # type: ignore[arg-type,index]
        num_workers=cpus(), prefetch_factor=2, pin_memory=device.type == "cuda", multiprocessing_context="spawn",
    )  # fmt: skip
    batches = iter(loader)
    yield lambda: [tensor.to(device, non_blocking=True) for tensor in next(batches)]
    batches = iter(())  # its processes end with it


@contextlib.contextmanager
def ours(kind: str, store: Store, batch: int, device: torch.device) -> Iterator[Callable[[], object]]:
    """As a training step takes its batches: host's part, static memory, device's part."""
    loader = opened(kind, store, batch, device)
    static = loader.static()
    counter = itertools.count(0, batch)

    def take() -> object:
        loader.fill(static, loader.host(next(counter)))
        return loader.batch(static)

    yield take
    loader.close()


def opened(kind: str, store: Store, batch: int, device: torch.device) -> Loader:
    rows = StoreRows(store.train, seed=SEED, use_noisy=True)
    return make_loader(kind, rows, Share(batch), seed=SEED, device=device, xflip=True)


def check(store: Store, folder: Path, kinds: list[str], batch: int, device: torch.device, in_zip: int) -> None:
    """Every loader gives the store's bytes, in the order of the rows; the zip holds its first pictures. Else it ends."""
    rows = StoreRows(store.train, seed=SEED, use_noisy=True)
    for kind in kinds:
        loader = opened(kind, store, batch, device)
        static = loader.static()
        for nimg in (len(rows) - batch // 2, len(rows) - batch // 2 + batch):  # over the border of an epoch
            loader.fill(static, loader.host(nimg))
            found = loader.batch(static)
            expected = rows.fetch(rows.index(found.positions.cpu()).numpy())
            for name in ("images", "ids", "labels", "x_n"):
                if not np.array_equal(getattr(found, name).cpu().numpy(), expected[name]):
                    sys.exit(f"{kind}: {name} differ from the store's; no time is reported")
        loader.close()
    samples = ReferenceSet(folder / "set.zip", store.train.labels)  # type: ignore[arg-type]
    for k in range(0, in_zip, in_zip // 8):
        picture = samples[k][0]
        if not any(np.array_equal(store.train.images[[k]][0], seen) for seen in (picture, picture[:, :, ::-1])):
            sys.exit(f"reference-loader: picture {k} differs from the store's; no time is reported")


def cpu_seconds() -> float:
    """Of this process and of those that it started and that still run, as Linux tells; NaN elsewhere."""
    ticks, parent = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parent[int(folder.name)], ticks[int(folder.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    if os.getpid() not in ticks:
        return float("nan")

    def is_ours(pid: int) -> bool:
        while pid in parent and pid != os.getpid():
            pid = parent[pid]
        return pid == os.getpid()

    return sum(ticks[pid] for pid in ticks if is_ours(pid)) / os.sysconf("SC_CLK_TCK")


def measure(
    openers: dict[str, Callable[[], contextlib.AbstractContextManager[Callable[[], object]]]],
    batch: int, device: torch.device, rounds: int, seconds: float,
) -> tuple[protocol.Times, dict[str, float]]:  # fmt: skip
    """(seconds a batch of each way in each round, CPU seconds an image)."""
    times, spent = protocol.Times(openers), dict.fromkeys(openers, 0.0)
    count = dict.fromkeys(openers, 0)
    for _ in range(max(5, rounds)):
        for name, opener in openers.items():
            with opener() as take:
                for _ in range(4 * cpus() + 6):  # more than any of them reads ahead
                    take()
                protocol.synchronize(device)
                cpu, began, taken = cpu_seconds(), time.perf_counter(), 0
                while time.perf_counter() - began < seconds or taken < 4:
                    take()
                    taken += 1
                protocol.synchronize(device)
                times[name].append((time.perf_counter() - began) / taken)
                spent[name] += cpu_seconds() - cpu
                count[name] += taken * batch
    return times, {name: spent[name] / count[name] for name in openers}


def load_rows(size: int, arguments: argparse.Namespace, kinds: list[str], rate: float) -> list[protocol.Row]:
    device, batch = arguments.device, arguments.batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder, size, max(arguments.images, 2 * batch))
        in_zip = min(len(store.train), 2048)
        make_zip(store, folder / "set.zip", in_zip)
        check(store, folder, kinds, batch, device, in_zip)
        openers: dict[str, Any] = {kind: lambda kind=kind: ours(kind, store, batch, device) for kind in kinds}
        openers["reference-loader"] = lambda: reference(folder / "set.zip", store, in_zip, batch, device)
        times, cpu = measure(openers, batch, device, arguments.rounds, arguments.seconds)
        resident = opened("resident", store, batch, device)
        static = resident.static()
        resident.fill(static, resident.host(0))
        gathers = protocol.interleave({"gather": lambda: resident.batch(static)}, rounds=50, device=device, seconds=10)

    nbytes = batch * StoreRows(store.train, seed=SEED, use_noisy=True).nbytes / len(store.train)
    floor, text = 2 * nbytes / rate, f"batch {batch}, {3 * size * size + 6 * size * size:,} bytes"
    print(f"{size}x{size}: images/s (CPU time an image, us): " + ", ".join(
        f"{name} {batch / statistics.median(times[name]):,.0f} ({cpu[name] * 1e6:.1f})" for name in times
    ))  # fmt: skip
    rows = []
    for kind in kinds:
        pair = protocol.Times((kind, "reference-loader"))
        pair.update({name: times[name] for name in pair})
        for row in protocol.rows_of(f"load {size} {kind}", kind, pair, floor=floor, agreement={}, size=text):
            rates = {"images_per_second": batch / row.ms * 1e3, "cpu_us": cpu[kind] * 1e6,
                     "reference_images_per_second": batch / row.ms_competitor * 1e3,
                     "reference_cpu_us": cpu["reference-loader"] * 1e6}  # fmt: skip
            rows.append(replace(row, rates=rates))
    gathers["copy"] = [floor] * len(gathers["gather"])
    rows += protocol.rows_of(f"gather {size}", "gather", gathers, floor=floor, agreement={}, size=text)
    return rows


def wait_row(preset: str, kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The median share of a step's time that its device waits, after two steps."""
    batch = _WAIT_BATCH.get(preset, 4) if arguments.device.type == "cpu" else 64
    size = PIXELS.get(preset, 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder, size, 256)
        options = {
            "data": {"loader": kind, "use_labels": False},
            "training": {"batch": batch, "device": arguments.device.type, "augment": 0.0},
        }
        request = TrainRequest(data=str(folder / "store"), preset=preset, options=options)
        trainer = Trainer(RunFolder(create_run(plan(request), folder / "run")), World(device=arguments.device))
        seconds, shares = [], []
        for k in range(2 + _WAIT_STEPS):
            began = time.perf_counter()
            result = trainer.step(k * batch)
            seconds.append(time.perf_counter() - began)
            shares.append(result.data_wait / seconds[-1])
        trainer.loader.close()
    share = statistics.median(shares[2:])
    row = {"work": f"wait {preset} {kind}", "size": f"batch {batch}", "share": share, "working": 1 - share,
           "ms": statistics.median(seconds[2:]) * 1e3}  # fmt: skip
    print(f"{row['work']:<36}{row['size']:<24}waits {share:.3%} of a step of {row['ms']:.1f} ms")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=int, default=512, help="images a batch (default 512)")
    add("--images", type=int, default=8192, help="images in a store (default 8192)")
    add("--pixels", type=int, nargs="+", default=[32, 64], metavar="R", help="sizes (default 32 64)")
    add("--seconds", type=float, default=1.0, help="of each way in each round (default 1)")
    add("--wait-preset", default="cifar10-ddpmpp", metavar="NAME", help="whose steps wait; none: leave it out")
    protocol.arguments(parser, rounds=5, competitors=False)
    arguments = parser.parse_args()
    if arguments.device.type == "cpu":
        keep_freed_memory()  # as a training run does
    missing = dali.missing(arguments.device)
    kinds = [kind for kind in LOADERS if kind != "dali" or missing is None]
    if missing is not None:
        print(f"dali is left out: {missing}")
    rate = protocol.copy_rate(arguments.device)
    print(f"copy {rate / 1e9:.1f} GB/s read and written")
    rows = [row for size in arguments.pixels for row in load_rows(size, arguments, kinds, rate)]
    waits = [] if arguments.wait_preset == "none" else [wait_row(arguments.wait_preset, k, arguments) for k in kinds]
    protocol.write(rows, arguments, results="data_loading", more=waits)


if __name__ == "__main__":
    main()
