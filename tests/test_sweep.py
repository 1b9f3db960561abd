"""Sweeps: which cells there are, that finished ones are kept, the rule that chooses, and what is drawn and said."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, cli
from safetensors.torch import load_file
from test_cli import _handlers, run, spawn, wait_for_lines  # noqa: F401

from fastambient.data.preparation import prepare
from fastambient.data.sources import open_source
from fastambient.errors import FastambientError, InputError
from fastambient.evaluation.run import evaluate_run
from fastambient.sweep import BASELINES, SweepRequest, cells, jobs, sweep
from fastambient.sweep import audited as audited_of
from fastambient.sweep import plot as sweep_plot
from fastambient.sweep import results as sweep_results
from fastambient.sweep import run as sweep_run
from fastambient.sweep.cell import main as cell_main
from fastambient.sweep.cell import run_cell
from fastambient.sweep.results import choice, choose, over_seeds, summarize, table
from fastambient.training import audits, loop
from fastambient.training.checkpoint import checkpoints, last_state
from fastambient.training.ending import go_on_from
from fastambient.training.run import RunFolder

SMALL = [*TINY, "training.batch=8", "sampling.steps=2", "evaluation.audit_num=8", "evaluation.features=none"]


def row(kind: str, sigma_tn: float, seed: int, excess: float, fd: float) -> dict:
    return {
        "name": f"{kind}-{sigma_tn:g}-{seed}", "kind": kind, "sigma_tn": sigma_tn, "seed": seed, "kimg": 1.0,
        "kimg_trained": 1.0, "stopped_when_copying": False, "seconds": 1.0, "samples": 1000, "rate": excess + 0.01,
        "ci95": [0.0, 0.5], "train_rate": excess + 0.01, "holdout_rate": 0.01, "excess": excess, "fd": fd,
        "fd_space": "pixel", "train_fd": 1.4,
    }  # fmt: skip


def chosen(*levels: tuple[float, float, float], target: float = 0.05, within: float = 0.1) -> dict:
    """`choose` over (sigma_tn, controlled rate, FD)."""
    rows = [row("ambient" if s else "edm", s, 0, rate, fd) for s, rate, fd in levels]
    return choose(summarize(rows, target=target, within=within)["configurations"], target=target, within=within)


def test_a_model_that_draws_no_real_image_is_never_chosen():
    """It copies nothing, either."""
    rows = [row("edm", 0, 0, 0.0, 17.0), row("ambient", 0.2, 0, 0.0, 18.0)]
    assert summarize(rows, target=0.05, within=0.1)["chosen"]["sigma_tn"] == 0
    rows[0]["doubt"] = rows[1]["doubt"] = "Precision is 0.00 (pixels): hardly a sample looks like a real image."
    found = summarize(rows, target=0.05, within=0.1)["chosen"]
    assert (
        found["sigma_tn"] is None
        and "sigma_tn 0, 0.2 are in doubt, those of 0 because precision is 0.00" in found["reason"]
    )
    assert found["reason"].endswith("real image; train longer")
    rows[1]["doubt"] = ""
    assert summarize(rows, target=0.05, within=0.1)["chosen"]["sigma_tn"] == 0.2


def test_the_rule_takes_the_smallest_level_that_copies_little_and_is_as_good():
    found = chosen((0, 0.6, 1.5), (0.1, 0.2, 1.5), (0.2, 0.04, 1.6), (0.4, 0.01, 1.6))
    assert found["sigma_tn"] == 0.2 and "4.0 % copies at FD 1.6" in found["reason"]
    assert "at most 5 %" in found["rule"] and "within 10 % of the best" in found["rule"]
    assert chosen((0, 0.6, 1.5), (0.2, 0.05, 1.65))["sigma_tn"] == 0.2, "both limits are included"
    assert chosen((0, 0.6, 1.5), (0.2, 0.04, 1.66), (0.4, 0.04, 1.6))["sigma_tn"] == 0.4
    assert chosen((0.4, 0.01, 1.5), (0.1, 0.04, 1.5))["sigma_tn"] == 0.1, "whatever their order"
    assert chosen((0, 0.6, 1.5), (0.2, 0.15, 1.5), target=0.2)["sigma_tn"] == 0.2
    plain = chosen((0, 0.04, 1.5), (0.2, 0.0, 1.5))
    assert plain["sigma_tn"] == 0 and "plain EDM does not copy more" in plain["reason"]
    assert "far from" not in plain["reason"] and "far from" not in chosen((0, 0.0, 2.8))["reason"]
    early = chosen((0, 0.0, 25.0), (0.3, 0.0, 26.0))["reason"]
    assert "all have 17.9 times the training images' own FD or more: longer training may change the choice" in early


def test_the_training_images_own_distance_is_compared_at_equal_counts():
    """100 training images lie farther from the held-out ones than 1,000 samples of a good model do, or of a bad one."""
    equal = {"images": 100, "value": 4.0, "train_vs_reference": 1.4}
    rows = [row("edm", 0, 0, 0.0, 1.3) | {"train_images": 100, "equal_counts": equal}]
    summary = summarize(rows, target=0.05, within=0.1)
    assert "2.86 times" in summary["chosen"]["reason"]
    assert (
        "the training images themselves have 1.4, but are 100, and fewer images have a larger distance: of 100 each"
        " EDM (seed 0) has 4, the training images 1.4" in table(summary)
    )


def test_no_level_is_chosen_where_none_meets_the_rule():
    copying = chosen((0, 0.6, 1.5), (0.2, 0.3, 1.5))
    assert copying["sigma_tn"] is None and "the fewest copies are 30.0 % (sigma_tn 0.2)" in copying["reason"]
    worse = chosen((0, 0.6, 1.5), (0.2, 0.01, 1.9))
    assert worse["sigma_tn"] is None and "FD of 1.9 (sigma_tn 0.2) or more, above 1.65" in worse["reason"]


def test_baselines_are_never_chosen_and_do_not_set_the_best():
    rows = [row("edm", 0, 0, 0.5, 1.5), row("ambient", 0.2, 0, 0.01, 1.6), row("early-stop", 0, 0, 0.0, 1.0)]
    rows += [row("fresh-noise", 0.1, 0, 0.0, 1.0), row("weight-decay", 0, 0, 0.0, 1.0)]
    assert summarize(rows, target=0.05, within=0.1)["chosen"]["sigma_tn"] == 0.2


def test_means_and_intervals_over_seeds():
    rows = [row("edm", 0, seed, rate, 1.5) for seed, rate in enumerate((0.2, 0.3, 0.4))]
    (found,) = summarize(rows, target=0.05, within=0.1)["configurations"]
    half = 4.302653 * 0.1 / 3**0.5  # Student's t at 2 degrees of freedom
    assert found["excess"]["mean"] == pytest.approx(0.3)
    assert found["excess"]["interval"] == pytest.approx([0.3 - half, 0.3 + half], rel=1e-5)
    assert found["seeds"] == [0, 1, 2] and found["fd"]["interval"] == pytest.approx([1.5, 1.5])
    assert over_seeds([1.0]) == {"mean": 1.0, "interval": None}
    (single,) = summarize(rows[:1], target=0.05, within=0.1)["configurations"]
    assert single["rate"]["interval"] == [0.0, 0.5] and single["excess"]["interval"] is None, "of the samples"
    (single,) = summarize([rows[0] | {"excess_ci95": [0.1, 0.3]}], target=0.05, within=0.1)["configurations"]
    assert single["excess"]["interval"] == [0.1, 0.3]
    (wide,) = summarize([row("edm", 0, s, r, 1.5) for s, r in ((0, 0.0), (1, 0.2))], target=0.05, within=0.1)[
        "configurations"
    ]
    assert wide["rate"]["interval"] == [0.0, 1.0], "a rate is a share"


def test_seeds_that_agree_are_no_certainty():
    """No copy among 3 x 1,000 samples: at most 1 - 0.025^(1/3000) of them are (Clopper and Pearson), not 0.0 to 0.0."""
    rows = [row("edm", 0, seed, 0.0, 1.5 + seed) | {"rate": 0.0, "holdout_rate": 0.0} for seed in range(3)]
    summary = summarize(rows, target=0.05, within=0.1)
    (found,) = summary["configurations"]
    assert found["rate"]["interval"] == pytest.approx([0, 1 - 0.025 ** (1 / 3000)])
    assert found["excess"] == {"mean": 0.0, "interval": None}
    assert "| 0.0 % (0.0 to 0.1) | 0.0 % | 0.0 % |" in table(summary)


def test_the_table_says_what_it_holds_and_the_curve_is_drawn(tmp_path):
    rows = [row(k, s, seed, 0.5 - s + seed / 50, 1.5 + s) for seed in (0, 1)
            for k, s in (("edm", 0), ("ambient", 0.2), ("fresh-noise", 0.2), ("weight-decay", 0), ("early-stop", 0),
                         ("ambient-stop", 0.2))]  # fmt: skip
    summary = summarize(rows, target=0.05, within=0.1)
    text = table(summary)
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:8]] == list(sweep_results.KINDS.values())
    assert "Student's 95 %" in text and "Chosen sigma_tn: **none**" in text and "1,000 samples a run" in text
    assert "no privacy guarantee" in text and "the training images themselves have 1.4" in text
    assert "The stop rule ended early stop in 0 of 2 runs, ambient, stopped in 0 of 2 runs; a run that it" in text
    sweep_plot.plot_pareto(tmp_path / "pareto", summary)
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    svg = (tmp_path / "pareto.svg").read_text()
    first = svg
    sweep_plot.plot_pareto(tmp_path / "pareto", summary)
    assert (tmp_path / "pareto.svg").read_text() == first
    assert "<!-- lower left is better; bars: 95 % over seeds; dotted: target -->" in svg
    assert "<!-- FD-1k vs held-out (pixel) -->" in svg and "| FD-1k vs held-out |" in text
    few = [r | {"dimensions": 1280, "references": 1000, "fd_space": "inception"} for r in rows]
    summary = summarize(few, target=0.05, within=0.1)
    sweep_plot.plot_pareto(tmp_path / "few", summary)
    name = "FID-1k vs held-out (fewer samples and reference images than dimensions)"
    assert (
        f"| {name} |" in table(summary) and "(fewer samples and reference images" in (tmp_path / "few.svg").read_text()
    )
    sweep_plot.plot_pareto(tmp_path / "one", summarize(rows[:5], target=0.05, within=0.1))
    assert "<!-- lower left is better; one seed; dotted: target -->" in (tmp_path / "one.svg").read_text()


def test_curves_over_training(tmp_path):
    """The mean over seeds where all of them have an audit; a sweep without audits has none."""
    rows = [audited(row(k, s, seed, 0.3, 1.5), (8, 0.0, 2.0 + seed), (16, 0.1 + 0.1 * seed, 1.0)) for seed in (0, 1)
            for k, s in (("edm", 0), ("ambient", 0.2), ("ambient", 0.4), ("fresh-noise", 0.2), ("weight-decay", 0))]  # fmt: skip
    rows[0]["audits"].append({"kimg": 24, "samples": 512, "excess": 0.9, "fd": 0.5})  # of one seed alone
    rows += [audited(row("early-stop", 0, 0, 0.1, 1.5), (8, 0.0, 2.0), (16, 0.1, 1.0))]
    assert sweep_plot.plot_training(tmp_path / "training", summarize(rows, target=0.05, within=0.1))
    svg = (tmp_path / "training.svg").read_text()
    for text in ("EDM", "ambient 0.2", "ambient 0.4", "fresh noise 0.2", "weight decay", "FD-512 vs held-out (pixel)"):
        assert f"<!-- {text} -->" in svg, text
    assert "<!-- early stop -->" not in svg and "<!-- 16 -->" in svg and "<!-- 24 -->" not in svg
    assert not sweep_plot.plot_training(tmp_path / "none", summarize([row("edm", 0, 0, 0.3, 1.5)], target=0, within=0))
    assert not (tmp_path / "none.svg").exists()


def audited(cell: dict, *audits: tuple[float, float, float]) -> dict:
    return cell | {"audits": [{"kimg": k, "samples": 512, "excess": e, "fd": fd} for k, e, fd in audits]}


def test_each_run_at_its_best_audit():
    """The least distance among the audits that copy little; none where a run has none; early-stop is EDM again."""
    rows = [
        audited(row("edm", 0, 0, 0.6, 3.0), (1, 0.0, 2.0), (2, 0.05, 1.5), (3, 0.06, 1.0)),
        audited(row("edm", 0, 1, 0.6, 3.0), (1, 0.0, 1.7), (2, 0.05, 1.9), (3, 0.06, 1.0)),
        audited(row("ambient", 0.2, 0, 0.1, 3.0), (1, 0.0, 1.4)),
        audited(row("ambient", 0.2, 1, 0.1, 3.0), (1, 0.2, 1.4)),
        audited(row("early-stop", 0, 0, 0.0, 2.0), (1, 0.0, 1.4)),
        row("weight-decay", 0, 0, 0.1, 3.0),
    ]
    found = summarize(rows, target=0.05, within=0.1)
    by_kind = {c["kind"]: c for c in found["configurations"]}
    assert by_kind["edm"]["best"]["fd"]["mean"] == pytest.approx(1.6)
    assert by_kind["edm"]["best"]["kimg"]["mean"] == 1.5 and by_kind["edm"]["best"]["excess"]["mean"] == 0.025
    assert by_kind["ambient"]["best"] is None and by_kind["weight-decay"]["best"] is None
    assert [c["best"] and c["best"]["kimg"] for c in found["cells"]] == [2, 1, 1, None, 1, None]
    text = table(found)
    assert "at most 5 % copies above the control (512 samples" in text and text.count("\n| EDM |") == 2
    assert text.count("\n| ambient |") == text.count("\n| early stop |") == text.count("\n| weight decay |") == 1
    assert "best" not in table(summarize([row("edm", 0, 0, 0.6, 3.0)], target=0.05, within=0.1)).partition("Chosen")[0]


def test_where_copying_passes_the_target():
    """By the log-odds between two audits, for the first time; none where it never does, or was above from the start."""
    rows = [
        audited(
            row("edm", 0, 0, 0.6, 3.0), (1, 0.0, 2.0), (2, 0.03, 1.8), (3, 0.11, 1.4), (4, 0.02, 9.0), (5, 0.2, 9.0)
        ),
        audited(row("edm", 0, 1, 0.6, 3.0), (1, 0.05, 1.7), (2, 0.15, 1.5)),
        audited(row("ambient", 0.2, 0, 0.1, 3.0), (1, 0.0, 1.4), (2, 0.03, 1.4), (3, 0.2, 1.2)),
        audited(row("ambient", 0.2, 1, 0.1, 3.0), (1, 0.0, 1.4), (2, 0.05, 1.4)),
        audited(row("fresh-noise", 0.2, 0, 0.1, 3.0), (1, 0.0, 1.4), (2, 0.01, 1.4)),
    ]
    above = audited(row("edm", 0, 2, 0.6, 3.0), (1, 0.2, 1.4), (2, 0.3, 1.4))["audits"]
    assert audited_of.passing(above, 0.05) is None and audited_of.passing([], 0.05) is None
    found = summarize(rows, target=0.05, within=0.1)

    def part(low: float, high: float) -> float:
        """Of the way, by logistic growth: 512 samples, half a one on either side."""
        odds = [np.log((512 * p + 0.5) / (512 - 512 * p + 0.5)) for p in (low, 0.05, high)]
        return (odds[1] - odds[0]) / (odds[2] - odds[0])

    at = [c["passing"] and c["passing"]["kimg"] for c in found["cells"]]
    assert at == [pytest.approx(2 + part(0.03, 0.11)), 1, pytest.approx(2 + part(0.03, 0.2)), None, None]
    assert all(c["passing"]["excess"] == 0.05 for c in found["cells"][:3]) and 0.35 < part(0.03, 0.11) < 0.41
    edm, ambient, fresh = found["configurations"]
    fd = (1.8 - 0.4 * part(0.03, 0.11) + 1.7) / 2
    assert edm["passing"]["fd"]["mean"] == pytest.approx(fd)
    assert (edm["passing"]["seeds"], ambient["passing"]["seeds"], fresh["passing"]) == (2, 1, {"seeds": 0})
    lines = [line for line in table(found).splitlines() if line.startswith(("| EDM", "| model", "| amb", "| fresh"))][
        4:
    ]
    assert lines[0].endswith("| 5 % at kimg | FD-512 there |") and f" 1.69 | {fd:.4g} (" in lines[1]
    assert " 2.25 (1 of 2) | 1.35 |" in lines[2] and lines[3].endswith("| never | - |")


def test_copying_that_grows_by_a_factor_is_found_between_audits_of_any_distance():
    """Where the odds of a copy double each kimg, and the distance falls evenly, sparse audits say what dense ones say; in
    proportion to the rates the sparse ones would be 2 kimg too early."""

    def audits(every: int) -> list[dict]:
        odds = [2.0 ** (k - 12) for k in range(0, 17, every)]
        rates = [o / (1 + o) for o in odds]
        rows = zip(range(0, 17, every), rates, (60 - 1.5 * k for k in range(0, 17, every)), strict=True)
        return [{"kimg": k, "samples": 10**6, "excess": e, "fd": fd} for k, e, fd in rows]

    dense, sparse = (audited_of.passing(audits(every), 0.05) for every in (1, 8))
    assert dense["kimg"] == pytest.approx(sparse["kimg"], abs=0.01) and dense["fd"] == pytest.approx(
        sparse["fd"], abs=0.02
    )


def test_how_well_counts_say_where_copying_passes():
    """The spread of the distance there is that of experiments which count as many samples anew, and few samples say less."""
    kimg = np.arange(8.0)
    truth = 1 / (1 + np.exp(4 - kimg))  # logistic: 5 % at 1.06 kimg

    def audits(rates, samples: int) -> list[dict]:
        rows = zip(kimg, rates, 60 - 3 * kimg, strict=True)
        return [{"kimg": k, "samples": samples, "excess": float(e), "fd": fd} for k, e, fd in rows]

    generator = np.random.default_rng(3)
    spreads = []
    for samples in (128, 2048):
        drawn = [
            audited_of.passing(audits(generator.binomial(samples, truth) / samples, samples), 0.05) for _ in range(400)
        ]
        true = np.std([found["fd"] for found in drawn if found])
        told = audited_of.passing(audits(truth, samples), 0.05)["fd_sd"]
        assert told == pytest.approx(true, rel=0.2)
        spreads.append(told)
    assert 3 < spreads[0] / spreads[1] < 5, "by the root of their number"


def test_seeds_that_agree_by_luck_have_no_narrower_interval_than_their_measurement():
    assert over_seeds([1.0, 1.0, 1.0])["interval"] == [1.0, 1.0]
    low, high = over_seeds([1.0, 1.0, 1.0], [0.3, 0.3, 0.3])["interval"]
    assert (low, high) == (pytest.approx(1 - 1.96 * 0.3 / 3**0.5), pytest.approx(1 + 1.96 * 0.3 / 3**0.5))
    apart = [1.0, 2.0, 4.0]
    assert over_seeds(apart, [0.1] * 3) == over_seeds(apart), "the wider one"
    assert over_seeds([1.0], [0.3])["interval"] is None


def test_an_audits_distance_is_in_the_features_that_it_names(tmp_path):
    cells_ = [audited(row("edm", 0, 0, 0.6, 3.0), (1, 0.0, 2.0), (2, 0.03, 1.8))]
    for audit in cells_[0]["audits"]:
        audit |= {"embedder": "inception", "dimensions": 2048, "references": 1000}
    found = summarize(cells_, target=0.05, within=0.1)
    assert "512 samples, inception space" in table(found) and "| FID-512 vs held-out (fewer" in table(found)
    sweep_plot.plot_training(tmp_path / "training", found)
    assert "<!-- FID-512 vs held-out (inception) -->" in (tmp_path / "training.svg").read_text()


def test_the_cells():
    found = cells(SweepRequest(sigma_tn=(0, 0.1, 0.2), seeds=(3, 4), baselines=BASELINES))
    names = [c.name for c in found]
    assert names[:9] == ["edm-seed3", "ambient-0.1-seed3", "ambient-0.2-seed3", "fresh-noise-0.1-seed3",
                         "fresh-noise-0.2-seed3", "weight-decay-seed3", "early-stop-seed3", "ambient-stop-0.1-seed3",
                         "ambient-stop-0.2-seed3"]  # fmt: skip
    assert len(names) == len(set(names)) == 18
    options = {c.kind: c.options for c in found}
    assert options["fresh-noise"] == {"noise": {"mode": "fresh"}} and options["edm"] == {} == options["ambient"]
    assert options["weight-decay"]["training"] == {"optimizer": "adamw", "weight_decay": 0.05}
    assert options["early-stop"]["training"] == {"stop_when_copying": 0.05} == options["ambient-stop"]["training"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigma_tn": ()}, "--sigma-tn names none"),
        ({"sigma_tn": (0.1, 0.1)}, "--sigma-tn 0.1,0.1 names one twice"),
        ({"sigma_tn": (-1.0,)}, "sigma_tn must lie between"),
        ({"seeds": ()}, "--seeds names none"),
        ({"baselines": ("early",)}, "unknown baseline 'early'"),
        ({"assignments": ["noise.sigma_tn=1"]}, "--set noise.sigma_tn: the sweep sets it itself"),
        ({"assignments": ["training.weight_decay=1"], "baselines": ("weight-decay",)}, "training.weight_decay"),
        ({"num": 1}, "--num must be 2 or more"),
        ({"parallel": 0}, "--parallel must be 1 or more"),
        ({"target": 1.0}, "--target must be a rate"),
    ],
)
def test_bad_requests_leave_nothing(tmp_path, changed, message):
    with pytest.raises(InputError, match=message):
        sweep(SweepRequest(**changed), tmp_path / "sweep")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--sigma-tn", "0,much"], "--sigma-tn must be numbers such as 0,0.1,0.2, got '0,much'"),
        (["sweep", "--baselines", "early"], "unknown baseline 'early'"),
        (["sweep", "--data", "nowhere"], "nowhere"),
        (["train", "--sigma-tn", "much"], "--sigma-tn must be a number or auto, got 'much'"),
        (["train", "--stop-when-copying", "0.1", "--audit-every", "0"], "above 0 with --stop-when-copying"),
        (["train", "--resume", "x", "--audit-every", "1"], "leave out --audit-every"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_help_of_what_is_new(capsys):
    for command, words in (
        ("sweep", ["--data", "--sigma-tn", "--seeds", "--baselines", "fresh-noise", "--parallel", "--kimg", "--stop-rate",
                   "--target", "--weight-decay", "--features", "--set", "runs/sweep", "pixels in [-1, 1]"]),
        ("train", ["--audit-every", "--stop-when-copying", "S|auto", "audits.jsonl", "a tenth of the run"]),
    ):  # fmt: skip
        code, out, _ = run(command, "--help", capsys=capsys)
        assert code == 0 and not [w for w in words if w not in " ".join(out.split())]


class Here:
    """A cell in this process instead of one of its own."""

    ran: list[str] = []
    child = SimpleNamespace(poll=lambda: 0)

    def __init__(self, request, path, log, place, threads):
        self.path, self.place = path, place
        run_cell(path, request.num, "cpu", request.features)
        Here.ran.append(path.name)

    def warnings(self):
        return []

    def failure(self):
        return ""

    def end(self):
        pass


@pytest.fixture
def here(monkeypatch):
    Here.ran = []
    monkeypatch.setattr(jobs, "_Job", Here)
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0)
    monkeypatch.setattr("fastambient.evaluation.run.write_report", lambda *a, **k: None)  # of each run
    monkeypatch.setattr("fastambient.training.audits_plot.plot_audits", lambda *a, **k: None)

    def plot_pareto(path, summary):
        for suffix in (".svg", ".png"):
            path.with_suffix(suffix).write_text("drawn")

    monkeypatch.setattr(sweep_plot, "plot_pareto", plot_pareto)


def asked(**changed) -> SweepRequest:
    usual = {"sigma_tn": (0, 0.2), "seeds": (0,), "kimg": 0.016, "num": 12, "assignments": SMALL, "noise_seed": 7}
    return SweepRequest(**(usual | changed))


@pytest.mark.slow
def test_finished_cells_are_kept_and_others_are_refused(tmp_path, here, capsys):
    out = tmp_path / "sweep"
    first = sweep(asked(sigma_tn=(0,)), out)
    assert Here.ran == ["edm-seed0"] and len(first["cells"]) == 1
    stamps = {
        p: p.stat().st_mtime_ns for p in (out / "edm-seed0").rglob("*") if p.name in ("state.json", "samples.npz")
    }
    # more cells: what is there stays as it is
    summary = sweep(asked(baselines=("early-stop", "fresh-noise")), out)
    assert Here.ran == ["edm-seed0", "early-stop-seed0", "ambient-0.2-seed0", "fresh-noise-0.2-seed0"]
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    told = json.loads((out / "sweep.json").read_text())
    assert told == json.loads(json.dumps(summary)) and len(told["cells"]) == 4 and told["settings"]["train"] == 100
    assert all(c["samples"] == 12 and c["kimg"] == 0.016 for c in told["cells"])
    metrics = json.loads((out / "ambient-0.2-seed0" / "metrics.json").read_text())
    cell = next(c for c in told["cells"] if c["kind"] == "ambient")
    assert cell["fd"] == metrics["frechet"]["pixel"]["value"]
    assert cell["rate"] == metrics["memorization"]["gap_ratio"]["rate"]
    for name in ("table.md", "pareto.svg", "report.html"):
        assert (out / name).is_file()
    assert not (out / "training.svg").exists(), "no run but early-stop was audited"
    report = (out / "report.html").read_text()
    assert "edm-seed0" in report and "early-stop-seed0" in report
    assert f"Chosen sigma_tn: {choice(summary)}</p>" in report
    assert html.escape(summary["chosen"]["reason"], quote=True).replace("&#x27;", "&#39;") in report
    assert base64.b64encode((out / "pareto.png").read_bytes()).decode() in report
    assert "<td>fresh noise</td><td>0.2</td><td>1</td>" in report
    assert "of edm-seed0 (sigma_tn 0) and" not in report, "the choice is compared, not the lowest and the highest run"
    settings = RunFolder(out / "fresh-noise-0.2-seed0").read_settings()
    assert settings.noise.mode == "fresh" and settings.training.sample_kimg == 0
    assert RunFolder(out / "early-stop-seed0").read_settings().training.audit_kimg == pytest.approx(0.0016)
    seeds = {RunFolder(out / c["name"]).read_noise_seed() for c in told["cells"] if c["kind"] != "edm"}
    assert len(seeds) == 3, "levels share no noise"
    assert not (out / "early-stop-seed0" / "begun.json").exists(), "a stopped run is trained from its start"
    assert not any(str(seed) in (out / "sweep.json").read_text() for seed in seeds if seed > 1000)
    # another number of samples: measured anew, not trained
    Here.ran.clear()
    checkpoint = checkpoints(out / "edm-seed0" / "checkpoints")[-1] / "state.json"
    sweep(asked(sigma_tn=(0,), num=10), out)
    assert Here.ran == ["edm-seed0"] and checkpoint.stat().st_mtime_ns == stamps[checkpoint]
    # other settings are refused, with the cell's name and the setting
    for changed, message in (
        ({"kimg": 0.04}, r"edm-seed0 was trained with training\.\w+ \S+, asked for is"),
        ({"assignments": [*SMALL, "training.lr=0.5"]}, r"edm-seed0 was trained with training\.lr 0\.001, asked for is 0\.5"),
        ({"data": str(tmp_path)}, "was prepared with data.source digits"),
        ({"assignments": [*SMALL, "data.train=50"]}, "was prepared with data.train None, asked for is 50"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            sweep(asked(**changed), out)
    assert Here.ran == ["edm-seed0"]


@pytest.mark.slow
@pytest.mark.parametrize("stops", [True, False])
def test_a_run_goes_on_from_the_one_that_was_stopped(tmp_path, here, monkeypatch, stops):
    """Its weights and audits are those of a run from the start; only what came after the stop is trained again."""
    measured, trained = audits.measure, []

    def measure(samples, sets, **how):
        trained.append(1)
        return measured(samples, sets, **how)

    monkeypatch.setattr(audits, "measure", measure)
    for module in (audits, loop):  # of four audits the third and the fourth are above the rate
        monkeypatch.setattr(module, "excess", lambda row: float(stops and row["nimg"] > 32))
    usual = {"sigma_tn": (0, 0.2), "kimg": 0.064, "audit_every": 0.016}
    alone = sweep(asked(**usual), tmp_path / "alone")["cells"]
    assert len(trained) == 8
    trained.clear()
    out = tmp_path / "both"
    found = sweep(asked(**usual, baselines=("early-stop", "ambient-stop")), out)["cells"]
    assert len(trained) == (3 + 3 + 1 + 1 if stops else 4 + 4)
    assert Here.ran[2:] == ["early-stop-seed0", "ambient-stop-0.2-seed0", "edm-seed0", "ambient-0.2-seed0"]
    weights = lambda run: load_file(run / "model.safetensors")  # noqa: E731
    for name, stopped in (("edm-seed0", "early-stop-seed0"), ("ambient-0.2-seed0", "ambient-stop-0.2-seed0")):
        ours, theirs = weights(out / name), weights(tmp_path / "alone" / name)
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(where / name).read_audits()]
                for where in (out, tmp_path / "alone")]  # fmt: skip
        assert rows[0] == rows[1] and len(rows[0]) == 4
        losses = [[row["loss"] for row in RunFolder(w / name).read_stats()] for w in (out, tmp_path / "alone")]
        assert losses[0] == losses[1] and len(losses[0]) == 8
        begun = json.loads((out / name / "begun.json").read_text())
        assert begun["run"] == stopped and begun["nimg"] == (48 if stops else 64)
        row, before = (next(c for c in results if c["name"] == name) for results in (found, alone))
        assert row["seconds"] == round(last_state(out / name / "checkpoints")["seconds"] - begun["seconds"], 1)
        assert row | {"seconds": 0} == before | {"seconds": 0}
    early = next(c for c in found if c["kind"] == "early-stop")
    assert early["stopped_when_copying"] == stops and early["kimg"] == (0.032 if stops else 0.064)


@pytest.mark.slow
def test_a_run_of_other_settings_or_noise_or_one_that_began_is_left_alone(tmp_path, here):
    out = tmp_path / "sweep"
    sweep(asked(baselines=("early-stop",), sigma_tn=(0,)), out)
    stopped, edm = RunFolder(out / "early-stop-seed0"), RunFolder(out / "edm-seed0")
    assert edm.begun.is_file() and stopped.read_audits() and not edm.read_audits(), "it audits nothing of its own"
    for name, changed in (
        ("lr", {"assignments": (*SMALL, "training.lr=0.5")}),
        ("noise", {"noise_seed": 8}),
        ("seed", {"seeds": (1,)}),
    ):
        other = tmp_path / name
        sweep(asked(sigma_tn=(0,), **changed), other)
        run_ = next(RunFolder(p.parent) for p in other.glob("edm-*/config.yaml"))
        assert not go_on_from(run_, stopped), "it has begun"
        shutil.rmtree(run_.checkpoints)
        assert not go_on_from(run_, stopped) and not run_.checkpoints.exists() and not run_.begun.exists()
    assert not go_on_from(run_, RunFolder(tmp_path / "nowhere"))


def test_a_store_is_swept_where_it_lies_and_needs_held_out_images(tmp_path, here):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8))
    source = open_source(str(tmp_path / "x.npy"))
    store = prepare(source, tmp_path / "store", train=20, holdout=10, noise_seed=1)
    sweep(asked(data=str(store.path), sigma_tn=(0.2,), kimg=0.016), tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "store").exists()
    none = prepare(source, tmp_path / "none", holdout=0, noise_seed=1)
    with pytest.raises(InputError, match="has no two clean held-out images"):
        sweep(asked(data=str(none.path)), tmp_path / "other")
    with pytest.raises(InputError):
        sweep(asked(data="nowhere"), tmp_path / "other")
    assert not (tmp_path / "other").exists(), "a request that is refused leaves nothing behind"

    # Where fewer are held out than train, all copies count.
    cell = tmp_path / "sweep" / "ambient-0.2-seed0"
    measured = json.loads((cell / "measured.json").read_text())
    measured["metrics"]["memorization"]["gap_ratio"] |= {"rate": 0.5, "holdout_rate": 0.1}
    measured["metrics"]["memorization"]["control"]["train_rate"] = 0.05
    (cell / "measured.json").write_text(json.dumps(measured))
    assert sweep_results.result_of_cell("ambient", 0.2, 0, cell, "pixel")["excess"] == 0.4


def test_the_embedder_suits_the_pictures():
    """It is that of the distances in the table, too: in pixels photographs are hardly told apart."""
    assert [sweep_run.features_of(SweepRequest(), r) for r in (8, 15, 16)] == ["pixel", "pixel", "efficientnet-lite0"]
    assert sweep_run.features_of(SweepRequest(features="inception"), 8) == "inception"
    assert sweep_run.features_of(SweepRequest(assignments=["evaluation.features=none"]), 16) == "none"


def test_somebodys_folder_is_not_swept_in(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        sweep(asked(), tmp_path / "mine")


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_are_measured(tmp_path, here, monkeypatch):
    fails = ["ambient-0.2-seed0"]

    class Failing(Here):
        def failure(self):
            return f"the cell {self.path} failed with exit code 1: diverged" if self.path.name in fails else ""

    monkeypatch.setattr(jobs, "_Job", Failing)
    usual = asked(sigma_tn=(0, 0.2, 0.4), kimg=0.016)
    with pytest.raises(FastambientError, match=r"1 of 3 cells failed .*again:\n.*ambient-0\.2-seed0 failed.*diverged"):
        sweep(usual, tmp_path / "sweep")
    told = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [c["name"] for c in told["cells"]] == ["edm-seed0", "ambient-0.4-seed0"]
    assert told["failed"] == ["ambient-0.2-seed0"] and (tmp_path / "sweep" / "report.html").is_file()
    fails.clear()
    (tmp_path / "sweep" / "ambient-0.2-seed0" / "measured.json").unlink()
    Here.ran.clear()
    told = sweep(usual, tmp_path / "sweep")
    assert Here.ran == ["ambient-0.2-seed0"] and len(told["cells"]) == 3 and told["failed"] == []
    fails += ["edm-seed0", "ambient-0.2-seed0"]  # all of the first seed
    with pytest.raises(FastambientError, match="2 of 4 cells failed"):
        sweep(asked(kimg=0.016, seeds=(0, 1)), tmp_path / "second")
    text = (tmp_path / "second" / "table.md").read_text()
    assert "Failed, and so missing here: edm-seed0, ambient-0.2-seed0." in text
    assert "pictures of seed 1" in (tmp_path / "second" / "report.html").read_text()
    with pytest.raises(FastambientError, match=r"every cell failed:\nthe cell .*edm-seed0 failed"):
        sweep(asked(sigma_tn=(0,)), tmp_path / "none")


def test_an_embedder_that_is_not_there_is_found_before_a_cell_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_run, "run_all", lambda *a: pytest.fail("trains first"))
    with pytest.raises(InputError, match="no embedder 'nope'"):
        sweep(asked(features="nope"), tmp_path / "sweep")
    with pytest.raises(InputError, match="--weight-decay must be 0 or more"):
        cells(asked(weight_decay=-1))


@pytest.mark.slow
def test_what_runs_warn_of_is_said_once_and_named(tmp_path, here, monkeypatch, capsys):
    """A run of hours in a precision that is slow here must not be found out from its log."""

    class Warns(Here):
        def warnings(self):
            return ["slow here", f"only of {self.path.name}"]

    monkeypatch.setattr(jobs, "_Job", Warns)
    sweep(asked(kimg=0.016), tmp_path / "sweep")
    said = [line for line in capsys.readouterr().err.splitlines() if "slow here" in line or "only of" in line]
    assert said == [
        "warning: edm-seed0: slow here", "warning: edm-seed0: only of edm-seed0",
        "warning: ambient-0.2-seed0: only of ambient-0.2-seed0",
    ]  # fmt: skip


def test_warnings_of_a_cell_are_read_from_its_log(tmp_path, monkeypatch):
    """Whole lines alone, each once, and none of what an earlier call wrote."""
    log = tmp_path / "edm-seed0.log"
    log.write_text("warning: of an earlier call\n")
    write = "import sys; print('warning: one'); print('kimg 1'); sys.stdout.write('warning: tw'); sys.stdout.flush()"
    popen = subprocess.Popen
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda command, **more: popen([sys.executable, "-c", write], **more))
    job = jobs._Job(asked(), tmp_path / "edm-seed0", log, 0, 1)
    job.child.wait()
    assert job.warnings() == ["one"] and job.warnings() == []
    with open(log, "a", encoding="utf-8") as more:
        more.write("o\n")
    assert job.warnings() == ["two"] and job.failure() == ""
    job.end()


def test_the_end_of_a_process_says_why(tmp_path):
    for code, said, told in (
        (0, "fine", ""),
        (3, "error: the loss is NaN", "exit code 3: the loss is NaN"),
        (1, "", "it said nothing"),
    ):
        log = tmp_path / f"{code}.log"
        log.write_text(said)
        job = jobs._Job.__new__(jobs._Job)
        job.path, job.log = tmp_path, open(log, encoding="utf-8")  # noqa: SIM115
        job.child = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
        job.child.wait()
        assert told in job.failure() and bool(told) == bool(job.failure())
        job.end()


@pytest.mark.slow
def test_cells_of_another_store_are_refused_and_results_are_the_sweeps_own(tmp_path, here):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8))
    source = open_source(str(tmp_path / "x.npy"))
    first, other = (prepare(source, tmp_path / f"store{i}", train=30, holdout=20, split_seed=i).path for i in range(2))
    out, usual = tmp_path / "sweep", {"kimg": 0.016, "sigma_tn": (0, 0.2)}
    before = sweep(asked(**usual, data=str(first)), out)
    with pytest.raises(InputError, match=r"edm-seed0 was trained on another store than .*store1; choose another --out"):
        sweep(asked(**usual, data=str(other)), out)
    # what `evaluate` makes of a cell's metrics.json is no cell of the sweep
    evaluate_run(out / "edm-seed0", samples=out / "ambient-0.2-seed0" / "samples.npz", num=3, features="none")
    Here.ran.clear()
    after = sweep(asked(**usual, data=str(first)), out)
    assert not Here.ran and after["cells"] == before["cells"] and after["cells"][0]["samples"] == 12


def test_no_two_cells_share_a_noise_seed_however_a_sweep_grows(tmp_path):
    request = asked(sigma_tn=(0.1, 0.2), seeds=(0, 1, 2), baselines=BASELINES)
    seeds = {sweep_run._noise_seed(request, cell, tmp_path) for cell in cells(request)}
    assert len(seeds) == len(cells(request)) and all(0 <= s < 2**64 for s in seeds)
    fewer = asked(sigma_tn=(0.2,), seeds=(1,))
    (cell,) = cells(fewer)
    assert sweep_run._noise_seed(fewer, cell, tmp_path) in seeds, "a cell's seed depends on its name alone"
    assert sweep_run._noise_seed(asked(noise_seed=8), cell, tmp_path) not in seeds


def test_an_error_of_a_cell_is_one_line(tmp_path, capsys):
    assert cell_main([str(tmp_path / "none"), "8", "cpu", "none"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: there is no run folder") and err.count("\n") == 1


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_one_that_is_killed_go_on(tmp_path):
    """Ctrl-C in the second cell leaves a checkpoint; a kill takes the children along; the same command finishes."""
    command = ["sweep", "--out", "sweep", "--sigma-tn", "0,0.2", "--seeds", "0", "--kimg", "1", "--num", "10",
               "--parallel", "1", "--gpus", "0", *(x for a in SMALL for x in ("--set", a))]  # fmt: skip
    out = tmp_path / "sweep"
    child = spawn(*command, cwd=tmp_path)
    wait_for_lines(out / "edm-seed0" / "stats.jsonl", 20, seconds=120)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130 and "the same command goes on" in err and "Traceback" not in err, err
    stopped = checkpoints(out / "edm-seed0" / "checkpoints")[-1]
    lines = (out / "edm-seed0" / "stats.jsonl").read_text()
    assert lines.count("\n") < 125 and not (out / "edm-seed0" / "metrics.json").exists()
    child = spawn(*command, cwd=tmp_path)
    wait_for_lines(out / "ambient-0.2-seed0" / "stats.jsonl", 5, seconds=240)
    grand = [int(p) for p in re.findall(r"\d+", subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(child.pid)], capture_output=True, text=True, check=False).stdout)]  # fmt: skip
    child.kill()
    child.communicate()
    end = time.monotonic() + 20
    while grand and time.monotonic() < end:
        grand = [p for p in grand if os.path.exists(f"/proc/{p}")]
        time.sleep(0.1)
    assert not grand, "a cell outlived its sweep"
    assert (out / "edm-seed0" / "stats.jsonl").read_text().startswith(lines), "it went on from its checkpoint"
    assert int(stopped.name.removeprefix("nimg-")) == json.loads(lines.splitlines()[-1])["nimg"]
    weights = (out / "edm-seed0" / "model.safetensors").stat().st_mtime_ns
    done = cli(*command, cwd=tmp_path)
    assert "2 cells, 1 of them finished" in done.stderr and "Chosen sigma_tn" in done.stdout
    assert (out / "edm-seed0" / "model.safetensors").stat().st_mtime_ns == weights
    assert len(json.loads((out / "sweep.json").read_text())["cells"]) == 2
