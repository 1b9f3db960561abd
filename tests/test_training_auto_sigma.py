"""``--sigma-tn auto``: the level that is read off a gap curve, and what a run keeps of it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import TINY

from fastambient.data.preparation import prepare
from fastambient.data.sources import open_source
from fastambient.errors import InputError
from fastambient.training import auto_sigma, start
from fastambient.training.auto_sigma import LEAST, choose_sigma_tn, sigma_of_gap
from fastambient.training.request import TrainRequest, describe
from fastambient.training.run import RunFolder
from fastambient.training.start import new
from fastambient.training.stopping import Interrupted


def bump(at: float, height: float, *, width: float = 1.0, floor: float = 1.0) -> list[dict]:
    """A gap whose logarithm is a parabola about `at` where it is above `floor`."""
    levels = np.geomspace(0.02, 10, 14)
    gap = [max(floor, height * math.exp(-((math.log(s / at) / width) ** 2))) for s in levels]
    return [{"sigma": float(s), "train": 1.0, "holdout": g, "gap": g} for s, g in zip(levels, gap, strict=True)]


@pytest.mark.parametrize("at", [0.05, 0.19, 0.2, 0.77, 3.0])
def test_the_peak_is_found_between_the_levels(at):
    assert sigma_of_gap(bump(at, 5.0, width=2.0)) == pytest.approx(at, rel=0.01)
    assert sigma_of_gap(list(reversed(bump(at, 5.0, width=2.0)))) == pytest.approx(at, rel=0.01)


def test_a_measured_curve():
    """EDM on 100 digits after 16 and after 64 kimg: about the same level, at very different heights."""
    levels = [0.020, 0.032, 0.052, 0.084, 0.135, 0.218, 0.352, 0.568, 0.916, 1.478, 2.383, 3.844, 6.200, 10.0]
    gaps = {
        16: [1.107, 1.159, 1.225, 1.292, 1.349, 1.380, 1.375, 1.319, 1.209, 1.073, 1.007, 0.986, 0.978, 0.975],
        64: [3.424, 4.961, 7.455, 10.828, 13.524, 13.341, 10.115, 5.058, 1.941, 1.190, 1.032, 0.999, 0.988, 0.985],
    }
    found = {k: sigma_of_gap([{"sigma": s, "gap": g} for s, g in zip(levels, v, strict=True)]) for k, v in gaps.items()}
    assert 0.2 < found[16] < 0.3 and 0.13 < found[64] < 0.2


def test_no_gap_no_choice_and_odd_curves():
    assert sigma_of_gap(bump(0.2, LEAST - 0.01)) is None and sigma_of_gap([]) is None
    assert sigma_of_gap([{"sigma": 1.0, "gap": None}]) is None
    falling = [{"sigma": s, "gap": g} for s, g in ((0.1, 3.0), (0.2, 2.0), (0.4, 1.0))]
    assert sigma_of_gap(falling) == 0.1, "a peak at the lowest level is that level"
    assert sigma_of_gap([*falling, {"sigma": 0.3, "gap": None}]) == 0.1


def request(tmp_path, *assignments, **options):
    small = [*TINY, "training.batch=8", "training.kimg=0.08", "training.sample_kimg=0", *assignments]
    return TrainRequest(assignments=small, auto_sigma_tn=True, noise_seed=3, **options)


@pytest.mark.parametrize("memorizes", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_choice_is_the_runs_setting_and_a_resume_does_not_repeat_it(tmp_path, monkeypatch, capsys, memorizes):
    asked, classes, labelled = [], [], not memorizes

    def gap(denoiser, train, holdout, **how):
        asked.append((denoiser.metadata, len(train), len(holdout)))
        classes.append([len(how[name]) for name in ("train_classes", "holdout_classes") if name in how])
        return bump(0.31, 3.0 if memorizes else 1.05, width=2.0)

    monkeypatch.setattr("fastambient.evaluation.denoising_gap.denoising_gap", gap)
    new(request(tmp_path, "data.noisy=float16", f"data.use_labels={str(labelled).lower()}"), tmp_path / "run")
    assert classes == ([[100, 1697]] if labelled else [[]]), "a model of classes is asked with them"
    err = capsys.readouterr().err
    ((metadata, train, holdout),) = asked
    assert metadata["noise"]["sigma_tn"] == 0 and metadata["nimg"] == 24 and (train, holdout) == (100, 1697)
    settings = RunFolder(tmp_path / "run").read_settings()
    told = json.loads((tmp_path / "run" / "sigma_tn.json").read_text())
    assert told["sigma_tn"] == settings.noise.sigma_tn and len(told["denoising_gap"]) == 14
    assert told["pilot_kimg"] == 0.02 and settings.training.kimg == 0.08
    if memorizes:
        assert settings.noise.sigma_tn == pytest.approx(0.31, abs=0.005) and "where the gap is largest (2." in err
    else:
        assert settings.noise.sigma_tn == 0.1875 and "the pilot memorizes nothing yet; taking 1.5*R/64" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"], "the pilot is gone"
    start.start(tmp_path / "run", resume=True)
    assert len(asked) == 1


def test_a_stopped_pilot_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise Interrupted(2, "stopped by SIGINT at 0.01 kimg, checkpoint written; resume with: x")

    monkeypatch.setattr(start, "start", stopped)
    with pytest.raises(
        Interrupted, match=r"^stopped by SIGINT while sigma_tn was being chosen; start it anew"
    ) as found:
        new(request(tmp_path), tmp_path / "run")
    assert found.value.exit_code == 130 and not list(tmp_path.iterdir())


def test_what_auto_cannot_choose_for_is_refused(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8))
    source = open_source(str(tmp_path / "x.npy"))
    noisy = prepare(source, tmp_path / "noisy", noisy="float16", sigma_tn=0.2, noise_seed=1)
    none = prepare(source, tmp_path / "none", holdout=0, noise_seed=1)
    before = sorted(p.name for p in tmp_path.iterdir())
    cases = [
        (request(tmp_path, "noise.sigma_tn=0.1"), "--set noise.sigma_tn exclude each other"),
        (request(tmp_path, data=str(noisy.path)), "--sigma-tn"),
        (
            request(tmp_path, data=str(none.path)),
            "--sigma-tn auto with no held-out images.* without them there is no gap between",
        ),
    ]
    for asked, message in cases:
        with pytest.raises(InputError, match=message):
            choose_sigma_tn(asked, tmp_path / "run")
    with pytest.raises(InputError, match="--dry-run trains nothing"):
        describe(request(tmp_path))
    monkeypatch.setattr(start, "inside_launcher", lambda: True)
    with pytest.raises(InputError, match="a launcher's ranks do not"):
        new(request(tmp_path), tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert auto_sigma.SHARE == 0.25
