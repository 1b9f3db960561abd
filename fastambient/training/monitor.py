"""What a run reports: stats.jsonl, TensorBoard, the console line and the loss per noise level."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastambient.console import duration, say
from fastambient.training.run import RunFolder, truncate

SIGMA_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the per-sigma table, roughly even in ln sigma
_LINE_EVERY_SECONDS = 5.0


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
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Monitor:
    """Writes the logs of rank 0. `sizes` of the last checkpoint cut off what a killed run logged after it."""

    def __init__(
        self, run: RunFolder, *, nimg: int, total_nimg: int, device: torch.device, sizes: dict[str, int]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        truncate(run.stats, sizes.get("stats", 0))
        truncate(run.sigma_loss, sizes.get("sigma_loss", 0))
        self.stats = open(run.stats, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.sigma_loss = open(run.sigma_loss, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.writer = SummaryWriter(str(run.tensorboard), purge_step=nimg, flush_secs=30)
        self.total_nimg, self.device = total_nimg, device
        self.line_time, self.line_nimg = time.monotonic(), nimg
        self.start_time, self.start_nimg = self.line_time, nimg
        self.recent: list[dict[str, Any]] = []

    def sizes(self) -> dict[str, int]:
        """How long the logs are, for the checkpoint."""
        self.stats.flush()
        self.sigma_loss.flush()
        return {"stats": self.stats.tell(), "sigma_loss": self.sigma_loss.tell()}

    def step(self, record: dict[str, Any]) -> None:
        self.stats.write(json.dumps(record) + "\n")
        self.recent.append(record)
        if time.monotonic() - self.line_time >= _LINE_EVERY_SECONDS:
            self.line()

    def line(self) -> None:
        """The console line and TensorBoard's points: means since the last line."""
        if not self.recent:
            return
        now, nimg = time.monotonic(), self.recent[-1]["nimg"]
        rate = (nimg - self.line_nimg) / max(now - self.line_time, 1e-9)
        mean = lambda key: _mean([r[key] for r in self.recent])  # noqa: E731
        loss, share, bad = mean("loss"), mean("ambient_share"), sum(r["nonfinite_grads"] for r in self.recent)
        say(
            f"kimg {nimg / 1000:.1f}/{self.total_nimg / 1000:g}  loss {loss:.4g}  {rate:,.0f} images/s"
            f"  {1000 / rate:.3g} sec/kimg  ambient {share:.0%}  memory {peak_memory(self.device) / 2**30:.2f} GiB"
            f"  {duration(self._seconds_left(now, nimg))} left" + (f"  {bad} non-finite gradients" if bad else "")
        )
        points = {"loss": loss, "ambient_share": share, "images_per_second": rate, "nonfinite_grads": bad}
        for name, value in (points | {k: self.recent[-1][k] for k in ("lr", "grad_norm")}).items():
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

    def picture(self, name: str, image: Any, nimg: int) -> None:
        self.writer.add_image(name, image, nimg)

    def close(self) -> None:
        self.stats.close()
        self.sigma_loss.close()
        self.writer.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
