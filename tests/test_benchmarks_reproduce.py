"""benchmarks/reproduce.py: its sweeps, what it calls clear, and a document of measured rows alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_sweep import here, row  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import reproduce

from fastambient.sweep import cells
from fastambient.sweep_results import summarize

SETTINGS = {
    "data": "digits", "resolution": 8, "train": 100, "holdout": 1697, "kimg": 64.0, "num": 1000, "seeds": [0, 1, 2],
    "weight_decay": 0.05, "stop_rate": 0.05, "assignments": ["data.train=100"],
}  # fmt: skip


def swept(folder: Path, *rows: tuple[str, float, float, float]) -> dict:
    """A sweep's files, three seeds that differ a little; rows of (kind, sigma_tn, controlled rate, FD)."""
    shift = (-0.01, 0.0, 0.01)
    found = [row(k, s, seed, rate + shift[seed], fd + shift[seed]) for seed in range(3) for k, s, rate, fd in rows]
    summary = summarize(found, target=0.05, within=0.1) | {"settings": SETTINGS}
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(summary))
    (folder / "machine.json").write_text(json.dumps({"machine": "a machine", "date": "2026-11-24"}))
    return summary


def test_what_is_clear_of_the_noise(tmp_path):
    summary = swept(tmp_path / "a", ("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), ("early-stop", 0, 0.1, 1.9),
                    ("weight-decay", 0, 0.1, 1.3), ("fresh-noise", 0.2, 0.05, 1.9))  # fmt: skip
    found = {r["against"]: (r["found"], r["clear"]) for r in reproduce.differences(summary)}
    assert found == {
        "edm": ("better", True), "early-stop": ("better", True), "weight-decay": ("worse", False),
        "fresh-noise": ("a trade", False),
    }  # fmt: skip
    summary["cells"] = [c for c in summary["cells"] if c["seed"] == 0]
    assert not any(r["clear"] for r in reproduce.differences(summary)), "one seed shows nothing"
    assert {r["found"] for r in reproduce.differences(summary)} == {"one seed: no claim"}


def test_each_run_where_it_is_best(tmp_path):
    """Distances alone decide there, and early-stop, which is EDM again, is left out."""
    summary = swept(tmp_path / "a", ("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), ("early-stop", 0, 0.1, 1.9))
    assert reproduce.differences(summary, at_best=True) == []
    for cell in summary["cells"]:
        fd = {"edm": 1.4, "ambient": 1.3 + 0.01 * cell["seed"], "early-stop": 1.0}[cell["kind"]]
        cell["best"] = {"kimg": 10.0, "samples": 512, "excess": 0.02 * cell["sigma_tn"] * 5, "fd": fd}
    (found,) = reproduce.differences(summary, at_best=True)
    assert (found["against"], found["found"], found["seeds"]) == ("edm", "better", 3)
    assert found["fd"]["mean"] == pytest.approx(-0.09) and found["excess"]["mean"] == pytest.approx(0.02)
    (tmp_path / "a" / "sweep.json").write_text(json.dumps(summary))
    assert "so that EDM is EDM stopped early" in reproduce.document(tmp_path)


def test_the_document_holds_what_was_measured_and_nothing_else(tmp_path):
    assert "Nothing is measured yet" in reproduce.document(tmp_path)
    swept(tmp_path / "digits-100", ("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), ("early-stop", 0, 0.1, 1.9))
    swept(tmp_path / "pictures-16", ("edm", 0, 0.6, 1.5), ("ambient", 0.375, 0.6, 1.5), ("early-stop", 0, 0.6, 1.5))
    swept(tmp_path / "digits-100-many", ("edm", 0, 0.6, 1.5))
    (tmp_path / "digits-300").mkdir()  # not finished
    text = reproduce.document(tmp_path)
    first, second = text.split("## ")[1:]
    assert first.startswith("digits-100\n") and second.startswith("pictures-16\n") and "digits-300" not in text
    assert "clear of the noise between seeds, at sigma_tn 0.2." in first
    assert "At no sigma_tn is the gain over EDM and over early stopping clear" in second
    begin, end = reproduce.READING
    assert f"{begin}\n{end}\n" in text
    read = text.replace(end, f"What they show.\n\nMore.\n{end}").replace("a machine", "another")
    again = reproduce.document(tmp_path, read)
    assert again == text.replace(end, f"What they show.\n\nMore.\n{end}"), "people's reading is kept, no number is"
    assert reproduce.document(tmp_path, again) == again
    assert "a machine, measured 2026-11-24" in first and "64 kimg a run" in first and "seeds [0, 1, 2]" in first
    assert "| 0.2 | EDM | 3 | -50.0 (-50.0 to -50.0) | +0 (+0 to +0) | better |" in first.replace("-0 ", "+0 ")


def arguments(*argv: str):
    taken = {}

    def stop(arguments):
        taken["a"] = arguments
        raise SystemExit

    original = reproduce.requests
    reproduce.requests = stop
    try:
        with pytest.raises(SystemExit):
            reproduce.main(list(argv))
    finally:
        reproduce.requests = original
    return taken["a"]


def test_the_sweeps_of_each_part():
    found = reproduce.requests(arguments("--part", "digits", "--gpus", "0"))
    assert list(found) == ["digits-100", "digits-300", "digits-30"]
    assert [r.audit_every for r in found.values()] == [None, None, 2.0]
    assert {len(cells(r)) for r in found.values()} == {27} and found["digits-300"].kimg == 192
    found = reproduce.requests(arguments("--part", "pictures,figures", "--source", "x.zip", "--gpus", "0"))
    assert list(found) == ["pictures-16", "pictures-16-many", "pictures-32", "pictures-32-many"]
    assert found["pictures-16"].sigma_tn == (0, 0.1875, 0.375, 0.75) and found["pictures-32"].sigma_tn[2] == 0.75
    assert "data.train=300" in found["pictures-32"].assignments
    assert "data.train=10000" in found["pictures-32-many"].assignments and len(cells(found["pictures-32-many"])) == 1
    assert list(reproduce.requests(arguments("--part", "digits-300", "--source", "x.zip", "--gpus", "0"))) == [
        "digits-300"
    ]
    found = reproduce.requests(arguments("--part", "pictures-16,figures", "--source", "x.zip", "--gpus", "0"))
    assert list(found) == ["pictures-16", "pictures-16-many"]
    rehearsal = reproduce.requests(arguments("--tiny", "--source", "x.zip", "--gpus", "0"))
    assert list(rehearsal) == ["digits-100", "digits-100-many", "pictures-16", "pictures-16-many"]
    for part in reproduce.PARTS:
        assert part == "figures" or reproduce.requests(
            arguments("--tiny", "--part", part, "--source", "x.zip", "--gpus", "0")
        ), part
    with pytest.raises(SystemExit):
        reproduce.main(["--part", "digit"])


def test_where_results_go_is_there_before_the_first_run(tmp_path, monkeypatch):
    def sweep(request, out):
        assert (tmp_path / "rows").is_dir() and (tmp_path / "docs").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "sweep", sweep)
    command = ["--part", "digits-30", "--rows", str(tmp_path / "rows"), "--table", str(tmp_path / "docs" / "r.md")]
    with pytest.raises(KeyboardInterrupt):
        reproduce.main([*command, "--out", str(tmp_path / "out"), "--gpus", "0"])


@pytest.mark.slow
def test_a_rehearsal(tmp_path, here, monkeypatch, capsys):  # noqa: F811
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (60, 16, 16, 3), dtype=np.uint8))
    drawn = []
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command, **k: drawn.append(command) or type("D", (), {"returncode": 0}))  # fmt: skip
    command = ["--tiny", "--out", str(tmp_path / "out"), "--source", str(tmp_path / "x.npy"), "--seeds", "1",
               "--table", str(tmp_path / "results.md"), "--rows", str(tmp_path), "--gpus", "0"]  # fmt: skip
    reproduce.main(command)
    assert {"device", "date", "rows"} <= set(json.loads((tmp_path / "sweep-digits-100.json").read_text()))
    text = (tmp_path / "results.md").read_text()
    assert "## digits-100" in text and "## pictures-16" in text and text.count("\n| early stop |") == 2
    drawing = (tmp_path / "out" / "digits-100" / "pareto.svg").read_bytes()
    assert (tmp_path / "pareto-digits-100.svg").read_bytes() == drawing and "(pareto-pictures-16.svg)" in text
    assert [Path(c[-1]).name for c in drawn] == ["denoised-digits-100.png", "denoised-pictures-16.png"]
    assert all(c[3:5] == ["figure", "denoised"] and len(c) == 10 and Path(c[5]).is_dir() for c in drawn)
    ran = len(here_ran())
    reproduce.main(command)
    assert len(here_ran()) == ran, "finished cells are kept"


def here_ran():
    from test_sweep import Here

    return Here.ran
