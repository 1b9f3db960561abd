"""One cell of a sweep, in a process of its own: ``python -m fastambient.sweep.cell RUN NUM DEVICE FEATURES``.

What ``train --resume``, ``sample`` and ``evaluate`` do one after the other, in one process, because starting three
takes longer than measuring a small run. measured.json is written last: how it was measured and what came of it,
whatever ``evaluate`` makes of metrics.json later.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from fastambient.errors import FastambientError
from fastambient.files import write_json
from fastambient.sweep.results import MEASURED, SAMPLES, marker


def run_cell(path: Path, num: int, device: str, features: str) -> None:
    """Train the run to its end, draw seeds 0 to num-1 into samples.npz, and measure them into metrics.json."""
    from fastambient.evaluation.run import evaluate_run
    from fastambient.sampling import write_samples
    from fastambient.training.start import start

    start(path, resume=True, device=device)
    write_samples(path, range(num), path / SAMPLES, device=device, force=True)
    found = evaluate_run(path, samples=path / SAMPLES, device=device, features=features)
    write_json(path / MEASURED, marker(num, features) | {"metrics": found.metrics})


def main(arguments: list[str]) -> int:
    """Exit codes and the one line of an error are the command line's."""

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, terminate)
    path, num, device, features = arguments
    try:
        run_cell(Path(path), int(num), device, features)
    except FastambientError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
