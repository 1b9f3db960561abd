"""What a run will cost, said before it starts."""

from __future__ import annotations

import pytest
import torch
from conftest import make_run, read_stats, train_here
from torch import nn

from fastambient.counting import count
from fastambient.training import estimate, loop
from fastambient.training.config import network_config, resolve
from fastambient.training.estimate import work_of
from fastambient.training.run import RunFolder
from fastambient.training.start import TrainRequest, describe


class Timed(nn.Module):
    """A network that takes `fixed` seconds for its weights and `each` for an image, by its own clock."""

    def __init__(self, fixed, each):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.fixed, self.each, self.now, self.seen = fixed, each, 0.0, []

    def forward(self, x, c_noise, labels, augment, dropout_key):
        self.now += self.fixed + self.each * len(x)
        self.seen.append(len(x))
        return x * self.scale


@pytest.mark.parametrize(
    ("fixed", "each", "batch", "last"),
    [(0.0, 1e-4, 64, 64), (0.5, 0.1, 64, 4), (3.0, 0.5, 512, 2), (0.5, 0.1, 1, 1)],
)
def test_weights_are_paid_for_once_and_images_each(fixed, each, batch, last, monkeypatch):
    network = Timed(fixed, each)
    monkeypatch.setattr(estimate.models, "build", lambda config: network)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: network.now)
    settings = resolve(
        resolution=8, assignments=["training.kimg=2", f"training.batch={batch}", "training.sample_kimg=0"]
    )
    found = estimate.estimate_run(settings, channels=1, num_classes=0, nimg=1000)
    assert network.seen[-1] == last and f"scaled from {last} images" in found.text and "for 1 kimg" in found.text
    if last > 2 or batch <= 2:
        assert found.seconds == pytest.approx(1000 / batch * (fixed + each * batch))
    else:  # one measurement alone cannot tell the two apart
        assert found.seconds == pytest.approx(1000 / 2 * (fixed + 2 * each))
    assert found.is_long == (found.seconds > 86400)


def test_sample_grids_take_time(monkeypatch):
    """64 pictures of 2*18 - 1 forward passes each, a third of a step's arithmetic."""
    seconds = {}
    for every in (0, 0.3):
        network = Timed(0.0, 1e-3)
        monkeypatch.setattr(estimate.models, "build", lambda config, network=network: network)
        monkeypatch.setattr(estimate.time, "perf_counter", lambda network=network: network.now)
        assignments = ["training.kimg=2", "sampling.steps=18", f"training.sample_kimg={every}"]
        found = estimate.estimate_run(resolve(resolution=8, assignments=assignments), channels=1, num_classes=0)
        seconds[every] = found.seconds
        assert ("with 7 sample grids" in found.text) == (every > 0)
    assert seconds[0.3] - seconds[0] == pytest.approx(7 * 64 * 35 * 1e-3 / 3)


def test_every_run_says_what_it_takes(tmp_path, monkeypatch, capsys):
    path = make_run(tmp_path / "run")
    before = torch.random.get_rng_state()
    train_here(path)
    assert " for 0.16 kimg on 1 rank(s), scaled from 8 images timed now\n" in capsys.readouterr().err
    assert torch.equal(torch.random.get_rng_state(), before)
    monkeypatch.setattr(loop.Trainer, "train", lambda self: None)
    train_here(make_run(tmp_path / "long", "training.kimg=1e8"))
    said = capsys.readouterr().err.splitlines()
    assert any(s.startswith("warning: ") and "d " in s and "a smaller --kimg takes less" in s for s in said)


def test_dry_run_says_what_it_would_cost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = describe(TrainRequest(data="digits", assignments=["training.kimg=1"]))
    assert "422,353 parameters" in text and "GiB a rank" in text and "for 1 kimg" in text
    assert "sigma_tn 0.1875: 65.4%" in text and "model_channels: 24" in text
    assert not list(tmp_path.iterdir())


def test_the_work_of_a_step_is_counted_and_held_against_known_rates():
    """By hand: 6 FLOP a weight and pixel of a convolution; the share of the time that the known rates would take."""
    settings = resolve(resolution=8, assignments=["training.batch=64", "training.precision=bf16"])
    shape = {"channels": 1, "num_classes": 0}
    config = network_config(settings, **shape)
    step = count(config, bf16=True).step
    whole = work_of(settings, **shape, ranks=1, gpu=None)
    assert whole.flops == 64 * step.flops and step.convolution > 0.9 * step.flops
    assert whole.rates(0.5) == {"tflops": 128 * step.flops / 1e12}
    quarter = work_of(settings, **shape, ranks=4, gpu="NVIDIA H100 80GB HBM3")
    assert quarter.flops == whole.flops / 4
    floor = 16 * (step.convolution / 520e12 + step.product / 792e12)
    assert quarter.rates(0.5)["mfu"] == pytest.approx(floor / 0.5) and quarter.rates(floor)["mfu"] == pytest.approx(1)
    assert work_of(settings, **shape, ranks=1, gpu="Another GPU").floor is None
    anew = settings.with_values({"training": {"checkpoint_levels": 2}}, where="test")
    assert work_of(anew, **shape, ranks=1, gpu=None) == whole, "what is computed anew is no work"
    again = count(config, bf16=True, checkpoint_levels=2)
    assert again.step == step and 0 < again.activations < 0.7 * count(config, bf16=True).activations


def test_rates_stand_in_the_log_and_on_the_console(tmp_path, capsys):
    path = make_run(tmp_path / "run")
    train_here(path)
    rows = read_stats(path, timing=True)
    settings = RunFolder(path).read_settings()
    flops = work_of(settings, channels=1, num_classes=0, ranks=1, gpu=None).flops
    for row in rows:
        assert row["tflops"] == pytest.approx(flops * row["images_per_second"] / 8 / 1e12) and "mfu" not in row
    assert " TFLOP/s  ambient " in capsys.readouterr().err
