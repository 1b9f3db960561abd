"""What a run reports: stats.jsonl, TensorBoard, the console line and the loss per noise level."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastambient.console import duration, say, warn
from fastambient.nvml import Gpu, Reading, summary
from fastambient.system import peak_resident
from fastambient.training.audits import excess
from fastambient.training.distributed import World
from fastambient.training.run import RunFolder, truncate

SIGMA_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the per-sigma table, roughly even in ln sigma
_LINE_EVERY_SECONDS = 5.0
_MUCH_WAITING = 0.1  # of a step, for data: a run is told so once
_GPU_POINTS = ("gpu_util", "gpu_memory_gb", "gpu_power_w", "gpu_clock_mhz", "gpu_memory_clock_mhz", "joules_per_image")


class SigmaLoss:
    """Sums of loss and counts of draws per bin of sigma, since the last row of the table."""

    def __init__(self, device: torch.device) -> None:
        self.edges = torch.tensor(SIGMA_EDGES, device=device)
        self.sums = torch.zeros(2, len(SIGMA_EDGES) + 1, dtype=torch.float64)

    def bin(self, sigma: Tensor, loss: Tensor) -> Tensor:
        """float64 [2, bins]: loss sums and counts of one micro-batch."""
        index = torch.bucketize(sigma, self.edges, right=True)
        out = torch.zeros(2, len(SIGMA_EDGES) + 1, dtype=torch.float64, device=sigma.device)
        return out.index_add_(1, index, torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)]))

    def row(self, nimg: int) -> dict[str, Any]:
        """The mean loss per bin since the last row; starts the next one."""
        loss, count = self.sums.tolist()
        self.sums.zero_()
        lower, upper = (0.0, *SIGMA_EDGES), (*SIGMA_EDGES, None)
        bins = [
            {"sigma_from": lo, "sigma_to": hi, "draws": int(n), "loss": value / n if n else None}
            for lo, hi, value, n in zip(lower, upper, loss, count, strict=True)
        ]
        return {"nimg": nimg, "bins": bins}


def sigma_table(row: dict[str, Any]) -> str:
    """A row of sigma_loss.jsonl for people: upper ends of the bins above, mean loss below."""
    heads = [f"<{edge:g}" for edge in SIGMA_EDGES] + [f">={SIGMA_EDGES[-1]:g}"]
    values = ["-" if b["loss"] is None else f"{b['loss']:.3g}" for b in row["bins"]]
    line = lambda cells: "".join(cell.rjust(9) for cell in cells)  # noqa: E731
    return f"sigma{line(heads)}\nloss {line(values)}"


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation, or this process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


def gpu_fields(gpu: Gpu | None, world: World, *, images: int) -> dict[str, Any]:
    """`summary` of every rank's GPU, on every rank; `images` of all ranks since the last call. All ranks must call."""
    names = [field.name for field in dataclasses.fields(Reading)]
    table = torch.zeros((world.size, len(names)), dtype=torch.float64)
    own = dataclasses.astuple(gpu.read()) if gpu is not None else [None] * len(names)
    table[world.rank] = torch.tensor([math.nan if value is None else value for value in own], dtype=torch.float64)
    rows = world.sum(table.to(world.device)).tolist()
    readings = [Reading(*(None if math.isnan(value) else value for value in row)) for row in rows]
    return summary(readings, images=images)


def _gpu_words(record: dict[str, Any]) -> str:
    """The console line's part on the GPU: as much as there is."""
    parts = [
        f"{record[name]:{form}}{unit}"
        for name, form, unit in (
            ("gpu_util", ".0f", " %"), ("gpu_power_w", ".0f", " W"), ("gpu_clock_mhz", ".0f", " MHz"),
            ("joules_per_image", ".3g", " J/image"),
        ) if name in record
    ]  # fmt: skip
    parts += record.get("gpu_throttle", [])
    return f"  GPU {', '.join(parts)}" if parts else ""


class Monitor:
    """Writes the logs of rank 0. `sizes` of the last checkpoint cut off what a killed run logged after it."""

    def __init__(
        self, run: RunFolder, *, nimg: int, total_nimg: int, device: torch.device, sizes: dict[str, int],
        stop_rate: float | None = None,
    ) -> None:  # fmt: skip
        from torch.utils.tensorboard import SummaryWriter

        truncate(run.stats, sizes.get("stats", 0))
        truncate(run.sigma_loss, sizes.get("sigma_loss", 0))
        truncate(run.audits, sizes.get("audits", 0))
        self.run = run
        self.stats = open(run.stats, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.sigma_loss = open(run.sigma_loss, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.writer = SummaryWriter(str(run.tensorboard), purge_step=nimg, flush_secs=30)
        self.total_nimg, self.device, self.stop_rate = total_nimg, device, stop_rate
        self.line_time, self.line_nimg = time.monotonic(), nimg
        self.start_time, self.start_nimg = self.line_time, nimg
        self.recent: list[dict[str, Any]] = []
        self._waiting_said: bool | None = None  # None: no line yet, whose steps had to wait for readers to start

    def sizes(self) -> dict[str, int]:
        """How long the logs are, for the checkpoint."""
        self.stats.flush()
        self.sigma_loss.flush()
        audits = self.run.audits.stat().st_size if self.run.audits.exists() else 0
        return {"stats": self.stats.tell(), "sigma_loss": self.sigma_loss.tell(), "audits": audits}

    def step(self, record: dict[str, Any]) -> None:
        self.stats.write(json.dumps(record) + "\n")
        self.recent.append(record)

    def line_due(self) -> bool:
        return time.monotonic() - self.line_time >= _LINE_EVERY_SECONDS

    def line(self) -> None:
        """The console line and TensorBoard's points: means since the last line."""
        if not self.recent:
            return
        now, nimg = time.monotonic(), self.recent[-1]["nimg"]
        rate = (nimg - self.line_nimg) / max(now - self.line_time, 1e-9)
        mean = lambda key: _mean([r[key] for r in self.recent])  # noqa: E731
        rates = {key: mean(key) for key in ("tflops", "mfu") if key in self.recent[-1]}
        loss, share, bad = mean("loss"), mean("ambient_share"), sum(r["nonfinite_grads"] for r in self.recent)
        say(
            f"kimg {nimg / 1000:.1f}/{self.total_nimg / 1000:g}  loss {loss:.4g}  {rate:,.0f} images/s"
            f"  {1000 / rate:.3g} sec/kimg  {rates['tflops']:.3g} TFLOP/s"
            + (f" ({rates['mfu']:.0%} MFU)" if "mfu" in rates else "")
            + f"  ambient {share:.0%}  memory {peak_memory(self.device) / 2**30:.2f} GiB"
            f"{_gpu_words(self.recent[-1])}  {duration(self._seconds_left(now, nimg))} left"
            + (f"  {bad} non-finite gradients" if bad else "")
        )
        waiting = mean("data_wait")
        if self._waiting_said is False and waiting > _MUCH_WAITING:
            warn(
                f"{waiting:.0%} of the last steps' time went by waiting for data: the reader is slower than the step;"
                " more processes (--set data.workers=N), --loader resident if the set fits, or a faster disk help"
            )
            self._waiting_said = True
        self._waiting_said = bool(self._waiting_said)
        points = {
            "loss": loss, "ambient_share": share, "images_per_second": rate, "nonfinite_grads": bad,
            "data_wait": waiting,
        }  # fmt: skip
        last = {k: v for k, v in self.recent[-1].items() if k in ("lr", "grad_norm") or k in _GPU_POINTS}
        for name, value in (points | rates | last).items():
            self.writer.add_scalar(f"training/{name}", value, nimg)
        self.line_time, self.line_nimg = now, nimg
        self.recent.clear()

    def _seconds_left(self, now: float, nimg: int) -> float:
        """At the pace since the start, which has the pictures and checkpoints in it that are still to come, too."""
        return (self.total_nimg - nimg) * (now - self.start_time) / max(nimg - self.start_nimg, 1)

    def sigma_row(self, row: dict[str, Any]) -> None:
        self.sigma_loss.write(json.dumps(row) + "\n")
        for b in row["bins"]:
            if b["draws"]:
                self.writer.add_scalar(f"loss_per_sigma/from_{b['sigma_from']:g}", b["loss"], row["nimg"])
        say(sigma_table(row))

    def audit(self, row: dict[str, Any]) -> None:
        """A row of audits.jsonl, TensorBoard's points and the figure."""
        from fastambient.training.audits_plot import plot_audits

        with open(self.run.audits, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        points = {"copy_rate": row["rate"], "holdout_rate": row["holdout_rate"], "fd": row["fd"]}
        for name, value in (points | {"excess": excess(row)}).items():
            self.writer.add_scalar(f"audit/{name}", value, row["nimg"])
        plot_audits(self.run.path / "audits", self.run.read_audits(), rate=self.stop_rate)
        self.pause(row["seconds"])

    def pause(self, seconds: float) -> None:
        """Leave time that an audit or a grid took out of the next line's rate, which is training's."""
        self.line_time += seconds

    def picture(self, name: str, image: Any, nimg: int) -> None:
        self.writer.add_image(name, image, nimg)

    def close(self) -> None:
        self.stats.close()
        self.sigma_loss.close()
        self.writer.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
