"""``fastambient quickstart`` as it is: both models trained and measured, and the report that compares them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastambient.training.run import RunFolder

LIMIT = 600  # seconds: twice what is promised on two cores, because those of a test may be shared


@pytest.mark.slow
def test_the_quickstart_ends_in_a_report_that_compares_both(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "fastambient", "quickstart", "--out", str(tmp_path / "quick")],
        env=environment, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rates = {}
    for name, sigma_tn in (("edm", 0.0), ("ambient", 0.2)):
        run = RunFolder(tmp_path / "quick" / name)
        assert run.read_settings().noise.sigma_tn == sigma_tn and run.read_stats()[-1]["nimg"] == 64_000
        metrics = json.loads(run.metrics.read_text())
        assert metrics["counts"]["samples"] == 1000 and metrics["counts"]["train"] == 100
        assert metrics["memorization"]["gap_ratio"]["holdout_rate"] < 0.01
        rates[name] = metrics["memorization"]["gap_ratio"]["rate"]
    # Means over three seeds: 34 % (20 to 48) and 11 % (7 to 16) (docs/results.md, 100 digits).
    assert rates["ambient"] < 0.7 * rates["edm"] and rates["edm"] > 0.1
    page = (tmp_path / "quick" / "report.html").read_text()
    assert (
        "gallery" in page and f"{100 * rates['edm']:.1f}" in done.stdout and "http://" not in page.split("</head>")[0]
    )
    assert "open " in done.stderr and str(tmp_path / "quick" / "report.html") in done.stderr
