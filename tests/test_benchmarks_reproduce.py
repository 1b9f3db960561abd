"""benchmarks/reproduce.py: its sweeps, what it calls clear, and a document of measured rows alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sweep import here, row  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import reproduce
import reproduce_page

from fastambient.sweep import cells
from fastambient.sweep.results import summarize

SETTINGS = {
    "data": "digits", "resolution": 8, "train": 100, "holdout": 1697, "kimg": 64.0, "num": 1000, "seeds": [0, 1, 2],
    "weight_decay": 0.05, "stop_rate": 0.05, "assignments": ["data.train=100"], "sigma_tn": [0.0, 0.2],
    "baselines": ["early-stop"],
}  # fmt: skip


DAY = {"device": "a machine", "date": "2026-11-24"}


def swept(*rows: tuple[str, float, float, float], seeds: tuple[int, ...] = (0, 1, 2)) -> dict:
    """What a sweep returns, with seeds that differ a little; rows of (kind, sigma_tn, controlled rate, FD)."""
    shift = (-0.01, 0.0, 0.01)
    found = [row(k, s, seed, rate + shift[seed], fd + shift[seed]) for seed in seeds for k, s, rate, fd in rows]
    return summarize(found, target=0.05, within=0.1) | {"settings": SETTINGS | {"seeds": list(seeds)}}


def test_what_is_clear_of_the_noise():
    summary = swept(("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), ("early-stop", 0, 0.1, 1.9),
                    ("weight-decay", 0, 0.1, 1.3), ("fresh-noise", 0.2, 0.05, 1.9))  # fmt: skip
    found = {r["against"]: (r["found"], r["clear"]) for r in reproduce_page.differences(summary)}
    assert found == {
        "edm": ("better", True), "early-stop": ("better", True), "weight-decay": ("worse", False),
        "fresh-noise": ("a trade", False),
    }  # fmt: skip
    summary["cells"] = [c for c in summary["cells"] if c["seed"] == 0]
    assert not any(r["clear"] for r in reproduce_page.differences(summary)), "one seed shows nothing"
    assert {r["found"] for r in reproduce_page.differences(summary)} == {"one seed: no claim"}


def test_each_run_where_it_is_best(tmp_path):
    """Distances alone decide there, and early-stop, which is EDM again, is left out."""
    summary = swept(("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), ("early-stop", 0, 0.1, 1.9))
    assert reproduce_page.differences(summary, at="best") == []
    for cell in summary["cells"]:
        fd = {"edm": 1.4, "ambient": 1.3 + 0.01 * cell["seed"], "early-stop": 1.0}[cell["kind"]]
        best = {"kimg": 10.0, "samples": 512, "excess": 0.02 * cell["sigma_tn"] * 5, "fd": fd}
        cell |= {"best": best, "audits": [best | {"kimg": 5.0, "fd": 9.0}, best]}
    (found,) = reproduce_page.differences(summary, at="best")
    assert (found["against"], found["found"], found["seeds"]) == ("edm", "better", 3)
    assert found["fd"]["mean"] == pytest.approx(-0.09) and found["excess"]["mean"] == pytest.approx(0.02)
    reproduce_page.merge(tmp_path / "sweep-a.json", summary, **DAY)
    assert "so that EDM is EDM stopped early" in reproduce_page.document(tmp_path)
    reproduce_page.write_page(tmp_path, tmp_path / "results.md")
    assert "(training-a.svg)" in (tmp_path / "results.md").read_text()
    svg = (tmp_path / "training-a.svg").read_text()
    assert "<!-- ambient 0.2 -->" in svg and "<!-- EDM -->" in svg and "<!-- early stop -->" not in svg


def test_each_run_where_its_copying_passes_the_target(tmp_path):
    """Both copy alike there, so that the distance decides; a seed whose run never passes it is left out."""
    summary = swept(("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5))
    for cell in summary["cells"]:
        far = 2.0 + 0.01 * cell["seed"] - (0.5 if cell["kind"] == "ambient" else 0)
        last = 0.04 if cell["name"] == "ambient-0.2-2" else 0.06
        pairs = ((5.0, 0.0, far), (6.0, last, far))
        cell["audits"] = [{"kimg": k, "samples": 512, "excess": e, "fd": fd} for k, e, fd in pairs]
    summary |= summarize(summary["cells"], target=0.05, within=0.1)
    (found,) = reproduce_page.differences(summary, at="passing")
    assert (found["seeds"], found["found"], found["clear"]) == (2, "not all come to it: no claim", False)
    summary["cells"] = [c for c in summary["cells"] if c["seed"] < 2]
    (found,) = reproduce_page.differences(summary, at="passing")
    assert (found["seeds"], found["found"]) == (2, "better") and found["fd"]["mean"] == pytest.approx(-0.5)
    assert found["excess"]["mean"] == pytest.approx(0.0)
    reproduce_page.merge(tmp_path / "sweep-a.json", summary, **DAY)
    text = reproduce_page.document(tmp_path)
    assert "The same where copying passes 5 %, so that both copy alike" in text
    # from none to 6 % both are at the same distance, whatever the share and however it is found; 10 % is not reached
    lines = [line for line in text.splitlines() if line.startswith("| ambient | 0.2 | 2 | ") and "% | -" in line]
    assert lines == [f"| ambient | 0.2 | 2 | {s} % | {' | '.join(['-0.5'] * 2)} |" for s in (2, 5)]
    lonely = [c for c in summary["cells"] if c["seed"] == 0]
    assert reproduce_page._at_shares(lonely) == [], "one seed tells nothing"


def test_a_share_of_copies_is_found_by_rates_and_by_log_odds():
    """One in ten of the way by the rates is further by the log-odds, and the distances there differ."""
    summary = swept(("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5))
    for cell in summary["cells"]:
        steep = (0.0, 0.5) if cell["kind"] == "edm" else (0.04, 0.06)
        cell["audits"] = [
            {"kimg": k, "samples": 512, "excess": e, "fd": 10.0 - k} for k, e in zip((0, 1), steep, strict=True)
        ]
    (row,) = [line for line in reproduce_page._at_shares(summary["cells"]) if "| 5 % |" in line]
    by_odds, by_rates = (float(cell.split("(")[0]) for cell in row.split("|")[5:7])
    assert by_rates == pytest.approx(-0.4, abs=0.01) and by_odds == pytest.approx(0.03, abs=0.01), (
        "a steep curve is late"
    )
    summary |= summarize(summary["cells"], target=0.05, within=0.1)
    (found,) = reproduce_page.differences(summary, at="passing")
    known = sum(c["passing"]["fd_sd"] ** 2 for c in summary["cells"]) ** 0.5 / 3
    low, high = found["fd"]["interval"]
    assert known > 0.05 and high - low == pytest.approx(2 * 1.96 * known), "seeds that agree are no certainty"
    assert "+0.03" in row and f"({low:+.3g} to {high:+.3g})" in row


def test_better_in_one_needs_the_other_settled():
    """Fewer copies with a distance that may be much worse is no gain; a baseline is told from EDM, too."""
    summary = swept(("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), ("weight-decay", 0, 0.55, 1.5))
    for cell in summary["cells"]:
        cell["fd"] += (0.2 if cell["kind"] == "ambient" else 0.0) * (cell["seed"] - 1)
    found = {r["against"]: r for r in reproduce_page.differences(summary)}
    assert found["edm"]["found"] == "better in copies, FD open" and not found["edm"]["clear"]
    (plain,) = reproduce_page.differences(summary, against_edm=True)
    assert (plain["ours"], plain["against"], plain["found"]) == ("weight-decay", "edm", "better")


def test_a_part_without_early_stopping_says_nothing_of_it(tmp_path):
    reproduce_page.merge(tmp_path / "sweep-a.json", swept(("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5)), **DAY)
    text = reproduce_page.document(tmp_path).partition("## a")[2]
    assert (
        "| 0.2 | EDM | 3 |" in text and "early stop" not in text and "weight decay" not in text.partition("| model")[0]
    )


def test_ambient_and_edm_stopped_by_the_same_rule_are_compared(tmp_path):
    summary = swept(("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), ("early-stop", 0, 0.02, 1.9),
                    ("ambient-stop", 0.2, 0.02, 1.4))  # fmt: skip
    found = [(r["ours"], r["against"], r["found"]) for r in reproduce_page.differences(summary)]
    assert found[-1] == ("ambient-stop", "early-stop", "better") and len(found) == 3
    reproduce_page.merge(tmp_path / "sweep-a.json", summary, **DAY)
    text = reproduce_page.document(tmp_path)
    assert "| 0.2, stopped | early stop | 3 | +0.0" in text and "| ambient, stopped | 0.2 | 3 |" in text
    assert (
        "Both stopped by the same rule, the ambient model is better than EDM, clear of the noise, at sigma_tn 0.2."
        in text
    )
    even = swept(("early-stop", 0, 0.02, 1.9), ("ambient-stop", 0.2, 0.02, 1.9))
    reproduce_page.merge(tmp_path / "sweep-b.json", even, **DAY)
    assert "Both stopped by the same rule, ambient models and EDM are not told apart." in reproduce_page.document(
        tmp_path
    )


def test_files_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("pictures-16-100", "digits-300", "pictures-16", "digits-30", "pictures-32"):
        reproduce_page.merge(tmp_path / f"sweep-{name}.json", swept(("edm", 0, 0.6, 1.5)), **DAY)
    found = list(reproduce_page.row_files(tmp_path))
    assert found == ["digits-30", "digits-300", "pictures-16", "pictures-16-100", "pictures-32"]
    other = swept(("edm", 0, 0.6, 1.5))
    other["settings"] = other["settings"] | {"data": "/home/somebody/pictures.zip"}
    reproduce_page.merge(tmp_path / "sweep-x.json", other, **DAY)
    assert "somebody" not in (tmp_path / "sweep-x.json").read_text()


def test_the_document_holds_what_was_measured_and_nothing_else(tmp_path):
    page = tmp_path / "results.md"
    assert "Nothing is measured yet" in reproduce_page.document(tmp_path, page)
    many = ("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), ("early-stop", 0, 0.1, 1.9)
    reproduce_page.merge(tmp_path / "sweep-digits-100.json", swept(*many), **DAY)
    copying = ("edm", 0, 0.6, 1.5), ("ambient", 0.375, 0.6, 1.5), ("early-stop", 0, 0.6, 1.5)
    reproduce_page.merge(tmp_path / "sweep-pictures-16.json", swept(*copying), **DAY)
    reproduce_page.write_page(tmp_path, page)
    text = page.read_text()
    first, second = text.split("## ")[1:]
    assert first.startswith("digits-100\n") and second.startswith("pictures-16\n") and "digits-300" not in text
    assert "clear of the noise between seeds, at sigma_tn 0.2." in first
    assert "At no sigma_tn is the gain over EDM and over early stopping clear" in second
    assert (tmp_path / "pareto-digits-100.svg").is_file() and "(pareto-pictures-16.svg)" in second
    begin, end = reproduce_page.READING
    assert f"{begin}\n{end}\n" in text
    page.write_text(text.replace(end, f"What they show.\n\nMore.\n{end}").replace("a machine", "another"))
    again = reproduce_page.document(tmp_path, page)
    assert again == text.replace(end, f"What they show.\n\nMore.\n{end}"), "people's reading is kept, no number is"
    assert "a machine, measured 2026-11-24" in first and "64 kimg a run" in first and "seeds [0, 1, 2]" in first
    assert "| 0.2 | EDM | 3 | -50.0 | +0 | better |" in first.replace("-0 ", "+0 ")
    assert "denoised" not in text and "training-" not in text, "no audits were made on the way"
    (tmp_path / "denoised-digits-100.png").write_bytes(b"a picture")
    assert "(denoised-digits-100.png)" in reproduce_page.document(tmp_path, page).split("## pictures-16")[0]


def test_seeds_that_were_measured_apart_are_one_sweep(tmp_path, capsys):
    """On other days or machines: the same page as from one sweep, but for the days."""
    cells = ("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5)
    for name in ("one", "apart"):
        (tmp_path / name).mkdir()
    reproduce_page.merge(tmp_path / "one" / "sweep-a.json", swept(*cells), **DAY)
    apart = tmp_path / "apart" / "sweep-a.json"
    reproduce_page.merge(apart, swept(*cells, seeds=(2,)), device="a machine", date="2026-11-26")
    assert "One seed: nothing is claimed." in reproduce_page.document(apart.parent)
    reproduce_page.merge(apart, swept(("edm", 0, 0.9, 9.0), cells[1], seeds=(0, 1)), **DAY)
    reproduce_page.merge(apart, swept(*cells, seeds=(0, 1)), **DAY)  # again: replaced
    found = json.loads(apart.read_text())
    assert found["settings"]["seeds"] == [0, 1, 2] and len(found["rows"]) == 6
    assert {r["seed"]: r["date"] for r in found["rows"]}[2] == "2026-11-26"
    one, two = (reproduce_page.document(tmp_path / name) for name in ("one", "apart"))
    assert two == one.replace("measured 2026-11-24", "measured 2026-11-24 and 2026-11-26")
    assert not capsys.readouterr().err
    other = swept(*cells, seeds=(0,))
    other["settings"]["kimg"] = 32.0
    reproduce_page.merge(apart, other, **DAY)
    assert len(json.loads(apart.read_text())["rows"]) == 2
    assert "other settings (kimg 64.0, now 32.0)" in capsys.readouterr().err


def test_the_page_in_the_repository_is_that_of_its_rows():
    root = Path(reproduce.__file__).parent.parent
    page = root / "docs" / "results.md"
    assert reproduce_page.document(root / "benchmarks" / "results", page) == page.read_text(), "run make tables"


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
    assert [r.audit_every for r in found.values()] == [None, 16.0, 2.0]
    assert {r.noise_seed for r in found.values()} == {1000} and found["digits-30"].seeds == (0, 1, 2)
    (apart,) = reproduce.requests(arguments("--part", "digits-30", "--seeds", "2", "--gpus", "0")).values()
    assert apart.seeds == (2,) and not {c.name for c in cells(apart)} & {
        c.name
        for c in cells(
            reproduce.requests(arguments("--part", "digits-30", "--seeds", "0,1", "--gpus", "0"))["digits-30"]
        )
    }, "no noise twice"
    assert {len(cells(r)) for r in found.values()} == {27} and found["digits-300"].kimg == 192
    found = reproduce.requests(arguments("--part", "pictures,figures", "--source", "x.zip", "--gpus", "0"))
    names = ["pictures-16", "pictures-32", "pictures-16-100"]
    splits = [f"pictures-16-100-splits/seed{seed}" for seed in (0, 1, 2)]
    assert list(found) == [*(x for each in names for x in (each, f"{each}-many")), "pictures-16-100-audited", *splits]
    audited = found.pop("pictures-16-100-audited")
    for seed, request in enumerate(found.pop(name) for name in splits):
        assert request.assignments == [*audited.assignments, f"data.split_seed={seed}"]
        assert request.seeds == (seed,) and [c.kind for c in cells(request)] == ["edm", "ambient"]
    assert audited.audit_every == 6 and "evaluation.audit_features=efficientnet-lite0" in audited.assignments
    assert audited.sigma_tn == (0, 0.375) and len(cells(audited)) == 9
    assert found["pictures-16-100"].kimg == 96 and "data.train=100" in found["pictures-16-100"].assignments
    assert {r.features for r in found.values()} == {"efficientnet-lite0"}
    assert found["pictures-16"].audit_every == 24
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


def test_a_precision_is_the_machines_choice_and_each_row_says_its_own(tmp_path, monkeypatch, capsys):
    """bf16 without units for it is many times slower than float32; seeds of both are one sweep."""
    for units, gpus, precision in ((False, "0", "fp32"), (True, "0", "bf16"), (False, "1", "bf16")):
        monkeypatch.setattr(reproduce, "bf16_on_cpu", lambda units=units: units)
        for request in reproduce.requests(
            arguments("--part", "pictures", "--source", "x.zip", "--gpus", gpus)
        ).values():
            assert [x for x in request.assignments if "precision" in x] == [f"training.precision={precision}"]
    for seed, precision in ((0, "bf16"), (1, "fp32")):
        summary = swept(("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), seeds=(seed,))
        summary["settings"] = summary["settings"] | {
            "assignments": [f"training.precision={precision}", "data.train=100"]
        }
        for cell in summary["cells"]:
            cell["precision"] = precision
        reproduce_page.merge(tmp_path / "sweep-a.json", summary, **DAY)
    found = json.loads((tmp_path / "sweep-a.json").read_text())
    assert [r["precision"] for r in found["rows"]] == ["bf16", "bf16", "fp32", "fp32"]
    assert found["settings"]["assignments"] == ["data.train=100"] and not capsys.readouterr().err
    when = "measured 2026-11-24"
    assert f"on a machine, bf16, {when}; on a machine, fp32, {when}." in reproduce_page.document(tmp_path)


def test_each_seed_may_have_training_images_of_its_own(tmp_path, capsys):
    """Which ones is a row's, not the experiment's, and the page says so."""
    file = tmp_path / "sweep-a.json"
    for seed in (1, 2):
        assert "images of its own" not in reproduce_page.document(tmp_path)
        summary = swept(("edm", 0, 0.6, 1.5), ("ambient", 0.2, 0.1, 1.5), seeds=(seed,))
        settings = summary["settings"]
        summary["settings"] = settings | {"assignments": [*settings["assignments"], f"data.split_seed={seed}"]}
        reproduce_page.merge(file, summary, **DAY)
    assert [(r["seed"], r["split_seed"]) for r in json.loads(file.read_text())["rows"]] == [
        (1, 1),
        (1, 1),
        (2, 2),
        (2, 2),
    ]
    assert "images of its own" in reproduce_page.document(tmp_path) and not capsys.readouterr().err


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
    drawn, run = [], subprocess.run

    def draw(command, **options):
        drawn.append(command)
        return run(command, **options) if len(drawn) < 3 else subprocess.CompletedProcess(command, 0)  # drawn by then

    monkeypatch.setattr(reproduce.subprocess, "run", draw)
    command = ["--tiny", "--out", str(tmp_path / "out"), "--source", str(tmp_path / "x.npy"), "--seeds", "0",
               "--table", str(tmp_path / "results.md"), "--rows", str(tmp_path), "--gpus", "0"]  # fmt: skip
    reproduce.main(command)
    rows = json.loads((tmp_path / "sweep-digits-100.json").read_text())["rows"]
    assert all("torch" in r["device"] and len(r["date"]) == 10 for r in rows)
    text = (tmp_path / "results.md").read_text()
    assert "## digits-100" in text and "## pictures-16" in text and text.count("\n| early stop |") == 2
    assert (tmp_path / "pareto-digits-100.svg").is_file() and "(pareto-pictures-16.svg)" in text
    for name in ("digits-100", "pictures-16"):
        with Image.open(tmp_path / f"denoised-{name}.png") as picture:
            assert min(picture.size) > 100 and len(picture.convert("RGB").getcolors(2**20)) > 50, "of all three runs"
    assert "(denoised-pictures-16.png)" in text
    assert [Path(c[-1]).name for c in drawn] == ["denoised-digits-100.png", "denoised-pictures-16.png"]
    assert all(c[3:5] == ["figure", "denoised"] and len(c) == 10 and Path(c[5]).is_dir() for c in drawn)
    ran = len(here_ran())
    reproduce.main(command)
    assert len(here_ran()) == ran, "finished cells are kept"


def here_ran():
    from test_sweep import Here

    return Here.ran
