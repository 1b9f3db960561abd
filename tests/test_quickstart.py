"""``fastambient quickstart`` as it is: both models trained and measured, and the report that compares them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import make_run

from fastambient import quickstart as module
from fastambient.errors import InputError
from fastambient.training.run import RunFolder

LIMIT = 600  # seconds: twice what is promised on two cores, because those of a test may be shared


def test_an_earlier_quickstart_is_replaced_whole_and_before_the_new_one_begins(tmp_path, monkeypatch):
    """Cut off or finished: its images would count as progress of the new one. What is no run stays."""
    begun = []
    monkeypatch.setattr(
        module, "train_side_by_side", lambda runs, nimg: begun.append([p.exists() for p, _ in runs]) or 1 / 0
    )
    for name in ("edm", "ambient"):
        make_run(tmp_path / "quick" / name)
    with pytest.raises(InputError, match="exists and is not empty"):
        module.quickstart(tmp_path / "quick")
    with pytest.raises(ZeroDivisionError):
        module.quickstart(tmp_path / "quick", force=True)
    assert begun == [[False, False]]
    (tmp_path / "quick" / "edm").mkdir()
    (tmp_path / "quick" / "edm" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds no config\.yaml"):
        module.quickstart(tmp_path / "quick", force=True)
    assert (tmp_path / "quick" / "edm" / "mine.txt").is_file() and len(begun) == 1


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
