"""report.html: one file without network, escaped, with the numbers, the limits and readable pictures."""

from __future__ import annotations

import base64
import io
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastambient.evaluation import evaluate, report
from fastambient.evaluation.report import RunReport, gallery, nearest_pairs, write_report
from fastambient.pictures import grid


def _noise_set(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 254, (n, 1, 8, 8), np.uint8)


def _run(name: str, sigma_tn: float, copies: int, *, per_sigma: bool = True, stats: bool = True) -> RunReport:
    train, holdout, samples = _noise_set(50, 1), _noise_set(80, 2), _noise_set(100, 3)
    samples[:copies] = train[:copies] + 1
    settings = {"noise": {"sigma_tn": sigma_tn}, "note": "<i>note</i>"}
    metrics, neighbours, control = evaluate(samples, train, holdout, settings=settings)
    steps = [{"nimg": 64 * (i + 1), "loss": 60 / (i + 1) + 10} for i in range(500)] + [{"nimg": 32064, "loss": None}]
    levels = [{"sigma": s, "loss": 1 + 1 / s} for s in (0.01, 0.1, 1.0, 10.0)]
    pairs = nearest_pairs(samples, neighbours, train, 8)
    return RunReport(
        name, sigma_tn, metrics, steps if stats else [], grid(samples[:16]), pairs,
        nearest_pairs(samples, control, holdout, 3), neighbours.ratio, control.ratio, levels if per_sigma else (),
    )  # fmt: skip


class _Page(HTMLParser):
    """Checks nesting while it collects tags with their attributes, and the text outside of style and svg."""

    _VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[str, _Page]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    runs = [_run("edm <script>alert(1)</script>", 0.0, 30), _run('ambient & $x_1$ "quoted"', 0.2, 4)]
    write_report(path, runs, title="<b>two</b> & more")
    html = path.read_text(encoding="utf-8")
    return html, _Page(html)


def test_what_users_named_is_escaped(page):
    html, parsed = page
    assert "<script" not in html and "<b>two" not in html and "<i>note" not in html
    assert "<title>&lt;b&gt;two&lt;/b&gt; &amp; more</title>" in html
    assert "edm <script>alert(1)</script>" in parsed.text and "<i>note</i>" in parsed.text


def test_needs_no_network(page):
    html, parsed = page
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:image/png;base64,", "#")) or not value, (tag, value[:60])
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", html))
    assert "default-src 'none'" in html


def test_numbers_counts_and_limits_are_there(page):
    _, parsed = page
    text = parsed.text
    run = _run("x", 0.0, 30)
    gap = run.metrics["memorization"]["gap_ratio"]
    assert "30 of 100 samples (30.0 %) are copies" in text and "4 of 100 samples (4.0 %) are copies" in text
    assert f"{100 * gap['ci95'][0]:.1f} % to {100 * gap['ci95'][1]:.1f} %" in text
    assert "Against 50 held-out images, which the model never saw, the rate is 0.0 %" in text
    assert f"{run.metrics['frechet']['pixel']['value']:.3g}" in text
    assert f"{run.metrics['frechet']['pixel']['train_vs_reference']:.3g}" in text
    assert f"{run.metrics['memorization']['nearest_distance']['holdout_median']:.3g}" in text
    assert "holdout (80 images)" in text and "not a guarantee" in text
    assert "Copies: 30, of 30 among 50 distinct training images" in text
    assert "noise.sigma_tn differs 0.0 0.2" in text and "protocol.bootstrap 1000" in text
    assert "privacy" not in text.lower()


def test_is_accessible(page):
    html, parsed = page
    assert html.startswith('<!doctype html>\n<html lang="en">')
    assert all(attributes.get("alt") for tag, attributes in parsed.tags if tag == "img")
    headings = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    assert (
        sum(attributes.get("role") == "img" and bool(attributes.get("aria-label")) for _, attributes in parsed.tags)
        == 4
    )
    assert (
        "width=device-width" in html and "prefers-color-scheme: dark" in html and "image-rendering: pixelated" in html
    )


def test_pictures_are_the_pictures(page):
    _, parsed = page
    run = _run("x", 0.0, 30)
    sources = [a["src"] for tag, a in parsed.tags if tag == "img"]
    assert len(sources) == 2 + 2 * 2 * (8 + 3)

    def decode(source):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))

    assert np.array_equal(decode(sources[0]), run.grid[0])
    assert np.array_equal(decode(sources[2]), run.pairs.samples[0, 0])
    assert np.array_equal(decode(sources[3]), run.pairs.nearest[0, 0])
    control = sources[2 + 2 * 8 : 2 + 2 * (8 + 3)]
    for i in range(3):
        assert np.array_equal(decode(control[2 * i]), run.control_pairs.samples[i, 0])
        assert np.array_equal(decode(control[2 * i + 1]), run.control_pairs.nearest[i, 0])


def test_copies_are_marked_in_words(page):
    _, parsed = page
    items = [attributes for tag, attributes in parsed.tags if tag == "li" and "data-ratio" in attributes]
    assert len(items) == 2 * (8 + 3) and sum(a.get("class") == "copy" for a in items) == 8 + 4
    ratios = [float(a["data-ratio"]) for a in items]
    for part in (ratios[:8], ratios[8:11], ratios[11:19], ratios[19:]):
        assert part == sorted(part)
    assert parsed.text.count("Copy, ratio") == 12


def test_the_control_shows_held_out_images_at_the_same_ranks(page):
    _, parsed = page
    assert parsed.text.count("Control: the 3 lowest ratios of the same samples among 50 held-out images.") == 2
    run, holdout = _run("x", 0.0, 30), _noise_set(80, 2)
    assert np.array_equal(run.control_pairs.nearest, holdout[run.control_pairs.index])
    alts = [a["alt"] for tag, a in parsed.tags if tag == "img"]
    assert alts[2 + 2 * 8 + 1] == f"Held-out image {run.control_pairs.index[0]}" and alts[3].startswith(
        "Training image"
    )


def test_the_histogram_tells_copies_from_the_control(page):
    html, parsed = page
    labels = [a["aria-label"] for _, a in parsed.tags if a.get("role") == "img"]
    assert labels[0] == (
        "Histogram of the gap ratios of edm <script>alert(1)</script>: 30.0\N{NO-BREAK SPACE}% of the samples lie below"
        " 0.333 among training images, 0.0\N{NO-BREAK SPACE}% among held-out images"
    )
    assert "100 samples among 50 training images (filled) and 50 held-out images (outlined)" in parsed.text
    run = _run("x", 0.0, 30)
    train, control = report._shares(run.ratios), report._shares(run.control_ratios)
    assert train.sum() == pytest.approx(100) and control.sum() == pytest.approx(100)
    assert train[:8].sum() == pytest.approx(30) and control[:8].sum() == 0, "bins below 1/3 hold the copies"
    assert report._shares(np.array([0.0, 1.0])).tolist() == [50, *[0] * 22, 50], "an edge counts"
    drawn = report._histogram(train, control, 1 / 3, 50.0, 0)
    assert "copies</text>" in drawn and "gap ratio d1/d2</text>" in drawn
    assert drawn != report._histogram(train, control, 0.6, 50.0, 0) and drawn != report._histogram(
        train, train, 1 / 3, 50.0, 0
    )
    lines = {
        re.search(r'<path d="([^"]+)"[^>]*stroke-dasharray: 4', report._histogram(train, control, at, 50.0, 0)).group(1)
        for at in (0.2, 1 / 3, 0.6)
    }
    assert len(lines) == 3, "the dashed line stands at the threshold"
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_each_run_has_the_histogram_of_its_own_ratios(tmp_path, monkeypatch):
    runs, drawn = [_run("a", 0.0, 30), _run("b", 0.2, 0)], []
    monkeypatch.setattr(report, "_histogram", lambda *given: drawn.append(given) or "")
    report.write_report(tmp_path / "report.html", runs, title="x")
    for run, (train, control, threshold, highest, _) in zip(runs, drawn, strict=True):
        assert np.array_equal(train, report._shares(run.ratios))
        assert np.array_equal(control, report._shares(run.control_ratios))
        assert threshold == 1 / 3 and highest == max(x.max() for given in drawn for x in given[:2])


def test_medians_are_of_equally_many_images(tmp_path):
    """Of 80 held-out images against 200 training images the nearest lies farther, copied or not."""
    train, holdout, samples = _noise_set(200, 1), _noise_set(80, 2), _noise_set(100, 3)
    samples[:40] = train[:40] + 1
    metrics, neighbours, control = evaluate(samples, train, holdout, settings={})
    pairs = nearest_pairs(samples, neighbours, train, 2), nearest_pairs(samples, control, holdout, 2)
    run = RunReport("r", 0.0, metrics, [], grid(samples[:4]), *pairs, neighbours.ratio, control.ratio)
    write_report(tmp_path / "report.html", [run], title="t")
    text = _Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    m = metrics["memorization"]
    shown = [f"{d:.3g} of 80 images" for d in (m["control"]["train_median"], m["nearest_distance"]["holdout_median"])]
    assert " ".join(shown) in text and f"{m['nearest_distance']['median']:.3g}" != shown[0].split()[0]
    assert f"{m['nearest_distance']['median']:.3g} of" not in text
    matched = f"{100 * m['control']['train_rate']:.1f}"
    assert (
        matched not in ("0.0", "40.0") and f"the rate is 0.0 % (against as many training images: {matched} %)" in text
    )
    assert "0.0 % 80 images" in text


def test_few_pictures_are_said_once(page):
    note = "The Frechet distance of 100 samples to 80 held-out images is biased"
    assert page[1].text.count(note) == 1


def test_comparison_claims_a_difference_only_where_intervals_are_apart(tmp_path):
    def text(*runs):
        write_report(tmp_path / "report.html", runs, title="t")
        return _Page((tmp_path / "report.html").read_text(encoding="utf-8")).text

    apart = text(_run("edm", 0.0, 30), _run("ambient", 0.2, 4))
    assert "ambient (sigma_tn 0.2) copies less than edm (sigma_tn 0): 4.0 % against 30.0 % of the samples" in apart
    close = text(_run("edm", 0.0, 30), _run("ambient", 0.2, 28))
    assert "No difference in copying is shown" in close and "copies less" not in close
    assert "copies less" not in text(_run("edm", 0.0, 30)) and "No difference" not in text(_run("edm", 0.0, 30))


def test_runs_without_copies_losses_or_noise_levels(tmp_path):
    runs = [_run(f"run {i}", float("inf"), 0, per_sigma=False, stats=False) for i in range(7)]
    write_report(tmp_path / "report.html", runs, title="t")
    text = _Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "0 of 100 samples (0.0 %) are copies" in text and "The 95 % interval over samples is 0.0 % to 3.6 %" in text
    assert "None of the samples is a copy" in text and "Training loss" not in text


def test_pairs_and_gallery_are_sorted_and_mirrored():
    train, samples = _noise_set(50, 1), _noise_set(20, 3)
    samples[7] = train[3, ..., ::-1]
    samples[11] = train[9] + 2
    _, neighbours, _ = evaluate(samples, train, _noise_set(60, 2), flips=True, settings={})
    pairs = nearest_pairs(samples, neighbours, train, 6)
    assert pairs.index[:2].tolist() == [3, 9] and pairs.ratio[0] == 0 and (np.diff(pairs.ratio) >= 0).all()
    assert np.array_equal(pairs.nearest[0], samples[7]) and np.array_equal(pairs.nearest[1], train[9])
    assert np.array_equal(train, _noise_set(50, 1))
    picture = gallery(samples, neighbours, train, 6)
    assert np.array_equal(picture[0, 4 : 4 + 64 : 8, 4 : 4 + 64 : 8], samples[7, 0])
    assert np.array_equal(picture[0, 4 : 4 + 64 : 8, 70 : 70 + 64 : 8], samples[7, 0])
    assert len(nearest_pairs(samples, neighbours, train, 500).ratio) == 20
