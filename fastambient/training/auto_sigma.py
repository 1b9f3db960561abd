"""``train --sigma-tn auto``: a noise level from one short run instead of a sweep.

Decision
--------
A pilot run of plain EDM, a quarter as long as the run itself (`SHARE`), is asked per noise level how much worse it
denoises held-out images than training images (evaluation/denoising_gap.py). The gap is a bump: at much noise images
cannot be told apart, and at little noise the picture is still there to be seen, so that knowing it helps less.
**sigma_tn is where the gap is largest**, at the vertex of the parabola through the largest value and its two neighbours
in ln sigma and ln gap. So the levels from the peak upwards, from where the sampler comes and where it decides which
picture it becomes, never see a clean image. A higher sigma_tn would leave the peak itself to clean images; a lower one
noises the images less than what tells them apart, and a copy of such an image is a copy. Not the level where the gap
begins: in small sets it is above 1 at all levels below the peak, so that there is no such level.

Measured on 100 digits of 8x8 pixels (EDM, digits preset, fourteen levels): the largest gap is at 0.22 after 16, 24 and
32 kimg, and 0.14 to 0.22 after 40 to 64, while it grows from 1.4 to 13.5: the place is that of the data, not of the
length. 0.2 is the level that works there, and 1.5*R/64 gives 0.19. On 300 CIFAR-10 images at 16 pixels (small16) the
gap was 1.09 at most after 39 kimg, at 0.5 to 0.9, where 1.5*R/64 gives 0.375. It is a heuristic: `sweep` measures.

Where the largest gap is below `LEAST`, the pilot has not begun to memorize, and the rule of resolution, 1.5*R/64, is
taken.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastambient.console import say, warn
from fastambient.diffusion.ambient import default_sigma_tn
from fastambient.errors import InputError
from fastambient.files import refuse_existing, write_json
from fastambient.training.audits import need_holdout
from fastambient.training.request import TrainRequest, plan
from fastambient.training.run import RunFolder

SHARE = 0.25  # of the run's length
LEAST = 1.1  # the largest gap that is a gap
_DRAWS = 4  # noises an image and level
_MOST = 1000  # images of each side


def sigma_of_gap(rows: Sequence[dict[str, Any]]) -> float | None:
    """The level of the largest gap, to three digits; None where none reaches `LEAST`.

    rows : {"sigma", "gap"} of `denoising_gap`; a gap of None (no training error at all) is passed over
    """
    found = sorted((math.log(r["sigma"]), math.log(r["gap"])) for r in rows if r["gap"] is not None and r["gap"] > 0)
    if not found:
        return None
    x, y = (np.array(side) for side in zip(*found, strict=True))
    top = int(y.argmax())
    if y[top] < math.log(LEAST):
        return None
    best = float(x[top])
    if 0 < top < len(x) - 1:
        around = slice(top - 1, top + 2)
        a, b, _ = np.polyfit(x[around] - best, y[around], 2)
        if a < 0:
            best += float(np.clip(-b / (2 * a), x[top - 1] - best, x[top + 1] - best))
    return float(f"{math.exp(best):.3g}")


@dataclass(frozen=True)
class Choice:
    """What was chosen and from what: sigma_tn.json in the run."""

    sigma_tn: float
    from_gap: bool
    pilot_kimg: float
    rows: list[dict[str, Any]]

    def write(self, run: Path) -> None:
        rule = "the level of the largest denoising gap" if self.from_gap else f"1.5*R/64: no gap reached {LEAST:g}"
        told = {"sigma_tn": self.sigma_tn, "rule": rule, "pilot_kimg": self.pilot_kimg, "denoising_gap": self.rows}
        write_json(run / "sigma_tn.json", told)


def choose_sigma_tn(request: TrainRequest, out: Path) -> Choice:
    """Train the pilot beside `out`, measure its gap, choose; the pilot goes again.

    Raises
    ------
    InputError : no held-out images, a stream, or a store that holds images noised at a level
    Interrupted : a signal stopped the pilot; nothing is left of it
    """
    from fastambient.evaluation.denoising_gap import classes_of, denoising_gap
    from fastambient.sampling import load
    from fastambient.training.start import create_run, start
    from fastambient.training.stopping import Interrupted

    if any(text.partition("=")[0].strip() == "noise.sigma_tn" for text in request.assignments):
        raise InputError("--sigma-tn auto and --set noise.sigma_tn exclude each other; leave one out")
    edm = ("noise.sigma_tn=0", "training.audit_kimg=0", "training.stop_when_copying=null", "training.sample_kimg=0",
           "data.noisy=none")  # fmt: skip
    pilot = replace(request, assignments=[*request.assignments, *edm], auto_sigma_tn=False, fit=False)
    whole = plan(pilot)
    why = "there is no gap between the denoising of seen and of unseen images"
    need_holdout("--sigma-tn auto", whole.settings, whole.data, why=why)
    kimg = max(SHARE * whole.settings.training.kimg, whole.settings.training.batch / 1000)
    folder = out.with_name(f"{out.name}-pilot")
    refuse_existing(folder)
    say(f"--sigma-tn auto: a pilot run of plain EDM, {kimg:g} kimg, for the denoising gap per noise level")
    short = [f"training.kimg={kimg}", f"training.checkpoint_kimg={kimg}"]
    try:
        start(create_run(plan(replace(pilot, assignments=[*pilot.assignments, *short]), verify=False), folder))
        run = RunFolder(folder)
        store = run.open_store(verify=False)
        denoiser = load(run.weights, device=whole.settings.training.device)
        rows = denoising_gap(
            denoiser, store.train.images[:], store.holdout.images[:],  # type: ignore[index]
            draws=_DRAWS, most=_MOST, **classes_of(denoiser, store),
        )  # fmt: skip
    except Interrupted as stopped:
        what = str(stopped).partition(" at ")[0].partition(";")[0]
        raise Interrupted(
            stopped.exit_code - 128, f"{what} while sigma_tn was being chosen; start it anew, or name a --sigma-tn"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sigma_max = whole.settings.sampling.sigma_max
    found = sigma_of_gap([row for row in rows if row["sigma"] is not None and row["sigma"] <= sigma_max])
    largest = max((row["gap"] for row in rows if row["gap"] is not None), default=math.nan)
    for row in rows:
        say(f"  sigma {row['sigma']:<8.3g} held-out over training error {row['gap'] or math.nan:.3f}")
    if found is None:
        sigma_tn = default_sigma_tn(store.resolution)
        warn(f"--sigma-tn auto: the largest gap is {largest:.3f}, below {LEAST:g}: the pilot memorizes nothing yet;"
             f" taking 1.5*R/64 = {sigma_tn:g}")  # fmt: skip
        return Choice(sigma_tn, False, kimg, rows)
    say(f"--sigma-tn auto: sigma_tn {found:g}, where the gap is largest ({largest:.2f})")
    return Choice(found, True, kimg, rows)
