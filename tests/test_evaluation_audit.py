"""audit: planted memorization is found in its known shares, whatever the pictures come in; bad input is one line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from planted import KINDS, generate, photographs, textures

from fastambient import cli
from fastambient.data.preparation import prepare
from fastambient.data.sources import open_source
from fastambient.data.store import Store
from fastambient.errors import InputError
from fastambient.evaluation import evaluate
from fastambient.evaluation.audit import audit
from fastambient.evaluation.embedders import load_embedder
from fastambient.evaluation.features import default_cache
from fastambient.evaluation.frechet import frechet_distance
from fastambient.evaluation.table import print_found, sentence
from fastambient.pictures import grid, save_png

EACH = 20


def _hits(score) -> np.ndarray:
    return score.values < score.threshold if score.closer == "low" else score.values > score.threshold


def _control_hits(score) -> np.ndarray:
    return score.control < score.threshold if score.closer == "low" else score.control > score.threshold


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, slice]]:
    train, holdout = textures(200, 1, size=16), textures(200, 2, size=16)
    samples, rows = generate(train, textures(EACH, 3, size=16), EACH)
    return samples, train, holdout, rows


@pytest.mark.parametrize("flips", [False, True])
def test_each_metric_finds_what_was_planted_and_nothing_else(sets, flips):
    samples, train, holdout, rows = sets
    found = evaluate(samples, train, holdout, embedder=load_embedder("pixel"), flips=flips, settings={})
    always = {"exact", "noise 0.01", "noise 0.05"} | ({"flip"} if flips else set())
    for score in found.scores:
        hits = _hits(score)
        for kind in KINDS:
            share = hits[rows[kind]].mean()
            if kind != "shift":  # one pixel of 16: near enough in smooth pictures alone, which are counted by hand
                assert share == (kind in always), (score.key, kind)
            if kind in always:
                own = np.arange(rows[kind].start, rows[kind].stop)
                assert np.array_equal(score.index[rows[kind]], own), (score.key, kind)
                assert score.mirrored[rows[kind]].all() == (kind == "flip")
        assert not _control_hits(score).any(), "held-out images were not copied"
    gap, alike = found.metrics["memorization"]["gap_ratio"], found.metrics["similarity"]
    shifted = _by_hand(samples[rows["shift"]], train, flips)
    assert gap["copies"] == len(always) * EACH + shifted[0] and gap["holdout_rate"] == 0
    assert alike["above_0.95"] == (len(always) * EACH + shifted[1]) / len(samples) == alike["excess_0.95"]
    assert gap["ci95"][0] < gap["rate"] < gap["ci95"][1]
    per_image = found.metrics["copies_per_train_image"]
    assert per_image["images_copied"] == gap["copies"] and per_image["histogram"] == {"1": gap["copies"]}
    # Blends copy two images at once, and neither more than the other.
    assert (found.scores[0].values[rows["blend"]] > 0.9).all()
    assert found.metrics["fld"]["gap"] > 10 * abs(_clean_fld(train, holdout))
    vectors = [x.reshape(len(x), -1) / 127.5 - 1 for x in (samples, train, train[..., ::-1])]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors]
    nearest = np.abs(unit[0] @ np.concatenate(unit[1 : 2 + flips]).T).max(1)
    assert found.metrics["mifid"]["distance"] == pytest.approx(1 - nearest.mean(), abs=1e-6)
    assert found.metrics["mifid"]["control"]["holdout_distance"] > found.metrics["mifid"]["distance"]


def _by_hand(samples: np.ndarray, train: np.ndarray, flips: bool) -> tuple[int, int]:
    """Copies by gap ratio and by cosine, from all distances at once."""
    ratio, cosine = [], []
    for sample in samples.astype(np.float64):
        sides = [train.astype(np.float64)] + [train[..., ::-1].astype(np.float64)] * flips
        far = np.min([np.sqrt(((side - sample) ** 2).sum((1, 2, 3))) for side in sides], 0)
        ratio.append(np.sort(far)[0] / np.sort(far)[1])
        a = sample.ravel() / 127.5 - 1
        b = np.concatenate([side.reshape(len(side), -1) / 127.5 - 1 for side in sides])
        cosine.append((b @ a / np.linalg.norm(b, axis=1) / np.linalg.norm(a)).max())
    return sum(r < 1 / 3 for r in ratio), sum(c > 0.95 for c in cosine)


@pytest.mark.parametrize("network", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quality_where_the_answer_is_known(sets, network):
    """A generator of the training images has their own distances and copies all; one of the held-out images is perfect
    and copies nothing."""
    train, holdout = (x[:60] for x in sets[1:3])
    options = {"embedder": load_embedder("efficientnet-lite0" if network else "pixel"), "settings": {}}
    copies, perfect = (evaluate(x, train, holdout, **options).metrics for x in (train, holdout))
    space = copies["similarity"]["embedder"]
    own = copies["frechet"][space]
    assert own["value"] == pytest.approx(own["train_vs_reference"], rel=1e-9) and own["value"] > 0.1
    assert own["equal_counts"]["value"] == own["equal_counts"]["train_vs_reference"] == own["train_vs_reference"]
    assert copies["memorization"]["gap_ratio"]["rate"] == 1 == copies["similarity"]["above_0.95"]
    assert copies["copies_per_train_image"]["images_copied"] == 60 and copies["fld"]["at_bound"] == 1
    assert copies["mifid"]["value"] == pytest.approx(own["value"] / 1e-6, rel=0.3)
    assert copies["fld"]["gap"] > 30 + copies["fld"]["control"]["holdout_gap"]
    q = perfect["quality"][0]
    assert q["fd"] == pytest.approx(0, abs=1e-6 * own["value"]) and q["kid"] < 1e-6
    assert q["precision"] == q["recall"] == q["coverage"] == 1 and q["density"] >= 1
    assert perfect["memorization"]["gap_ratio"]["rate"] == 0 == perfect["fld"]["at_bound"]
    assert (
        perfect["memorization"]["gap_ratio"]["holdout_rate"] == 1 and perfect["similarity"]["holdout_above_0.95"] == 1
    )
    assert perfect["mifid"]["value"] < 1e-6 * copies["mifid"]["value"]
    assert perfect["mifid"]["control"]["holdout_distance"] < 1e-6 < 0.01 < perfect["mifid"]["distance"]
    assert network or perfect["fld"]["gap"] < -30, "in 1,280 dimensions 60 images tell no likelihoods apart"


def _clean_fld(train: np.ndarray, holdout: np.ndarray) -> float:
    fresh = textures(140, 4, size=16)
    found = evaluate(fresh, train, holdout, embedder=load_embedder("pixel"), settings={}).metrics
    assert found["memorization"]["gap_ratio"]["rate"] == 0 and found["similarity"]["excess_0.95"] == 0
    return found["fld"]["gap"]


@pytest.mark.slow
def test_planted_copies_of_photographs_in_a_networks_features():
    images, each = photographs(), 5
    train, holdout = images[:45], images[45:90]
    samples, rows = generate(train, images[90:], each)
    found = evaluate(samples, train, holdout, embedder=load_embedder(), cache=default_cache(), settings={})
    gap, alike = (_hits(score) for score in found.scores)
    for kind in ("exact", "noise 0.01", "noise 0.05"):
        assert gap[rows[kind]].all(), kind
    for kind in ("blend", "flip", "fresh"):
        assert not gap[rows[kind]].any(), kind
    assert alike[rows["exact"]].all() and not alike[rows["fresh"]].any()
    values = found.scores[1].values
    median = {kind: np.median(values[rows[kind]]) for kind in KINDS}
    # A network sees a flip or a shift as the same picture sooner than pixels do, and noise as another one.
    assert median["noise 0.01"] > median["noise 0.05"] > median["fresh"]
    assert min(median["flip"], median["shift"]) > median["fresh"]
    control = [_control_hits(score).mean() for score in found.scores]
    assert control[0] == 0 and control[1] < 0.1, "tiles of one photograph can be alike, but none is a copy of another"
    assert found.metrics["similarity"]["excess_0.95"] >= each / len(samples)
    q = found.metrics["quality"][0]
    assert any("fewer samples and reference images than dimensions" in name for name in q["figures"])


def _folder(path: Path, images: np.ndarray, suffix: str = ".png", **options) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(picture)).save(path / f"{i:04d}{suffix}", **options)
    return path


def _run(*arguments, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """30 of 100 samples are copies."""
    monkeypatch.chdir(tmp_path)
    train, holdout, samples = (textures(n, seed, size=16) for n, seed in ((60, 1), (60, 2), (100, 3)))
    samples[:30] = np.clip(train[:30].astype(int) + 1, 0, 255)
    for name, images in (("train", train), ("holdout", holdout), ("samples", samples)):
        _folder(Path(name), images)
    return train, holdout, samples


def test_the_command_finds_planted_copies_end_to_end(folders, capsys):
    options = ("--samples", "samples", "--train", "train", "--features", "pixel")
    code, out, _ = _run("audit", *options, "--holdout", "holdout", "--cache", "none", capsys=capsys)
    assert code == 0 and "copy rate" in out and "30.0 %" in out
    assert out.splitlines()[-2].startswith("30.0 % of samples are copies of a training image (95 % interval ")
    assert out.splitlines()[-2].endswith("of held-out images 0.0 %.")
    assert (
        "copied: 30 training images, each once, among them 0000.png, 0001.png, 0002.png; all of them are in the list of pairs\n"
        in out
    )
    metrics = json.loads(Path("audit.json").read_text())
    assert metrics["memorization"]["gap_ratio"]["rate"] == 0.3 == metrics["similarity"]["above_0.95"]
    assert metrics["similarity"]["holdout_above_0.95"] == 0
    assert metrics["settings"]["samples"] == "samples" and metrics["settings"]["train"] == "train"
    assert "30.0" in Path("audit-report.html").read_text(encoding="utf-8")
    code, out, _ = _run("audit", *options, "--out", "b.json", "--num", 40, capsys=capsys)
    assert code == 0 and "no held-out set" in out and "control is missing" in out.splitlines()[-2]
    bare = json.loads(Path("b.json").read_text())
    assert bare["counts"]["samples"] == 40 and bare["memorization"]["gap_ratio"]["holdout_rate"] is None
    assert 4 < bare["memorization"]["gap_ratio"]["copies"] < 24, "by chance, not the first 40"
    assert Path("b-report.html").is_file() and len(list(Path.cwd().glob("*.json"))) == 2


def test_pictures_come_in_any_form_and_a_store_brings_its_control(folders, tmp_path):
    train, holdout, samples = folders
    expected = audit("samples", "train", holdout="holdout", features="none").metrics
    np.save("samples.npy", samples)
    np.savez("samples.npz", images=samples)
    shutil.make_archive("zipped", "zip", "samples")
    save_png(Path("samples") / "grid.png", grid(samples[:9]))  # as `fastambient sample` leaves it
    _folder(Path("webp"), samples, ".webp", lossless=True)
    for form in ("samples.npy", "samples.npz", "zipped.zip", "samples", "webp"):
        found = audit(form, "train", holdout="holdout", features="none", out=Path("x.json")).metrics
        assert {**found, "settings": 0} == {**expected, "settings": 0}, form
    _folder(Path("all"), np.concatenate([train, holdout]))
    store = prepare(open_source("all"), "store", train=60, holdout=60, noise_seed=1)
    found = audit("samples", "store", features="none", out=Path("x.json")).metrics
    assert found["counts"]["holdout"] == 60 and found["memorization"]["gap_ratio"]["holdout_rate"] is not None
    there = [image.tobytes() for image in store.train.images[:]]
    assert found["memorization"]["gap_ratio"]["copies"] == sum(image.tobytes() in there for image in train[:30])
    prepare(open_source("holdout"), "kept", train=35, holdout=25, noise_seed=1)
    other = audit("samples", "train", holdout="kept", features="none", out=Path("x.json"))
    assert len(other.report.evaluation.holdout) == 25, "the images that the store holds back"


@pytest.mark.parametrize("kept", ["folder", "store"])
def test_a_copy_is_named_by_its_file(folders, tmp_path, capsys, kept):
    """In metrics.json, on the page, in nearest.csv and on the console; formulas and control codes are defused."""
    train, holdout, samples = folders
    Path("train/0007.png").rename("train/=HYPERLINK(7).png")
    Path("train/0011.png").rename("train/\x1b[31mred.png")
    Path("samples/0031.png").write_bytes(Path("samples/0007.png").read_bytes())  # twice: the most copied
    if kept == "store":
        prepare(open_source("train"), "store", train=60, holdout=0, noise_seed=1)
    options = ("--samples", "samples", "--train", "train" if kept == "folder" else "store", "--holdout", "holdout")
    code, out, _ = _run("audit", *options, "--features", "pixel", "--cache", "none", capsys=capsys)
    assert code == 0 and "\x1b" not in out
    assert "copied: 30 training images, most often =HYPERLINK(7).png (2 times), " in out
    assert out.splitlines()[-1] == "written: audit-report.html, audit.json, audit-nearest.csv"
    top = json.loads(Path("audit.json").read_text())["copies_per_train_image"]["top"]
    assert top[0]["name"] == "=HYPERLINK(7).png" and top[0]["copies"] == 2 and len(top) == 10
    with open("audit-nearest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100 and [row["gap_ratio_copy"] for row in rows] == ["1"] * 31 + ["0"] * 69
    ratios = [float(row["gap_ratio"]) for row in rows]
    assert ratios == sorted(ratios) and {"similarity", "similarity_train_name"} <= rows[0].keys()
    stored = None if kept == "folder" else list(Store.open("store").train.names)
    for row in rows[:31]:
        of = 7 if row["sample"] == "31" else int(row["sample"])
        name = {7: "./=HYPERLINK(7).png", 11: "\x1b[31mred.png"}.get(of, f"{of:04d}.png")
        assert (row["sample_name"], row["gap_ratio_train_name"]) == (f"{int(row['sample']):04d}.png", name)
        if stored is not None:
            assert f"./{stored[int(row['gap_ratio_train_index'])]}".endswith(name.removeprefix("."))
        assert row["gap_ratio_mirrored"] == "0" and row["similarity_copy"] == "1"
    page = Path("audit-report.html").read_text(encoding="utf-8")
    assert "=HYPERLINK(7).png" in page and "?[31mred.png" in page and "\x1b" not in page and "\\u001b" not in page


def test_features_that_tell_no_images_apart_leave_the_rest(sets, tmp_path):
    """A module that gives the same for all pictures: FLD is left out with a note, everything else is measured."""
    samples, train, holdout, _ = sets

    class Same(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(x), 4)

    torch.jit.save(torch.jit.script(Same()), str(tmp_path / "inception.pt"))
    embedder = load_embedder(str(tmp_path / "inception.pt"))
    found = evaluate(samples, train, holdout, embedder=embedder, settings={}).metrics
    assert found["fld"] is None and "FLD (inception.pt) could not be measured" in found["notes"][0]
    assert found["memorization"]["gap_ratio"]["copies"] >= 3 * EACH and found["frechet"]["inception.pt"]["value"] == 0
    assert next(iter(found["quality"][0]["figures"])) == "FD-140 vs held-out", "its name makes no FID of it"


def test_a_cache_changes_nothing_that_is_written(folders, tmp_path):
    options = {"train": "train", "holdout": "holdout", "features": "pixel", "cache": tmp_path / "cache"}
    first, again = (audit("samples", **options, out=tmp_path / "m.json").metrics for _ in range(2))
    assert list((tmp_path / "cache").iterdir()) and first == again and first["similarity"]["dimensions"] == 768


def test_mirrored_copies_are_looked_for(folders):
    train, holdout, samples = folders
    _folder(Path("mirrored"), np.ascontiguousarray(np.concatenate([samples[30:], train[:30, ..., ::-1]])))
    usual = {"train": "train", "holdout": "holdout", "features": "pixel", "out": Path("m.json")}
    found, blind = audit("mirrored", **usual).metrics, audit("mirrored", **usual, flips=False).metrics
    assert found["memorization"]["gap_ratio"]["copies"] == 30 and blind["memorization"]["gap_ratio"]["copies"] == 0
    assert found["fld"]["gap"] > 50 + blind["fld"]["gap"] and found["mifid"]["distance"] < blind["mifid"]["distance"]


def test_anothers_samples_beside_a_config_are_audited(folders):
    shutil.copytree("samples", "theirs/samples")
    Path("theirs/config.yaml").write_text("")
    shutil.copy("samples/0000.png", "theirs/samples/grid-1.png")
    assert audit("theirs/samples", "train", features="none").metrics["counts"]["samples"] == 101


@pytest.mark.parametrize("counts", [(140, 60), (40, 60)])
def test_distances_stand_at_equal_counts(sets, counts):
    """As many samples as training images, chosen by the seed, each against all held-out images."""
    (samples, train, holdout, _), (n, m) = sets, counts
    x, y, z = (a.reshape(len(a), -1) / 127.5 - 1.0 for a in (samples[:n], train[:m], holdout))
    found = evaluate(samples[:n], train[:m], holdout, seed=4, settings={}).metrics["frechet"]["pixel"]
    k = min(n, m)
    some = np.sort(np.random.default_rng(4).choice(max(n, m), k, replace=False))
    assert found["equal_counts"]["images"] == k and found["value"] == pytest.approx(frechet_distance(x, z))
    assert found["equal_counts"]["value"] == pytest.approx(frechet_distance(x[some] if n > m else x, z))
    own = frechet_distance(y[some] if m > n else y, z)
    assert found["equal_counts"]["train_vs_reference"] == pytest.approx(own)
    assert found["train_vs_reference"] == pytest.approx(frechet_distance(y, z))


def test_few_held_out_images_are_said_to_be_few(sets):
    samples, train, holdout, _ = sets
    few, enough = (evaluate(samples, train, holdout[:n], settings={}).metrics["notes"] for n in (29, 30))
    assert few[0].startswith("The control searches 29 held-out images only") and not enough
    assert few[0].endswith("; hold back 30 or more.")
    (few,) = evaluate(samples, train[:20], holdout[:30], settings={}).metrics["notes"]
    assert "searches 20 held-out images only" in few and few.endswith("; no more than train; 30 or more would do.")


def test_sets_that_are_interchanged_are_said_to_look_so(sets):
    samples, train, holdout, _ = sets
    told, back = (
        evaluate(samples, *pair, settings={}).metrics["notes"] for pair in ((train, holdout), (holdout, train))
    )
    assert not told and len(back) == 1 and back[0].startswith("More samples are copies of held-out images than of")


def test_a_path_that_is_no_text_is_shown_all_the_same(folders):
    name = b"sam\xffples".decode(errors="surrogateescape")
    Path("samples").rename(name)
    found = audit(name, "train", holdout="holdout", features="none")
    assert "sam?ples" in found.page.read_text(encoding="utf-8") and found.file.is_file()


def test_exact_copies_are_named_together(sets):
    """A search finds the first of them; whoever looks for the other one finds it as well."""
    samples, train, *_ = sets
    train = np.concatenate([train[:6], train[2:3], train[4:5, ..., ::-1], train[2:3]])
    names = [f"{i}.png" for i in range(len(train))]
    told = {
        False: {2: "2.png (also 6.png, 8.png)", 4: "4.png"},
        True: {2: "2.png (also 6.png, 8.png)", 4: "4.png (also 7.png)"},
    }
    for flips, expected in told.items():
        found = evaluate(train[[2, 4]], train, flips=flips, train_names=names, settings={})
        assert [found.train_names[i] for i in found.scores[0].index] == list(expected.values())
        assert {row["train_index"]: row["name"] for row in found.metrics["copies_per_train_image"]["top"]} == expected
        assert found.train_names[5:7] == ["5.png", "6.png (also 2.png, 8.png)"] and len(found.train_names) == 9


def test_names_are_one_a_picture(sets):
    samples, train, *_ = sets
    for names in ({"sample_names": ["a"]}, {"train_names": ["a"]}):
        with pytest.raises(InputError, match=r"1 (sample|training image) names for [\d,]+ pictures, expected one a"):
            evaluate(samples, train, settings={}, **names)


def test_grey_and_colour_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, samples = textures(30, 1, size=8, channels=1), textures(20, 2, size=8, channels=1)
    samples[:5] = train[:5]
    _folder(Path("train"), train)
    _folder(Path("rgb"), samples.repeat(3, axis=1))
    plain = audit("rgb", "train", features="none")
    assert plain.report.evaluation.samples.shape[1] == 1, "grey pictures that were stored in colour"
    assert plain.metrics["memorization"]["gap_ratio"]["copies"] == 5
    colour = textures(20, 3, size=8)
    _folder(Path("colour"), colour)
    assert audit("colour", "train", features="none").report.evaluation.train.shape[1] == 3
    assert "warning: --train: grey pictures are compared with colour ones" in capsys.readouterr().err


def _break(what: str, folders) -> list[str]:
    """Arguments of an audit that cannot be done."""
    train, *_ = folders
    usual = ["--train", "train", "--features", "none"]
    if what == "empty folder":
        Path("empty").mkdir()
        return ["--samples", "empty", *usual]
    if what == "corrupt":
        (Path("samples") / "0007.png").write_bytes((Path("samples") / "0007.png").read_bytes()[:150])
    if what == "mixed sizes":
        Image.new("RGB", (17, 17)).save(Path("samples") / "0050.png")
    if what == "other size":
        _folder(Path("large"), textures(5, 1, size=20))
        return ["--samples", "large", *usual]
    if what == "other size than the store":
        prepare(open_source("train"), "store", train=50, holdout=10, noise_seed=1)
        _folder(Path("small"), textures(5, 1, size=8))
        return ["--samples", "small", "--train", "store", "--features", "none"]
    if what == "held-out trained":
        save_png(Path("holdout") / "x.png", train[3])
        return ["--samples", "samples", *usual, "--holdout", "holdout"]
    if what == "held-out flipped":
        save_png(Path("holdout") / "x.png", train[3][..., ::-1])
        return ["--samples", "samples", *usual, "--holdout", "holdout", "--flips"]
    if what == "one sample":
        _folder(Path("one"), train[:1])
        return ["--samples", "one", *usual]
    if what == "overviews":
        Path("run/samples").mkdir(parents=True)
        save_png(Path("run/samples/grid-000000001600.png"), grid(train[:9]))
        Path("run/config.yaml").write_text("")
        return ["--samples", "run/samples", *usual]
    if what == "run":
        Path("run").mkdir()
        save_png(Path("run/nearest.png"), grid(train[:9]))
        Path("run/config.yaml").write_text("")
        Path("run/noise_seed").write_text("")
        return ["--samples", "samples", "--train", "run", "--features", "none"]
    if what == "onto itself":
        np.savez("samples.npz", images=train[:9])
        return ["--samples", "samples.npz", *usual, "--out", "samples.npz"]
    if what == "onto another":
        Path("notes.json").write_text('["mine"]')
        return ["--samples", "samples", *usual, "--out", "notes.json"]
    if what == "store resolution":
        prepare(open_source("train"), "store", train=50, holdout=10, noise_seed=1)
        return ["--samples", "samples", "--train", "store", "--features", "none", "--resolution", "8"]
    return ["--samples", "samples", *usual, *(what.split() if what.startswith("--") else [])]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty folder", "empty"),
        ("corrupt", "0007.png cannot be read"),
        ("mixed sizes", "0050.png is 17 x 17 pixels"),
        ("other size", "--samples large has pictures of 20x20, --train train of 16x16; pass --resolution 16 to"),
        (
            "other size than the store",
            "--samples small has pictures of 8x8, --train store of 16x16; pass --resolution 16 to",
        ),
        (
            "held-out trained",
            "are or mirror training images, expected none: a control must not have trained; leave these out of one side\n",
        ),
        (
            "held-out flipped",
            "1 held-out images are the mirror images of training images, expected none: a control must not have trained; leave"
            " these out of one side, or audit with --no-flips",
        ),
        ("one sample", "1 samples, expected at least 2"),
        (
            "run",
            "run is a run folder, its pictures are drawings of the run: name the images that it trained on (run/store",
        ),
        ("onto itself", "--out samples.npz is what is to be read, and would be replaced"),
        ("onto another", "--out notes.json exists and is no metrics of an earlier evaluation"),
        ("--out /proc/x.json", "--out /proc/x.json cannot be written"),
        ("overviews", "run/samples holds the overviews that a run drew of itself"),
        ("store resolution", "--resolution 8, but the store store holds images of 16 pixels"),
        ("--holdout nowhere", "'nowhere'"),
        ("--num 1", "--num must be 2 or more"),
        ("--num 101", "--num 101: samples holds 100 pictures"),
        ("--out samples", "--out samples is a folder"),
        ("--out none/x.json", "there is no folder none"),
        ("--features nothing", "no embedder 'nothing'"),
        ("--weights w.pt", "--weights w.pt with --features none"),
        ("--preprocess paper", "--preprocess paper with --features none"),
        ("--features pixel --preprocess paper", "--preprocess paper is DINOv2's"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folders, capsys, what, message):
    code, out, err = _run("audit", *_break(what, folders), capsys=capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err and not out
    assert not list(Path.cwd().glob("*audit*"))


def test_other_sizes_meet_at_a_resolution_and_broken_pictures_may_be_skipped(folders, capsys):
    train, *_ = folders
    Path("samples/0007.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"0007\.png"):
        audit("samples", "train", features="none")
    found = audit("samples", "train", features="none", resolution=8, on_bad_image="skip")
    assert found.metrics["counts"]["samples"] == 99 and found.metrics["settings"]["resolution"] == 8
    assert found.metrics["memorization"]["gap_ratio"]["copies"] == 29
    assert sentence(found.metrics).startswith("29.3 % of samples are copies")


def test_samples_that_look_like_nothing_are_said_to_be_no_evidence(folders, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (100, 1, 16, 16), np.uint8)
    np.savez("noise.npz", images=noise)
    found = audit("noise.npz", "train", holdout="holdout", features="pixel", resolution=16)
    (q,) = found.metrics["quality"]
    assert q["precision"] == q["coverage"] == found.metrics["memorization"]["gap_ratio"]["rate"] == 0
    print_found(found)
    *_, told, last = capsys.readouterr().out.splitlines()
    assert told.startswith("0.0 % of samples are copies")
    assert told.endswith(
        "Precision is 0.00 and coverage is 0.00 (pixels): hardly a sample looks like a real image, so a low copy rate"
        " says nothing here."
    )
    assert (
        last == "written: audit-report.html, audit.json, audit-nearest.csv"
        and found.page.is_file()
        and found.file.is_file()
    )
    assert "so a low copy rate says nothing here." in found.page.read_text()
