"""evaluate on a run folder: what it prints, its refusals, and what says that it is still at work."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import make_run, train_here

from fastambient.data.preparation import prepare
from fastambient.data.sources import open_source
from fastambient.errors import InputError
from fastambient.evaluation import evaluate, metrics
from fastambient.evaluation import run as evaluation_run
from fastambient.evaluation.embedders import load_embedder
from fastambient.evaluation.report import RunReport
from fastambient.evaluation.run import Evaluated, evaluate_run
from fastambient.evaluation.table import print_table
from fastambient.pictures import save_png
from fastambient.training.run import RunFolder


def _noise_set(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 254, (n, 1, 8, 8), np.uint8)


def _evaluated(name: str, copies: int, *, train: int = 50, holdout: int = 80, samples: int = 100) -> Evaluated:
    images, held_out, drawn = _noise_set(train, 1), _noise_set(holdout, 2), _noise_set(samples, 3)
    drawn[:copies] = images[np.arange(copies) % train] + 1
    found = evaluate(drawn, images, held_out, settings={})
    return Evaluated(
        found.metrics, RunReport(name, 0.2, found), Path("metrics.json"), Path("report.html"), Path("n.csv")
    )


def test_the_table_fits_80_columns_and_keeps_every_figure_whole(monkeypatch, capsys):
    items = [_evaluated("edm", 30), _evaluated("ambient-2026-11-24-with-a-long-name", 100)]
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    monkeypatch.setenv("TERM", "dumb")  # of 80 columns, and without colours
    print_table(items)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    head = next(i for i, line in enumerate(lines) if "copy rate (95 %)" in line)
    assert "held-out" in lines[head - 1] and "control" in lines[head] and "train/held-out" in lines[head]
    for item in items:
        gap = item.metrics["memorization"]["gap_ratio"]
        low, high = (100 * side for side in gap["ci95"])
        figures = (
            f"{item.metrics['frechet']['pixel']['value']:.3f}",
            f"{100 * gap['rate']:.1f} % ({low:.1f} - {high:.1f})",
            f"{item.metrics['memorization']['control']['train_median']:.2f} / "
            f"{item.metrics['memorization']['nearest_distance']['holdout_median']:.2f}",
        )
        assert any(all(figure in line for figure in figures) for line in lines), figures
    assert not any("…" in line for line in lines)
    names = "".join(line[:11].strip() for line in lines[head + 2 : head + 8])
    assert names.startswith("edmambient-2026-11-24-with-a-long-name")


def test_the_notes_hold_one_line_each_in_a_pipe(capsys):
    print_table([_evaluated("edm", 30), _evaluated("ambient", 10)])
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("Copy rate:") and "nearest of 50 training" in line and "searches 50 " in line for line in lines
    )
    assert any(line.startswith("Median L2:") and "of 50 training and of 50 held-out" in line for line in lines)
    assert sum("100 samples to 80 held-out images is biased" in line for line in lines) == 1
    assert not any("as many training images as the control's" in line for line in lines)


def test_fewer_held_out_than_training_images_are_compared_at_equal_counts(capsys):
    items = [_evaluated("edm", 30, holdout=20), _evaluated("ambient", 0, holdout=20)]
    print_table(items)
    out = capsys.readouterr().out
    m = items[0].metrics["memorization"]
    assert f"{m['control']['train_median']:.2f} / {m['nearest_distance']['holdout_median']:.2f}" in out
    assert m["control"]["train_median"] > m["nearest_distance"]["median"]
    matched = 100 * m["control"]["train_rate"]
    of = items[0].metrics["counts"]["train_distinct"]
    assert (
        f"Against 20 of the {of} training images, as many as the control's, which sees that part of the copies," in out
    )
    assert f"the rate is: edm {matched:.1f} %, ambient 0.0 %" in out
    assert "of 20 training and of 20 held-out" in out
    row = next(line for line in out.splitlines() if line.startswith(" edm "))
    assert row.split(")")[1].split()[0] == "0.0" and matched > 0, "the control's rate, of held-out images"


def test_in_pixels_the_distance_stands_once_and_similarity_is_explained(capsys):
    images, held_out = _noise_set(50, 1), _noise_set(80, 2)
    found = evaluate(_noise_set(100, 3), images, held_out, embedder=load_embedder("pixel"), settings={})
    print_table(
        [Evaluated(found.metrics, RunReport("m", 0.2, found), Path("metrics.json"), Path("report.html"), Path("n.csv"))]
    )
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Similarity (pixel), samples with a cosine above"))
    assert lines[at + 1].startswith("In pixels small pictures of one kind are that similar without being copies;")
    assert not any(line.startswith("FD-") for line in lines)


def test_enough_pictures_are_not_called_few(capsys):
    print_table([_evaluated("edm", 30, holdout=1000, samples=1000)])
    assert "biased" not in capsys.readouterr().out


@pytest.mark.parametrize("holdout", [20, 80])
def test_progress_counts_every_pair_and_both_distances(monkeypatch, holdout):
    bars: dict[tuple[str, int], list[int]] = {}

    @contextmanager
    def progress(description, total, unit="images"):
        yield bars.setdefault((description, total), []).append

    monkeypatch.setattr(metrics, "progress", progress)
    monkeypatch.setattr("fastambient.evaluation.memorization._SAMPLE_BLOCK", 30)
    monkeypatch.setattr("fastambient.evaluation.memorization._IMAGE_BLOCK", 16)
    _evaluated("edm", 0, holdout=holdout)
    (name, total), advanced = next(iter(bars.items()))
    assert name == "nearest neighbours" and sum(advanced) == total and len(advanced) > 20
    assert bars["Frechet distance", 2] == [1, 1]


def _run_on(tmp_path, images: np.ndarray, *assignments: str, train: int, holdout: int):
    """An untrained run on a store of these images; to be evaluated with samples made elsewhere."""
    np.savez(tmp_path / "all.npz", images=images)
    source = open_source(str(tmp_path / "all.npz"))
    prepare(source, tmp_path / "store", sigma_tn=0.2, noise_seed=1, train=train, holdout=holdout)
    return make_run(tmp_path / "run", *assignments, data=str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("train", "holdout", "samples", "message"),
    [
        (5, 0, 3, r"store holds no held-out images, expected at least 2: .*; prepare it with a larger --holdout"),
        (5, 1, 3, r"store holds 1 held-out images, expected at least 2: .*; prepare it with a larger --holdout"),
        (1, 5, 3, "an evaluation with 1 training images, expected at least 2; take more"),
        (5, 2, 1, "an evaluation with 1 samples, expected at least 2; take more"),
    ],
)
def test_sets_that_are_too_small_are_refused_in_one_line(tmp_path, train, holdout, samples, message):
    run = _run_on(tmp_path, _noise_set(12, 5), train=train, holdout=holdout)
    np.savez(tmp_path / "samples.npz", images=_noise_set(samples, 6))
    with pytest.raises(InputError, match=message) as refused:
        evaluate_run(run, samples=tmp_path / "samples.npz")
    assert "\n" not in str(refused.value) and not (run / "metrics.json").exists()


def test_the_smallest_sets_are_measured(tmp_path):
    run = _run_on(tmp_path, _noise_set(12, 5), train=2, holdout=2)
    np.savez(tmp_path / "samples.npz", images=_noise_set(2, 6))
    told = evaluate_run(run, samples=tmp_path / "samples.npz").metrics
    assert told["counts"] == {"train": 2, "holdout": 2, "samples": 2, "train_distinct": 2, "holdout_distinct": 2}
    assert told["memorization"]["control"]["images"] == 2


def test_sets_that_cannot_be_compared_are_found_before_sampling(tmp_path, monkeypatch):
    """With flips, a held-out picture whose mirror image trains is one that the model has seen. `prepare` keeps both on
    one side, stores of before it did may not."""
    images = _noise_set(6, 5)
    images[3:] = images[:3, ..., ::-1]
    monkeypatch.setattr(np, "isin", lambda mirrors, images: np.zeros(len(mirrors), bool))
    run = _run_on(tmp_path, images, "evaluation.flips=true", train=3, holdout=3)
    monkeypatch.setattr(evaluation_run, "load", lambda *a, **k: pytest.fail("loads the weights first"))
    with pytest.raises(InputError, match="held-out images are the mirror images of training images"):
        evaluate_run(run, num=2)


@pytest.mark.parametrize("flips", ["evaluation.flips=true", "data.xflip=true", "evaluation.flips=false"])
def test_a_runs_settings_reach_its_figures_and_its_report(tmp_path, flips):
    told = ("evaluation.threshold=0.97", "evaluation.bootstrap=50", "evaluation.seed=7")
    run = _run_on(tmp_path, _noise_set(60, 5), flips, *told, train=20, holdout=40)
    samples = _noise_set(40, 6)
    np.savez(tmp_path / "samples.npz", images=samples)
    found = evaluate_run(run, samples=tmp_path / "samples.npz", num=30)
    store = RunFolder(run).open_store()
    expected = evaluate(
        samples[:30], store.train.images[:], store.holdout.images[:],
        threshold=0.97, bootstrap=50, seed=7, flips=flips.endswith("true"), settings={}, train_names=store.train.names,
    )  # fmt: skip
    for part in ("counts", "frechet", "memorization"):
        assert found.metrics[part] == expected.metrics[part]
    protocol = {"space": "pixels in [-1, 1]", "flips": flips.endswith("true"), "bootstrap": 50, "seed": 7}
    assert found.metrics["settings"]["protocol"] == protocol
    (score,), (reported,) = expected.scores, found.report.evaluation.scores
    assert found.metrics["copies_per_train_image"]["top"][0]["name"].startswith("all.npz: row ")
    rows = found.pairs.read_text().splitlines()
    assert found.pairs == run / "nearest.csv" and len(rows) == 31 and rows[1].split(",")[1] == "", "no names in .npz"
    assert np.array_equal(reported.values, score.values) and np.array_equal(reported.control, score.control)
    assert np.array_equal(reported.control_index, score.control_index) and reported.threshold == 0.97


def test_the_embedder_is_the_settings_or_the_one_that_is_asked_for(tmp_path):
    settings = ("evaluation.features=pixel", "data.use_labels=true")
    np.savez(tmp_path / "all.npz", images=_noise_set(60, 5), labels=np.arange(60) % 3)
    prepare(
        open_source(str(tmp_path / "all.npz")), tmp_path / "store", sigma_tn=0.2, noise_seed=1, train=20, holdout=40
    )
    run = make_run(tmp_path / "run", *settings, "training.kimg=0.008", data=str(tmp_path / "store"))
    train_here(run)
    drawn = evaluate_run(run, num=3).metrics
    assert drawn["similarity"]["embedder"] == "pixel" and drawn["quality"][0]["embedder"] == "pixel"
    rows = drawn["denoising_gap"]
    assert len(rows) == 6 and all(row["train"] > 0 and row["gap"] > 0 for row in rows)
    assert [row["sigma"] for row in rows] == sorted(row["sigma"] for row in rows)
    np.savez(tmp_path / "samples.npz", images=_noise_set(5, 6))
    read = evaluate_run(run, samples=tmp_path / "samples.npz", features="none").metrics
    assert read["similarity"] is None and read["denoising_gap"] is None and read["quality"] == []
    with pytest.raises(InputError, match="--preprocess paper is DINOv2's"):
        evaluate_run(run, num=3, preprocess="paper")
    with pytest.raises(InputError, match="no embedder 'nothing'"):
        evaluate_run(run, num=3, features="nothing")


def test_pictures_are_not_written_among_the_samples(tmp_path):
    """They would be read as samples the next time."""
    run = make_run(tmp_path / "run")
    folder = tmp_path / "samples"
    folder.mkdir()
    for i, image in enumerate(RunFolder.existing(run).open_store().train.images[:3]):
        save_png(folder / f"{i}.png", image)
    with pytest.raises(InputError, match="lies among the samples"):
        evaluate_run(run, samples=folder, out=folder / "m.json")
    assert len(list(folder.iterdir())) == 3
