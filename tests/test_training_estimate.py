"""What a run will cost, said before it starts."""

from __future__ import annotations

import pytest
import torch
from conftest import make_run, read_stats, train_here
from torch import nn

from fastambient import system
from fastambient.counting import count
from fastambient.data import dali, loaders
from fastambient.errors import InputError
from fastambient.training import clock, estimate, loop
from fastambient.training import request as training_request
from fastambient.training.config import network_config, resolve
from fastambient.training.estimate import work_of
from fastambient.training.request import TrainRequest, describe, plan
from fastambient.training.run import RunFolder
from fastambient.training.start import create_run


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
    [(0.0, 1e-4, 64, 64), (0.5, 0.1, 64, 8), (3.0, 0.5, 512, 2), (0.5, 0.1, 1, 1)],
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


@pytest.mark.parametrize("seen", [0, 3])
@pytest.mark.parametrize(("batch", "total"), [(8, 160), (64, 1000), (7, 100), (64, 10)])
@pytest.mark.parametrize("every", [0.0, 0.001, 0.016, 0.04, 0.064, 0.1, 0.3, 7.0])
def test_just_the_grids_that_will_be_drawn_are_counted(seen, batch, total, every):
    """As the loop draws them: where a step passes a multiple, and at the end."""
    nimg, drawn = seen * batch, 0
    while nimg < total:
        nimg += batch
        drawn += clock.crosses(nimg, batch, every) or (nimg >= total and every > 0)
    assert clock.grids_to_come(seen * batch, batch, total, every) == drawn


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
    assert "\nloader resident: the set takes " in text
    monkeypatch.setattr(loaders, "available_memory", lambda: 1000)
    monkeypatch.setattr(dali, "missing", lambda device: "DALI is not installed")
    monkeypatch.setattr(training_request, "estimate_run", lambda *_, **__: estimate.Estimate(0, 0, 0, ""))
    text = describe(TrainRequest(data="digits"))
    assert "\nloader workers: the set takes " in text and "DALI is not installed" in text
    assert not list(tmp_path.iterdir())


def test_a_set_that_is_not_held_takes_no_memory_of_the_batch(monkeypatch):
    counted = []
    monkeypatch.setattr(
        training_request, "fit_micro_batch", lambda *_, data_bytes, **__: (counted.append(data_bytes), (8, ""))[1]
    )
    for memory in (10**9, 1000):
        monkeypatch.setattr(loaders, "available_memory", lambda memory=memory: memory)
        plan(TrainRequest(data="digits", fit=True))
    assert counted == [100 * 64, 0]


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


GIB = 2**30


def fit(limit, monkeypatch, *assignments):
    monkeypatch.setattr(estimate, "available_memory", lambda: limit)
    settings = resolve(resolution=32, assignments=["training.batch=48", *assignments])
    return estimate.fit_micro_batch(settings, channels=3, num_classes=0, data_bytes=10**6)


def test_the_largest_micro_batch_that_is_predicted_to_fit(monkeypatch):
    """State, activations and data set by hand, against nine tenths of the memory that there is."""
    settings = resolve(resolution=32, assignments=["training.batch=48"])
    counts = count(network_config(settings, channels=3, num_classes=0))
    need = {n: 20 * counts.parameters + 4 * counts.joined + n * counts.activations + 10**6 for n in (1, 12, 16, 24, 48)}
    for images, bytes_ in need.items():
        found, text = fit(bytes_ / 0.9 + 1, monkeypatch)
        assert found == images and f"{images} of a rank's 48 images at once" in text and "GiB" in text
        if images > 1:
            assert fit(bytes_ / 0.9 - 1, monkeypatch)[0] < images
    assert fit(need[24] / 0.9 + 1, monkeypatch, "training.checkpoint_levels=3")[0] > 24
    assert fit(2 * need[24] / 0.9, monkeypatch, "training.ranks=2")[0] == 12, "all-reduce buckets, too"
    assert fit(None, monkeypatch)[0] == 48
    with pytest.raises(InputError, match=r"--batch auto: not even one image at once fits in memory \(.* GiB of "):
        fit(need[1] / 0.9 - 1, monkeypatch)


def test_trying_stops_at_the_first_that_runs():
    tried = []

    def run(images):
        tried.append(images)
        if images > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert estimate.largest_that_runs([24, 12, 8, 6], run) == 8 and tried == [24, 12, 8]
    assert estimate.largest_that_runs([24, 12], run) is None
    with pytest.raises(ValueError, match="another"):
        estimate.largest_that_runs([8], lambda images: (_ for _ in ()).throw(ValueError("another")))


def test_batch_auto_keeps_the_batch_and_its_numbers(tmp_path, monkeypatch, capsys):
    options = {"training": {"kimg": 0.016, "batch": 8, "sample_kimg": 0}}
    small = ("model.model_channels=8", "model.num_blocks=1")
    counts = count(network_config(resolve(resolution=8, assignments=small), channels=1, num_classes=0))
    data = 100 * 64
    monkeypatch.setattr(
        estimate,
        "available_memory",
        lambda: (20 * counts.parameters + 4 * counts.joined + 2 * counts.activations + 1797 * 64 + data) / 0.9,
    )
    stats = []
    for name, fitted in (("whole", False), ("fitted", True)):
        request = TrainRequest(data="digits", assignments=small, options=options, noise_seed=7, fit=fitted)
        path = create_run(plan(request), tmp_path / name)
        settings = RunFolder(path).read_settings()
        assert settings.training.batch == 8 and settings.training.batch_gpu == (2 if fitted else None)
        assert capsys.readouterr().err.count("--batch auto: 2 of a rank's 8 images at once") == fitted
        train_here(path)
        said = capsys.readouterr().err
        assert "peak memory " in said and " GiB were predicted for the run's own" in said
        stats.append(read_stats(path))
    for a, b in zip(*stats, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and a["ambient_share"] == b["ambient_share"]
    with pytest.raises(InputError, match=r"--batch auto finds training.batch_gpu, which is set to 4"):
        plan(TrainRequest(data="digits", assignments=["training.batch_gpu=4"], fit=True))


def test_available_memory_is_the_least_of_machine_and_group(tmp_path, monkeypatch):
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    for limit, expected in (("max", None), ("5000", 5000 - 1000 + 300), ("100", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("1000\n")
        assert system._group_memory(tmp_path) == expected
    assert system._group_memory(tmp_path / "none") is None
    first = tmp_path / "one" / "memory"
    first.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "500"), ("stat", "total_inactive_file 50")):
        (first / f"memory.{name}").write_text(text)
    assert system._group_memory(tmp_path / "one") == 450
    machine = system._machine_memory()
    assert machine is None or 2**24 < machine < 2**50
    for group, expected in ((None, 7), (3, 3)):
        monkeypatch.setattr(system, "_machine_memory", lambda: 7)
        monkeypatch.setattr(system, "_group_memory", lambda group=group: group)
        assert system.available_memory() == expected


@pytest.mark.gpu
def test_a_gpu_tries_what_fits():
    settings = resolve(resolution=32, assignments=["training.batch=4096", "training.device=cuda"])
    total = torch.cuda.get_device_properties(0).total_memory
    sizes = []
    for data_bytes in (0, int(0.7 * total)):
        found, text = estimate.fit_micro_batch(settings, channels=3, num_classes=0, data_bytes=data_bytes)
        assert "tried down from 4096" in text
        sizes.append(found)
    assert sizes[0] >= sizes[1] >= 1
