"""report.html in a real browser: it loads from a file without a request, sorts, recounts, and stays fluid."""

from __future__ import annotations

import base64
import io
import itertools
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import report_checks as checks
from PIL import Image

from fastambient.evaluation.report import write_report

_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# How long a slider's move takes until the page has been laid out, without what a shared machine adds between frames.
_MOVE = """() => {
  const slider = document.getElementById("threshold"), before = performance.now();
  slider.value = Number(slider.value) + (Number(slider.value) % 2 ? 1 : -1);
  slider.dispatchEvent(new Event("input"));
  document.body.getBoundingClientRect();
  return performance.now() - before;
}"""
_SORT = """name => {
  const order = document.getElementById("order"), before = performance.now();
  order.value = name;
  order.dispatchEvent(new Event("change"));
  document.body.getBoundingClientRect();
  return performance.now() - before;
}"""
# Text whose contrast to the colour behind it is below WCAG's 4.5, and what is shown or used without a name.
_FAINT = """() => {
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), e = walk.currentNode.parentElement;
    if (!text || !e.getClientRects().length || e.closest("svg, button:disabled, option")) continue;
    const [a, b] = [numbers(getComputedStyle(e).color), behind(e)].map(light);
    if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5) faint.push(text);
    seen += 1;
  }
  return [seen, faint];
}"""
_NAMELESS = """() => [...document.querySelectorAll("img, input, select, button, canvas, [role=img], [role=region]")].filter(
  e => !(e.alt || e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()
         || e.closest("[aria-label], [aria-hidden]"))).map(e => e.outerHTML.slice(0, 80))"""
_DRAWN = """() => {
  const all = [...document.querySelectorAll("#pairs canvas")];
  return all.length > 0 && all.every(c => c.dataset.drawn === c.dataset.key);
}"""


def _missing(what: str) -> NoReturn:
    """A test that is always skipped shows nothing: where CI is set, what it needs has to be there."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI needs {what}")
    pytest.skip(f"needs {what}")


def _executable() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or _missing("Chromium or Chrome on the PATH: make browser")


@pytest.fixture(scope="module")
def browser():
    try:
        import playwright.sync_api as sync
    except ImportError:
        _missing("playwright: pip install 'playwright>=1.49'")
    found = _executable()
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, headless=True, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def two(folder) -> tuple[Path, list]:
    """Two runs, with a name that would break out of HTML and of a script if it could."""
    runs = [checks.run("</script><b>edm</b>", 0.0, 30), checks.run("ambient & co", 0.2, 4, seed=5)]
    write_report(folder / "two.html", runs, title="<b>two</b> & more")
    return folder / "two.html", runs


@pytest.fixture
def visit(browser):
    """Opens a file; at the end no request left the file, and the console holds no error."""
    pages, wrong = [], []

    def visit(path: Path, *, width: int = 1280, height: int = 900, **options):
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(20_000)
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or wrong.append(r.url[:200]))
        page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.close()
    assert wrong == []


def _keep(page, name: str, *, full: bool = True) -> None:
    """A picture of the page for people to look at."""
    out = Path(os.environ.get("FASTAMBIENT_ARTIFACTS", "build/artifacts"))
    out.mkdir(parents=True, exist_ok=True)
    page.wait_for_function(_DRAWN)
    page.screenshot(path=out / f"{name}.png", full_page=full)


def _count(page) -> str:
    return page.locator("#count").inner_text().replace("\xa0", " ")


def _values(page) -> list[float]:
    return page.eval_on_selector_all("#pairs li", "all => all.map(li => Number(li.dataset.value))")


def _numbers(page) -> list[int]:
    return page.eval_on_selector_all("#pairs li", "all => all.map(li => Number(li.dataset.sample))")


def _counted(score, threshold: float) -> str:
    """What the page has to say, by NumPy."""
    parts = []
    for values in (score.values, score.control):
        copies = int((values < threshold if score.closer == "low" else values > threshold).sum())
        parts.append((copies, len(values), f"{100 * copies / len(values):.1f} %"))
    (n, of, share), (k, m, chance) = parts
    return f"{n:,} of {of:,} samples ({share}) are copies at this threshold; against held-out images {k:,} of {m:,} ({chance})."


def _decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


def _threshold(page) -> float:
    return float(page.locator("#value").inner_text())


@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception), (None, pytest.skip.Exception)]
)
def test_a_missing_browser_is_skipped_and_in_ci_a_failure(monkeypatch, tmp_path, ci, outcome):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    if ci is not None:
        monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="make browser"):
        _executable()
    (tmp_path / "chromium-browser").write_text("#!/bin/sh\n")
    (tmp_path / "chromium-browser").chmod(0o755)
    assert _executable() == str(tmp_path / "chromium-browser")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("there", "root", "said", "asked"),
    [
        ("google-chrome apt-get", True, "browser: {bin}/google-chrome", None),
        ("", True, "there is no apt-get to install one", None),
        ("apt-get", False, "as root run: make browser", None),
        ("apt-get", True, "", ""),
        ("apt-get sudo", False, "", "by sudo "),
    ],
)
def test_make_browser_installs_one_where_there_is_none(tmp_path, there, root, said, asked):
    """With commands that only write down what they were asked."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    scripts = {
        "id": f"echo {0 if root else 1000}",
        "env": f'echo "$SUDO$@" >> {log}',
        "sudo": 'SUDO="by sudo " exec "$@"',
    }
    for name in ["id", "env", *there.split()]:
        (folder / name).write_text(f"#!/bin/sh\n{scripts.get(name, 'exit 1')}\n")
        (folder / name).chmod(0o755)
    done = subprocess.run(
        [shutil.which("make"), "--no-print-directory", "browser"],
        cwd=Path(__file__).parents[1], env={"PATH": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said.format(bin=folder) in done.stdout
    lines = log.read_text().splitlines() if log.exists() else []
    if asked is None:
        assert lines == [] and len(done.stdout.splitlines()) == 1
    else:
        assert all(line.startswith(f"{asked}DEBIAN_FRONTEND=noninteractive apt-get") for line in lines)
        assert [line.split()[-1] for line in lines] == ["update", "chromium"]


def test_ci_has_a_browser_before_it_tests():
    commands = (Path(__file__).parents[1] / ".ci" / "run").read_text().splitlines()
    wanted = ["export CI=true", "make lint", "make browser", "make test", "make test-slow"]
    assert [c.split("  #")[0] for c in commands if c.startswith(("make", "export"))] == wanted


def test_the_count_is_numpys_wherever_the_keyboard_moves_the_slider(visit, two):
    page, (gap, cosine) = visit(two[0]), two[1][0].evaluation.scores
    assert _count(page) == _counted(gap, 1 / 3) and _count(page).startswith("30 of 100 samples (30.0 %)")
    slider = page.locator("#threshold")
    slider.focus()
    seen = []
    for key, times in (("ArrowRight", 1), ("ArrowRight", 9), ("ArrowLeft", 3), ("PageUp", 2), ("End", 1), ("Home", 1)):
        for _ in range(times):
            slider.press(key)
        seen.append(_threshold(page))
        assert _count(page) == _counted(gap, seen[-1]), key
        assert slider.get_attribute("aria-valuetext") == f"below {seen[-1]:.3f}"
    assert seen[0] == 0.335 and seen[1] == 0.38 and seen[2] == 0.365 and seen[3] > 0.4 and seen[4:] == [1, 0]
    page.locator("#reset").press("Enter")
    assert _count(page) == _counted(gap, 1 / 3) and page.evaluate("document.activeElement.id") == "threshold"

    page.select_option("#measure", "similarity")
    assert _count(page) == _counted(cosine, 0.95)
    assert page.locator("#what").inner_text() == "similarity above"
    slider.focus()
    for _ in range(7):
        slider.press("ArrowLeft")
    assert _threshold(page) == 0.915 and _count(page) == _counted(cosine, 0.915)
    page.select_option("#measure", "gap_ratio")
    page.select_option("#measure", "similarity")
    assert _threshold(page) == 0.915, "each measure keeps its threshold"
    assert page.locator("#count").get_attribute("aria-live") == "polite"


def test_sorting_filtering_and_paging(visit, two):
    page, score = visit(two[0]), two[1][0].evaluation.scores[0]
    ordered = np.sort(score.values)
    assert _values(page) == ordered[:36].tolist()
    page.select_option("#order", "far")
    assert _values(page) == ordered[::-1][:36].tolist()
    page.select_option("#order", "number")
    assert _numbers(page) == list(range(36))

    above = page.get_by_role("navigation", name="Pages, above")
    following = above.get_by_role("button", name="Next")
    assert above.get_by_role("button", name="Previous").is_disabled()
    following.press("Enter")
    assert _numbers(page) == list(range(36, 72)) and "37–72 of 100" in above.inner_text()
    following.press("Enter")
    assert _numbers(page) == list(range(72, 100)) and following.is_disabled()
    assert page.evaluate("document.activeElement.textContent") == "Previous", "focus is not lost with the button"

    page.get_by_label("only copies at this threshold").press("Space")
    assert _numbers(page) == list(range(30)) and "1–30 of 30" in above.inner_text()
    assert page.locator("#pairs li.copy").count() == 30
    page.locator("#threshold").press("Home")
    assert _numbers(page) == [] and "no pair" in above.inner_text()
    page.locator("#threshold").press("End")
    assert len(_numbers(page)) == 36 and "of 100" in above.inner_text()

    below = page.get_by_role("navigation", name="Pages, below")
    below.get_by_role("button", name="Next").press("Enter")
    assert page.evaluate("document.activeElement.id") == "pairs" and "37–72" in above.inner_text()


def test_the_other_run(visit, two):
    page, second = visit(two[0]), two[1][1].evaluation
    assert page.locator("#run option").all_inner_texts() == ["</script><b>edm</b>", "ambient & co"]
    page.select_option("#run", "1")
    assert _count(page) == _counted(second.scores[0], 1 / 3)
    page.select_option("#measure", "similarity")
    assert _values(page) == np.sort(second.scores[1].values)[::-1][:36].tolist()
    page.wait_for_function(_DRAWN)
    page.select_option("#run", "0")
    assert _count(page) == _counted(two[1][0].evaluation.scores[1], 0.95), "the measure stays"


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_the_pictures_are_the_pictures(visit, folder, channels, size):
    """Pixel by pixel, each sample and its training image, mirrored where it should be, over sheets."""
    report = checks.run("pixels", None, 60, samples=130, train=70, channels=channels, size=size, logs=False)
    write_report(folder / f"pixels{size}.html", [report], title="x")
    page, e = visit(folder / f"pixels{size}.html"), report.evaluation
    for measure, order in (("gap_ratio", "near"), ("similarity", "far"), ("similarity", "number")):
        page.select_option("#measure", measure)
        page.select_option("#order", order)
        page.wait_for_function(_DRAWN)
        score = next(s for s in e.scores if s.key == measure)
        shown = [
            _decoded(url) for url in page.eval_on_selector_all("#pairs canvas", "all => all.map(c => c.toDataURL())")
        ]
        numbers = _numbers(page)
        assert len(numbers) == 36 and len(shown) == 72
        for i, n in enumerate(numbers):
            train = e.train[score.index[n]]
            for got, image in zip(
                shown[2 * i : 2 * i + 2], (e.samples[n], train[..., ::-1] if score.mirrored[n] else train), strict=True
            ):
                assert np.array_equal(got, np.broadcast_to(image, (3, size, size)).transpose(1, 2, 0)), n


def test_pairs_are_named(visit, folder):
    report = checks.run("named", None, 60, samples=130, train=70, named=True)
    write_report(folder / "named.html", [report], title="x")
    page, e = visit(folder / "named.html"), report.evaluation
    for measure, order in (("gap_ratio", "near"), ("similarity", "far")):
        page.select_option("#measure", measure)
        page.select_option("#order", order)
        page.locator("[data-go='1']").first.click()
        score = next(s for s in e.scores if s.key == measure)
        owns, names = (page.locator(f"#pairs .names div:{at}-child").all_inner_texts() for at in ("first", "last"))
        labels = page.eval_on_selector_all("#pairs [role=img]", "all => all.map(e => e.getAttribute('aria-label'))")
        assert len(names) == 36
        for n, own, name, label in zip(_numbers(page), owns, names, labels, strict=True):
            assert own == f"seed {n}" and name == e.train_names[score.index[n]]
            assert label.startswith(f"Sample {n}, seed {n}, beside training image {score.index[n]}, {name}")
    assert "cats & dogs/</script>" in page.locator(".copied li").first.inner_text()
    _keep(page, "report-named")


def test_what_a_screen_reader_finds(visit, two):
    page, e = visit(two[0]), two[1][0].evaluation
    tree = page.locator("body").aria_snapshot()
    for name in (
        'heading "<b>two</b> & more" [level=1]', 'heading "Gallery" [level=2]', "main", 'region "Figures"', 'region "Table of figures"',
        'slider "Threshold: gap ratio below 0.333"', 'combobox "Order"', 'combobox "Measure"', 'checkbox "only copies at this threshold"',
        'list "Pairs of a sample and its nearest training image"', 'navigation "Pages, above"', "status:",
    ):  # fmt: skip
        assert name in tree, name
    score = e.scores[0]
    n = int(np.argmin(score.values))
    flipped = " (mirrored)" if score.mirrored[n] else ""
    assert (
        f'img "Sample {n} beside training image {score.index[n]}{flipped}, gap ratio {score.values[n]:.3f}, copy"'
        in tree
    )
    assert page.locator("b").count() == 0, "names are text"
    levels = page.eval_on_selector_all("h1,h2,h3,h4", "all => all.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_and_all_pictures_have_names(visit, two, scheme):
    page = visit(two[0], color_scheme=scheme)
    seen, faint = page.evaluate(_FAINT)
    assert seen > 300 and faint == []
    assert page.evaluate(_NAMELESS) == []
    page.evaluate("document.documentElement.style.setProperty('--soft', '#777777')")
    page.evaluate("document.querySelector('.copied img').alt = ''")
    assert len(page.evaluate(_FAINT)[1]) > 50 and len(page.evaluate(_NAMELESS)) == 1, "it would be seen"


def test_all_of_it_can_be_reached_by_tab(visit, two):
    page, reached = visit(two[0]), []
    for _ in range(15):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        if len(reached) == 6:
            look = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert look not in ("none", ""), "focus is seen"
    wanted = ["Skip to the gallery", "run", "measure", "order", "only", "threshold", "Next"]
    assert [r for r in reached if r in wanted][:7] == wanted


@pytest.mark.parametrize("width", [1280, 390])
def test_wide_and_narrow_light_and_dark(visit, two, width):
    page = visit(two[0], width=width, reduced_motion="reduce")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.select_option("#measure", "similarity")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    side = page.evaluate("document.querySelector('#pairs canvas').getBoundingClientRect().width")
    assert side % 8 == 0 and 56 <= side <= 96, "every pixel of a picture is of one size"
    page.select_option("#measure", "gap_ratio")
    for scheme, expected in (("light", [True, False]), ("dark", [False, True])):
        page.emulate_media(color_scheme=scheme)
        colours = page.evaluate("['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k])")
        assert [sum(map(int, c[4:-1].split(","))) > 384 for c in colours] == expected
        _keep(page, f"report-{width}-{scheme}")


def test_without_held_out_images_and_logs(visit, folder):
    report = checks.run("elsewhere", None, 12, holdout=0, similarity=False, logs=False)
    write_report(folder / "none.html", [report], title="x")
    page = visit(folder / "none.html", width=390)
    assert (
        _count(page)
        == "12 of 100 samples (12.0 %) are copies at this threshold; there are no held-out images to compare with."
    )
    assert not page.locator("#measure").is_visible() and not page.locator("#run").is_visible()
    assert "the control is missing" in page.locator(".lead").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    _keep(page, "report-without-control")


def test_without_javascript_the_figures_are_there(browser, two):
    page = browser.new_page(java_script_enabled=False)
    page.goto(two[0].as_uri())
    assert page.get_by_text("The gallery needs JavaScript").is_visible() and not page.locator("#threshold").is_visible()
    assert page.get_by_text("30.0 % of samples are copies of a training image").is_visible()
    page.close()


@pytest.mark.slow
def test_ten_thousand_pairs_stay_fluid(visit, folder):
    report = checks.run("many", 0.4, 1200, samples=10_000, train=9_000, holdout=500, channels=3, size=32, logs=False)
    path, began = folder / "many.html", time.monotonic()
    write_report(path, [report], title="10,000 pairs of 32 pixels")
    written, began = time.monotonic() - began, time.monotonic()
    page, score = visit(path), report.evaluation.scores[0]
    assert _count(page) == _counted(score, 1 / 3)
    loaded = time.monotonic() - began
    page.wait_for_function(_DRAWN)
    first = time.monotonic() - began
    moves = [page.evaluate(_MOVE) for _ in range(30)]
    sorts = [page.evaluate(_SORT, name) for name in ("far", "number", "near") * 3]
    page.select_option("#order", "number")
    began = time.monotonic()
    page.wait_for_function(_DRAWN)
    drawn = time.monotonic() - began
    page.get_by_label("only copies at this threshold").check()
    filtered = [page.evaluate(_MOVE) for _ in range(30)]
    print(
        f"\n10,000 pairs: {path.stat().st_size / 2**20:.1f} MB, written in {written:.1f} s, counted {loaded:.2f} s and drawn"
        f" {first:.2f} s after opening; medians: slider {statistics.median(moves):.1f} ms, filtered"
        f" {statistics.median(filtered):.1f} ms, sort {statistics.median(sorts):.1f} ms; another page drawn in {drawn:.2f} s"
    )
    assert page.locator("#pairs li").count() == 36, "a page of cards, not all of them"
    assert statistics.median(moves) < 100 and statistics.median(filtered) < 100 and statistics.median(sorts) < 300
    assert first < 15 and drawn < 10
    assert _count(page) == _counted(score, _threshold(page))
    _keep(page, "report-10000", full=False)
