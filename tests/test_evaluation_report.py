"""report.html: one file without network, escaped, with the numbers, the limits and readable pictures.

What its script does is tested in a browser, in test_report_browser.py.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import report_checks as checks
from PIL import Image

from fastambient.errors import InputError
from fastambient.evaluation import overviews, report, report_figures, report_gallery, report_plots, sentences
from fastambient.evaluation.figures_layout import draw
from fastambient.evaluation.report import RunReport, fd_note, nearest_pairs, write_report
from fastambient.pictures import grid


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
        if not {"style", "svg", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _read(folder, *runs: RunReport, title: str = "t") -> tuple[str, _Page]:
    write_report(folder / "report.html", runs, title=title)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, _Page(re.sub(r'<span class="keep">(.*?)</span>', r"\1", html))


def _with(run: RunReport, **changed) -> RunReport:
    """The run with other metrics; a key is a path joined by double underscores."""
    metrics = json.loads(json.dumps(run.metrics))
    for path, value in changed.items():
        *way, last = path.split("__")
        place = metrics
        for key in way:
            place = place[key]
        place[last] = value
    return dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, metrics=metrics))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[str, _Page]:
    runs = [
        checks.run("edm </script><script>alert(1)</script>", 0.0, 30),
        checks.run('ambient & $x_1$ "quoted"', 0.2, 4),
    ]
    return _read(tmp_path_factory.mktemp("report"), *runs, title="<b>two</b> & more")


def _scripts(html: str) -> list[tuple[str, str]]:
    """(attributes, content) of the script elements, as a browser cuts them out."""
    return re.findall(r"<script([^>]*)>(.*?)</script", html, re.DOTALL | re.IGNORECASE)


def test_what_users_named_is_escaped(page):
    html, parsed = page
    assert "<script>alert" not in html and "<b>two" not in html and "<i>note" not in html
    assert "<title>&lt;b&gt;two&lt;/b&gt; &amp; more</title>" in html
    assert "edm </script><script>alert(1)</script>" in parsed.text and "<i>note</i>" in parsed.text
    data = json.loads(next(content for attributes, content in _scripts(html) if "application/json" in attributes))
    assert [run["name"] for run in data] == ["edm </script><script>alert(1)</script>", 'ambient & $x_1$ "quoted"']


def test_needs_no_network_and_runs_one_script(page):
    html, parsed = page
    for tag, attributes in parsed.tags:
        assert tag not in ("iframe", "object", "base", "embed", "form")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (tag, value[:60])
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", html))
    run = [content for attributes, content in _scripts(html) if "type=" not in attributes]
    assert len(run) == 1 and not re.search(r"https?:|fetch\(|XMLHttp|WebSocket|import\(|innerHTML|eval\(", run[0])
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    allowed = base64.b64encode(hashlib.sha256(run[0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and f"script-src 'sha256-{allowed}';" in policy


def test_one_sentence_a_run_with_its_numbers_and_limits(page):
    text = page[1].text
    assert (
        "30.0 % of samples are copies of a training image (95 % interval 21.0–39.0 %); of held-out images 0.0 %."
        in text
    )
    assert (
        "4.0 % of samples are copies of a training image (95 % interval 0.2–7.8 %); of held-out images 0.0 %." in text
    )
    assert (
        "30 of 100 samples lie less than 0.333 times as far from one of the 50 training images as from any other."
        in text
    )
    assert "The control searches 50 held-out images, which the model never saw." in text
    assert "not a guarantee" in text and "cannot be recovered" in text and "privacy" not in text.lower()


def test_the_sentence_without_a_control_says_so():
    run = checks.run("r", None, 12, holdout=0)
    said = sentences.summary(run.metrics)
    assert said["lead"] == (
        "12.0\xa0% of samples are copies of a training image (95\xa0% interval 5.6–18.4\xa0%);"
        " there is no held-out set, so the control is missing."
    )
    assert "cannot be told how much of this is chance" in said["detail"] and "never saw" not in said["detail"]


def test_fewer_held_out_images_are_compared_at_equal_counts():
    m = _with(checks.run("r", 0.2, 40, train=200, holdout=80), memorization__control__train_rate=0.55).metrics
    assert "searches 80 held-out images" in sentences.summary(m)["detail"]
    assert "against as many of the 200 training images the rate is 55.0\xa0%." in sentences.summary(m)["detail"]
    rows = {f.name: f for f in report_figures.figures(m)}
    assert rows["Copy rate, equal counts"].value == "55.0\xa0%"
    assert rows["Nearest training image"].value == "3.33", "the median at equal counts, not the one of all images"
    m["similarity"]["control"] = {"images": 80, "train_mean": 0.61}
    rows = {f.name: f for f in report_figures.figures(m)}
    assert rows["Mean highest similarity"].detail.startswith("0.61 at equal counts, held-out 0.7")
    assert "It sees 80 of 200 training images, and that part of the copies." in rows["Excess above 0.95"].meaning
    m["similarity"]["control"]["images"] = 200
    assert "what chance does not explain" in {f.name: f for f in report_figures.figures(m)}["Excess above 0.95"].meaning
    assert "Copy rate, equal counts" not in {f.name for f in report_figures.figures(checks.run("r", 0.2, 4).metrics)}


def test_the_table_has_every_figure_with_its_name_and_meaning(page):
    _, parsed = page
    text = parsed.text
    for words in (
        "Copy rate ↓ lower is better pixels, ratio below 0.333", "Copy rate, held-out control", "Training images copied",
        "Similarity above 0.95 ↓ lower is better efficientnet-lite0, cosine", "Excess above 0.9", "Mean highest similarity",
        "FD-100 vs held-out (fewer samples than dimensions) ↓", "KID-100 vs held-out ↓", "± 0.0012", "Recall-100 vs held-out ↑",
        "\u22121 to 9 %, held-out 0.0 %", "25 to 35 %, held-out 0.0 %", "FLD gap", "1 to 7.5, of 40 samples 6, of 40 held-out images 3.5", "MiFID",
        "mean cosine distance 0.21; at equal counts 0.22, to held-out 0.23", "at 60 images each 1.5, training set 1.4",

        "density, coverage: need at least 6 held-out images, here 5",
    ):  # fmt: skip
        assert words in text, words
    assert text.count("– not measured") == 2, "coverage of both runs"
    assert "noise.sigma_tn" not in text and "sigma_tn differs 0.0 0.2" in text and "protocol.bootstrap 1000" in text
    rows = dict(report_figures.table([checks.run("x", 0.0, 30).metrics]))
    assert [len(rows[k]) for k in ("Copying", "Quality")] == [12, 7] and all(
        row["meaning"] for section in rows.values() for row in section
    )


def test_runs_with_different_figures_share_a_table():
    some, other = checks.run("a", 0.0, 3), checks.run("b", 0.2, 3, holdout=0, similarity=False)
    sections = dict(report_figures.table([some.metrics, other.metrics]))
    cells = {row["name"]: [c["value"] for c in row["cells"]] for rows in sections.values() for row in rows}
    assert cells["Copy rate"] == ["3.0\xa0%", "3.0\xa0%"] and cells["Copy rate, held-out control"] == ["0.0\xa0%", ""]
    assert cells["MiFID"] == ["13.1", ""] and cells["FD-100 vs held-out"] == ["1.23", ""]


def test_every_distance_has_its_counts_in_its_name():
    """That in pixels, too: with few pictures it says more of their number than of the pictures."""
    quality = dict(report_figures.table([checks.run("x", 0.0, 30, samples=1300, holdout=80).metrics]))["Quality"]
    assert [row["space"] for row in quality if row["name"] == "FD-1.3k vs held-out"] == ["pixels"]
    few = dict(report_figures.table([checks.run("x", 0.0, 30, samples=40, holdout=50).metrics]))["Quality"]
    name = "FD-40 vs held-out (fewer samples and reference images than dimensions)"
    assert [row["space"] for row in few if row["name"] == name] == ["pixels"]
    bare = dict(report_figures.table([checks.run("x", 0.0, 30, holdout=0).metrics]))
    assert "Quality" not in bare, "nothing to compare with"


def test_everything_may_be_none(tmp_path):
    run = checks.run("r", None, 0, holdout=0, logs=False)
    for key in ("similarity", "mifid", "fld", "denoising_gap", "quality", "notes", "copies_per_train_image"):
        run = _with(run, **{key: None})
    run = _with(run, memorization__control=None, memorization__nearest_distance=None, frechet__pixel=None)
    html, parsed = _read(tmp_path, run)
    assert "0.0 % of samples are copies" in parsed.text and "the control is missing" in parsed.text
    assert "Similarity above" not in parsed.text and "Training loss" not in parsed.text
    assert (
        "Most copied" not in parsed.text and "What chance looks like" not in parsed.text and fd_note(run.metrics) == ""
    )
    assert "None" not in parsed.text and "nan" not in parsed.text
    nothing = {"embedder": "dinov2", "mean": None, "above_0.9": None}
    assert "Similarity above 0.9" in _read(tmp_path, _with(run, similarity=nothing))[1].text
    odd = _with(run, quality=[{"embedder": "x", "figures": {"FD-3 vs held-out": "inf"}}])
    assert (
        "FD-3 vs held-out ↓ lower is better x Frechet distance of the samples to images that never trained. inf"
        in _read(tmp_path, odd)[1].text
    )
    with pytest.raises(InputError, match="a report of 0 runs"):
        write_report(tmp_path / "x.html", [], title="t")


def test_comparison_claims_a_difference_only_where_intervals_are_apart():
    def text(*runs):
        return sentences.compare([(run.title, run.metrics) for run in runs]).replace("\xa0", " ")

    edm = checks.run("edm", 0.0, 30)
    apart = text(edm, checks.run("ambient", 0.2, 4))
    assert "ambient (sigma_tn 0.2) copies less than edm (sigma_tn 0): 4.0 % against 30.0 % of the samples" in apart
    close = text(edm, checks.run("ambient", 0.2, 28))
    assert "No difference in copying is shown" in close and "copies less" not in close and "1.23 and 1.23" in close
    assert text(edm) == "" and "Frechet" not in text(edm, checks.run("b", None, 3, holdout=0))


def test_is_accessible(page):
    html, parsed = page
    assert html.startswith('<!doctype html>\n<html lang="en">')
    assert all(attributes.get("alt") for tag, attributes in parsed.tags if tag == "img")
    headings = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    labelled = [a for _, a in parsed.tags if a.get("role") == "img"]
    assert len(labelled) == 2 * 2 + 2 + 3 and all(a.get("aria-label") for a in labelled)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in parsed.tags if a.get("aria-labelledby")} <= set(ids)
    for words in ("width=device-width", "prefers-color-scheme: dark", "image-rendering: pixelated", ":focus-visible"):
        assert words in html


def test_histograms_tell_copies_from_the_control(page):
    _, parsed = page
    labels = [a["aria-label"].replace("\xa0", " ") for _, a in parsed.tags if a.get("role") == "img"]
    assert labels[0] == (
        "Histogram of gap ratio d1/d2 (pixels) of edm </script><script>alert(1)</script>: 30.0 % of the samples lie below"
        " 0.333 among training images, 0.0 % among held-out images"
    )
    assert labels[2].startswith("Histogram of cosine similarity (EfficientNet-Lite0)") and "above 0.95" in labels[2]
    gap, cosine = checks.evaluation(30).scores
    train, control = (report_plots.shares(v, (0.0, 1.0)) for v in (gap.values, gap.control))
    assert train.sum() == pytest.approx(100) and train[:8].sum() == pytest.approx(30) and control[:8].sum() == 0
    assert report_plots.shares(np.array([0.0, 1.0, 1.0000001]), (0.0, 1.0))[[0, -1]] == pytest.approx(
        [100 / 3, 200 / 3]
    )
    assert report_plots.span([gap]) == (0, 1) and report_plots.span([cosine]) == (0.5, 1)
    drawn = report_plots.histogram(gap, (0, 1), 50.0, 0)
    assert "copies</text>" in drawn and "gap ratio d1/d2</text>" in drawn and "#010203" not in drawn
    lines = set()
    for at in (0.2, 1 / 3, 0.6):
        drawn = report_plots.histogram(dataclasses.replace(gap, threshold=at), (0, 1), 50.0, 0)
        lines.add(re.search(r'<path d="([^"]+)"[^>]*stroke-dasharray: 4', drawn).group(1))
    assert len(lines) == 3, "the dashed line stands at the threshold"


def test_timeline_and_gap_are_drawn_where_there_is_data(page, tmp_path):
    text = page[1].text
    assert (
        "Copying during training" in text
        and "dotted: of held-out images" in text
        and "knows its training images" in text
    )
    rows = [{"kimg": 4, "rate": 0.1, "ci95": [0.0, 0.2], "holdout_rate": None, "fd": None}, {"kimg": 8, "rate": None}]
    run = dataclasses.replace(checks.run("r", 0.2, 3, holdout=0, logs=False), timeline=rows)
    text = _read(tmp_path, run)[1].text
    assert "Copying during training" in text and "Frechet distance of the same samples" not in text
    assert "Loss" not in text
    assert report_plots.points(rows, "kimg", "rate") == ([4.0], [0.1])
    assert report_plots.curves([([], [])], "x", "y") is None
    steps = [{"nimg": 1000 * i, "loss": float(i)} for i in range(1, 241)] + [{"nimg": 241000, "loss": None}]
    assert report_plots.binned(steps)[0][:2] == [2.0, 4.0] and report_plots.binned(steps)[1][:2] == [1.5, 3.5]


def test_the_most_copied_training_images_are_shown(page):
    _, parsed = page
    run = checks.run("x", 0.0, 30)
    found = report_gallery.most_copied(run.evaluation)
    assert len(found) == 10 and found[0][1] == 1 and np.array_equal(found[0][3], run.evaluation.train[found[0][0]])
    assert parsed.text.count("1 copy image") == 14


def _decode(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[-1]))))


def test_grids_and_controls_are_the_pictures(page):
    _, parsed = page
    sources = {a["alt"]: a["src"] for tag, a in parsed.tags if tag == "img"}
    e = checks.run("x", 0.2, 4).evaluation
    assert np.array_equal(_decode(sources['Grid of samples of ambient & $x_1$ "quoted"']), grid(e.samples[:64])[0])
    pairs = nearest_pairs(e, 6, control=True)
    assert (np.diff(pairs.value) >= 0).all() and pairs.value[0] == e.scores[0].control.min()
    assert np.array_equal(_decode(sources[f"Sample {pairs.number[0]}"]), e.samples[pairs.number[0], 0])
    assert np.array_equal(_decode(sources[f"Held-out image {pairs.index[0]}"]), e.holdout[pairs.index[0], 0])


def _unpacked(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def _cut(sheets: report_gallery.Sheets, place: int) -> np.ndarray:
    """The picture at a place, uint8 [C, H, W], as the page's script finds it."""
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheets.files[place // sheets.each]))).convert("RGB"))
    y, x = divmod(place % sheets.each, sheets.columns)
    tile = sheet[y * sheets.height : (y + 1) * sheets.height, x * sheets.width : (x + 1) * sheets.width]
    return tile.transpose(2, 0, 1)


@pytest.mark.parametrize("webp", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16)])
def test_sheets_hold_every_picture_without_loss(monkeypatch, webp, channels, size):
    monkeypatch.setattr(report_gallery, "_SHEET", 20 * size * size)
    monkeypatch.setattr(report_gallery.features, "check", lambda name: webp)
    e = checks.evaluation(20, samples=50, train=30, channels=channels, size=size)
    numbers, pictures = report_gallery.gallery_data(e)
    assert pictures["samples"].mime == f"image/{'webp' if webp else 'png'}"
    assert len(pictures["samples"].files) == -(-50 // pictures["samples"].each)
    shown = _unpacked(numbers["shown"], "<i4")
    assert np.array_equal(shown, np.argsort(e.scores[0].values, kind="stable"))
    for place, n in enumerate(shown):
        assert np.array_equal(_cut(pictures["samples"], place), np.broadcast_to(e.samples[n], (3, size, size)))
    _, first = np.unique(_unpacked(numbers["scores"][0]["place"], "<i4"), return_index=True)
    assert (np.diff(first) > 0).all(), "in the order of their use: the first view needs the first sheet alone"
    for score, packed in zip(e.scores, numbers["scores"], strict=True):
        assert np.array_equal(_unpacked(packed["values"], "<f8"), score.values), "as they were counted, not rounded"
        assert np.array_equal(_unpacked(packed["control"], "<f8"), score.control)
        index, places = _unpacked(packed["index"], "<i4"), _unpacked(packed["place"], "<i4")
        assert np.array_equal(index, score.index[shown])
        assert np.array_equal(_unpacked(packed["mirrored"], "u1"), score.mirrored[shown])
        for i, place in zip(index, places, strict=True):
            assert np.array_equal(_cut(pictures["train"], place), np.broadcast_to(e.train[i], (3, size, size)))


def test_too_many_pictures_keep_the_most_alike_of_every_measure(monkeypatch):
    monkeypatch.setattr(report_gallery, "MOST_PIXELS", 2 * 10 * 64)
    e = checks.evaluation(20)
    numbers, pictures = report_gallery.gallery_data(e)
    shown = _unpacked(numbers["shown"], "<i4")
    assert len(shown) == 10 and len(_unpacked(numbers["scores"][0]["values"], "<f8")) == 100 == numbers["total"]
    for score in e.scores:
        assert set(report_gallery.most_alike(score.values, score)[:5]) <= set(shown.tolist())
    assert (np.diff(e.scores[0].values[shown]) >= 0).all()


def test_large_pictures_are_averaged_down():
    images = np.zeros((3, 3, 300, 200), np.uint8)
    images[1, :, :150] = 200
    made = report_gallery.sheets(images)
    assert (made.width, made.height) == (67, 100)
    assert _cut(made, 1)[:, :49].min() == 200 and _cut(made, 1)[:, 51:].max() == 0


def test_pairs_are_sorted_and_mirrored():
    e = checks.evaluation(5, samples=20)
    before = e.train.copy()
    for k, score in enumerate(e.scores):
        pairs = nearest_pairs(e, 6, score=k)
        best = np.sort(score.values) if score.closer == "low" else np.sort(score.values)[::-1]
        assert pairs.value.tolist() == best[:6].tolist()
        for n, i, nearest in zip(pairs.number, pairs.index, pairs.nearest, strict=True):
            assert i == score.index[n]
            assert np.array_equal(nearest, e.train[i][..., ::-1] if score.mirrored[n] else e.train[i])
    assert np.array_equal(e.train, before)
    assert len(nearest_pairs(e, 500).value) == 20
    assert len(nearest_pairs(checks.evaluation(5, holdout=0), 6, control=True).value) == 0


def test_the_pictures_beside_a_measurement_say_what_is_in_them(tmp_path, monkeypatch):
    blocks = []
    monkeypatch.setattr(overviews, "draw", lambda path, given, **options: blocks.extend(given) or draw(path, given))
    e = checks.evaluation(5)
    overviews.draw_nearest(tmp_path / "n.png", "run $x_1$", e)
    pairs = nearest_pairs(e, 24)
    assert blocks[0].title.startswith(
        "run $x_1$: the 24 of 100 samples that are most alike to a training image, by d1/d2,"
    )
    assert blocks[0].title.endswith("5 of 100 are copies (d1/d2 < 0.333)") and blocks[1].title == ""
    assert all(tuple(block.rows) == ("sample", "nearest training image") for block in blocks)
    tiles = np.concatenate([block.tiles for block in blocks], axis=1)
    assert np.array_equal(tiles[0], pairs.samples) and np.array_equal(tiles[1], pairs.nearest)
    labels = [label for block in blocks for label in block.columns]
    assert labels == [f"{v:.2f}" + (" copy" if v < 1 / 3 else "") for v in pairs.value] and "copy" in labels[4]
    assert [sorted(block.alarmed) for block in blocks] == [[0, 1, 2, 3, 4], [], []]
    blocks.clear()
    overviews.draw_samples(tmp_path / "s.png", "run", e.samples, seeded=True)
    overviews.draw_samples(tmp_path / "s.png", "run", e.samples[:9], seeded=False)
    assert [block.title for block in blocks] == [
        "run: the first 64 of 100 samples, seeds 0 to 63, row by row, not selected",
        "run: all 9 samples, in their order, row by row, not selected",
    ]
    assert np.array_equal(blocks[1].tiles[0, 0], grid(e.samples[:9]))


def test_a_copy_is_strictly_beyond_the_threshold():
    gap, cosine = checks.evaluation(5).scores
    assert report_gallery.is_copy(np.array([1 / 3, 0.3333]), gap).tolist() == [False, True]
    assert report_gallery.is_copy(np.array([0.95, 0.9501]), cosine).tolist() == [False, True]


def test_few_pictures_are_said_once(page):
    note = "The Frechet distance of 100 samples to 80 held-out images is biased"
    assert page[1].text.count(note) == 1


def test_the_files_of_the_page_have_no_carriage_return():
    """A browser turns them into line feeds before it hashes the script, and would refuse to run it."""
    folder = report.Path(report.__file__).parent
    assert all(b"\r" not in (folder / name).read_bytes() for name in ("report.js", "report.css", "report.html"))


@pytest.mark.parametrize(
    ("precision", "coverage", "copies", "words"),
    [
        (0.02, 0.5, 4, "Precision is 0.02 and coverage is 0.50 (pixels): hardly a sample looks like a real image"),
        (0.8, 0.01, 4, "Precision is 0.80 and coverage is 0.01 (pixels): the samples look like few of the real ones"),
        (None, 0.01, 4, "Coverage is 0.01 (pixels): the samples look like few"),
        (0.8, 0.5, 4, ""),
        (0.1, 0.5, 4, ""),
        (0.02, 0.01, 50, ""),  # half of the samples are copies: no low rate to doubt
        (None, None, 4, ""),
    ],
)
def test_a_low_copy_rate_of_samples_like_no_image_says_nothing(precision, coverage, copies, words, tmp_path):
    q = {"embedder": "pixel", "precision": precision, "coverage": coverage, "figures": {}, "notes": []}
    run = _with(checks.run("m", 0.2, copies), quality=[q])
    told = sentences.doubt(run.metrics)
    assert told.startswith(words) and bool(told) == bool(words)
    html, page = _read(tmp_path, run)
    assert ("a low copy rate says nothing here" in page.text) == bool(words)


@pytest.mark.parametrize(("samples", "holdout"), [(2, 2), (2, 3), (3, 2), (10, 5)])
def test_too_few_held_out_images_for_a_coverage_raise_no_doubt_and_no_error(samples, holdout):
    q = {"embedder": "pixel", "precision": 0.5, "coverage": None}
    told = {
        "memorization": {"gap_ratio": {"rate": 0.0}},
        "counts": {"samples": samples, "holdout": holdout},
        "quality": [q],
    }
    assert sentences.doubt(told) == ""
    assert "Precision is 0.00" in sentences.doubt(told | {"quality": [q | {"precision": 0.0}]})


def test_few_samples_cover_little_without_doubt():
    q = {"embedder": "pixel", "precision": 0.8, "coverage": 0.03, "figures": {}, "notes": []}
    of = {"samples": 100, "holdout": 10000}  # as many real images would cover 1 - (9999/10099)^5 = 5 %
    few = _with(checks.run("m", 0.2, 4), quality=[q], counts={**checks.run("m", 0.2, 4).metrics["counts"], **of})
    assert sentences.doubt(few.metrics) == ""
    q["coverage"] = 0.004
    assert "coverage is 0.00" in sentences.doubt(_with(few, quality=[q]).metrics)


def test_the_contents_lead_to_what_is_there(page, tmp_path):
    plain = _read(tmp_path, checks.run("m", 0.2, 4, logs=False))[1]
    for parsed, more in ((page[1], ["#timeline"]), (plain, [])):
        links = [a["href"] for tag, a in parsed.tags if tag == "a" and "class" not in a]
        assert links == ["#figures", "#gallery", "#samples", *more, "#method"]
        assert {link[1:] for link in links} <= {a.get("id") for _, a in parsed.tags}


def test_a_distance_in_pixels_is_told_once():
    run = checks.run("m", 0.2, 4)
    q = {**run.metrics["quality"][0], "embedder": "pixel"}
    similar = {**run.metrics["similarity"], "embedder": "pixel"}
    rows = report_figures.figures(_with(run, quality=[q], similarity=similar).metrics)
    assert [(r.space, r.value) for r in rows if r.name.startswith("FD-")] == [("pixels", "1.23")]
    assert {r.space for r in rows if r.section == "Quality"} == {"pixels"}
    (told,) = (r.meaning for r in rows if r.name == "Similarity above 0.95")
    assert told.endswith("above 0.95. Small pictures of one kind reach it in pixels without being copies.")
