"""Seeds to pictures: purity, exported weights, and files that lie."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastambient import models
from fastambient.diffusion.edm import EDMDenoiser
from fastambient.diffusion.guidance import GuidedDenoiser
from fastambient.diffusion.samplers import dpmpp_2m, heun
from fastambient.errors import InputError
from fastambient.pictures import to_uint8
from fastambient.sampling import (
    GraphedDenoiser,
    draw_classes,
    export,
    latents,
    load,
    parse_interval,
    parse_seeds,
    sample,
    write_samples,
)
from fastambient_kernels.noise import normal, random_words

CONFIG = {
    "model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "label_dim": 0, "augment_dim": 0,
    "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0,
}  # fmt: skip


def weights(path, *, seed=0, metadata=None, **changes):
    """A model.safetensors of a small network with random, non-zero weights."""
    config = CONFIG | changes
    torch.manual_seed(seed)
    network = models.build(config)
    state = {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    export(path, state, {"network": config, "sigma_data": 0.5, "sampling": {"steps": 4}} | (metadata or {}))
    return path


def test_seed_ranges():
    assert parse_seeds("0-3,100") == [0, 1, 2, 3, 100]
    assert parse_seeds(" 7 ") == [7]
    for bad in ("", "a", "3-1", "1,1", "0-2,1", "-1", "1-", "1--2", "0-999999999999"):
        with pytest.raises(InputError, match="--seeds"):
            parse_seeds(bad)


def test_latents_are_pure_and_unit_variance():
    z = latents(range(500), (1, 8, 8))
    assert torch.equal(latents([499, 3], (1, 8, 8)), z[[499, 3]])
    assert z.mean() == pytest.approx(0, abs=0.03) and z.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(z[7].flatten(), normal(torch.tensor([7]), 64, seed=0, stream=5)[0]), "the contract's stream"
    classes = draw_classes(range(1000), 10)
    assert torch.equal(classes[5:7], draw_classes([5, 6], 10))
    words = random_words(torch.arange(1000), 1, seed=1, stream=5)[:, 0]  # seed 0 would tie the class to the latent
    assert torch.equal(classes, words * 10 >> 32)
    assert torch.bincount(classes, minlength=10).min() > 60


def test_a_seed_gives_the_same_picture_in_any_batch(tmp_path):
    denoiser = load(weights(tmp_path / "model.safetensors"))
    whole = sample(denoiser, range(10), batch=10)
    assert whole.dtype == torch.uint8 and whole.shape == (10, 1, 8, 8)
    assert whole.float().std() > 5, "the pictures must not be trivial"
    parts = sample(denoiser, [9, 2, 4], batch=2)
    # another batch may round a value to the neighbouring level
    assert (parts.int() - whole[[9, 2, 4]].int()).abs().max() <= 1
    assert len({p.numpy().tobytes() for p in whole}) == 10


def test_the_sampler_takes_what_the_file_says(tmp_path):
    """Every parameter, and churn from streams of its own: seeds 0 and 1 of stream 5 are latents and classes."""
    denoiser = load(weights(tmp_path / "model.safetensors"))
    told = {
        "sigma_min": 0.01,
        "sigma_max": 20.0,
        "rho": 5.0,
        "S_churn": 3.0,
        "S_min": 0.05,
        "S_max": 10.0,
        "S_noise": 1.1,
    }
    denoiser.metadata["sampling"] = {"steps": 6, "batch": 1} | told

    def churn(i):
        return normal(torch.tensor([3, 9]), 64, seed=i + 2, stream=5).view(2, 1, 8, 8)

    expected = to_uint8(heun(denoiser, latents([3, 9], (1, 8, 8)), 6, **told, randn=churn))
    assert (sample(denoiser, [3, 9]).int() - expected.int()).abs().max() <= 1
    for name, other in {
        "sigma_min": 0.2,
        "sigma_max": 30.0,
        "rho": 7.0,
        "S_churn": 0.0,
        "S_min": 5.0,
        "S_max": 1.0,
        "S_noise": 1.0,
    }.items():
        changed = to_uint8(heun(denoiser, latents([3, 9], (1, 8, 8)), 6, **(told | {name: other}), randn=churn))
        assert (changed.int() - expected.int()).abs().max() > 1, f"{name} shows in no picture"


def test_the_same_weights_give_the_same_bytes(tmp_path):
    """safetensors orders metadata by a hash that differs from call to call."""
    network = models.build(CONFIG)
    told = {
        "network": CONFIG,
        "sigma_data": 0.5,
        "sampling": {"steps": 4},
        "note": "\u00e9\u4e00",
        "nimg": 7,
        "a": None,
    }
    written = set()
    for i in range(6):
        export(tmp_path / "model.safetensors", network.state_dict(), told if i % 2 else dict(reversed(told.items())))
        written.add((tmp_path / "model.safetensors").read_bytes())
    assert len(written) == 1
    (data,) = written
    assert int.from_bytes(data[:8], "little") % 8 == 0, "tensors are aligned"
    assert data[8:].startswith(b'{"__metadata__":{"a":"null","format":"fastambient-1","network":')
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {k: json.loads(v) for k, v in file.metadata().items() if k != "format"} == told
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(v, found[k]) for k, v in network.state_dict().items())


def test_classes(tmp_path):
    denoiser = load(weights(tmp_path / "model.safetensors", label_dim=3))
    one, two = (sample(denoiser, range(4), class_index=c) for c in (0, 2))
    assert not torch.equal(one, two)
    drawn = sample(denoiser, range(4))
    for i, c in enumerate(draw_classes(range(4), 3).tolist()):
        assert (drawn[i].int() - sample(denoiser, [i], class_index=c)[0].int()).abs().max() <= 1
    with pytest.raises(InputError, match=r"a class in 0\.\.2, got 3"):
        sample(denoiser, [0], class_index=3)
    with pytest.raises(InputError, match="unconditional"):
        sample(load(weights(tmp_path / "u.safetensors")), [0], class_index=0)


def assert_like(pictures, x):
    """To one grey level: another batch or layout may round a value to the neighbouring one."""
    assert (pictures.int() - to_uint8(x).int()).abs().max() <= 1


def test_the_sampler_and_its_numbers_can_be_asked_for(tmp_path):
    denoiser = load(weights(tmp_path / "model.safetensors"))
    z = latents([3, 9], (1, 8, 8))
    fast = sample(denoiser, [3, 9], sampler="dpmpp-2m", steps=7)
    assert_like(fast, dpmpp_2m(denoiser, z, 7))
    assert (fast.int() - sample(denoiser, [3, 9], steps=7).int()).abs().max() > 1
    denoiser.metadata["sampling"] = {"sampler": "dpmpp-2m", "steps": 7}
    assert torch.equal(sample(denoiser, [3, 9]), fast), "a weights file names its own"
    told = {"S_churn": 3.0, "S_min": 0.05, "S_max": 10.0, "S_noise": 1.1}
    churn = lambda i: normal(torch.tensor([3, 9]), 64, seed=i + 2, stream=5).view(2, 1, 8, 8)  # noqa: E731
    churned = sample(denoiser, [3, 9], sampler="heun", batch=1, **told)
    assert_like(churned, heun(denoiser, z, 7, **told, randn=churn))
    with pytest.raises(TypeError, match="stepz"):
        sample(denoiser, [0], stepz=3)


def test_classifier_free_guidance(tmp_path):
    denoiser = load(weights(tmp_path / "model.safetensors", label_dim=3, label_dropout=0.1))
    labels = nn.functional.one_hot(draw_classes([3, 9], 3), 3).float()
    guided = sample(denoiser, [3, 9], guidance=2.5, batch=1)
    D = GuidedDenoiser(denoiser, 2.5)
    assert_like(guided, heun(lambda x, s: D(x, s, labels), latents([3, 9], (1, 8, 8)), 4))
    plain = sample(denoiser, [3, 9])
    assert (guided.int() - plain.int()).abs().max() > 1
    assert torch.equal(sample(denoiser, [3, 9], guidance=1.0), plain)
    assert torch.equal(sample(denoiser, [3, 9], guidance=2.5, guidance_interval=(100, 200)), plain)
    untold = load(weights(tmp_path / "u.safetensors", label_dim=3))
    with pytest.raises(InputError, match=r"learned pictures without a class, too, .* model\.label_dropout 0"):
        sample(untold, [0], guidance=2.0)


def test_autoguidance(tmp_path):
    good, bad = (load(weights(tmp_path / f"{i}.safetensors", seed=i)) for i in range(2))
    z = latents([3, 9], (1, 8, 8))

    def expected(weight):
        return heun(lambda x, s: bad(x, s) + weight * (good(x, s) - bad(x, s)), z, 4)

    assert_like(sample(good, [3, 9], guide=bad, guidance=1.5), expected(1.5))
    assert_like(sample(good, [3, 9], guide=bad), expected(2))
    assert (sample(good, [3, 9], guide=bad).int() - sample(good, [3, 9]).int()).abs().max() > 1
    for changes, message in (
        ({"img_channels": 3}, "the guide has img_channels 3, the model 1"),
        ({"img_resolution": 16}, "the guide has img_resolution 16, the model 8"),
        ({"label_dim": 2}, "the guide has label_dim 2, the model 0"),
        ({"metadata": {"class_names": ["a"]}}, r"the guide has class_names \['a'\], the model None"),
    ):
        with pytest.raises(InputError, match=message):
            sample(good, [0], guide=load(weights(tmp_path / "other.safetensors", **changes)))
    small = load(weights(tmp_path / "small.safetensors", model_channels=4))  # a guide may be another network
    assert sample(good, [0], guide=small).shape == (1, 1, 8, 8)


def test_guided_files_say_what_they_cost(tmp_path, capsys):
    a, b = (weights(tmp_path / f"{i}.safetensors", seed=i) for i in range(2))
    out = write_samples(a, [0, 5], tmp_path / "x.npz", autoguidance=b, sampler="dpmpp-2m", steps=6)
    said = capsys.readouterr().err
    assert said == "guidance 2 asks twice at every noise level: 2 x 6 evaluations a picture\n"
    with np.load(out, allow_pickle=False) as file:
        drawn = sample(load(a), [0, 5], guide=load(b), sampler="dpmpp-2m", steps=6)
        assert torch.equal(torch.from_numpy(file["images"]), drawn)
    write_samples(a, [0], tmp_path / "y.npz")
    assert not capsys.readouterr().err
    assert parse_interval(" 0.2,5") == (0.2, 5.0)
    for bad in ("", "1", "1,2,3", "a,b"):
        with pytest.raises(InputError, match="--guidance-interval must be LOW,HIGH"):
            parse_interval(bad)


def test_bf16_is_the_networks_and_the_state_stays_float32(tmp_path):
    denoiser = load(weights(tmp_path / "model.safetensors", metadata={"precision": "bf16"}))
    seen = []
    denoiser.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    denoiser.network.enc["8x8_conv"].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    exact = sample(denoiser, range(4))
    assert set(seen) == {torch.float32, (torch.float32, torch.float32)}, "a CPU keeps to float32 unless asked"
    assert torch.equal(exact, sample(denoiser, range(4), precision="fp32"))
    seen.clear()
    half = sample(denoiser, range(4), precision="bf16")
    assert set(seen) == {torch.bfloat16, (torch.float32, torch.float32)}
    difference = (half.int() - exact.int()).abs().float()
    assert 0 < difference.mean() < 4


def test_the_network_can_be_graphed(tmp_path, monkeypatch, capsys):
    from test_sampling_graph import fake_capture

    denoiser = load(weights(tmp_path / "model.safetensors", label_dim=3, label_dropout=0.1))
    captures, options = [], {"batch": 4, "guidance": 2.0, "guidance_interval": (0.1, 10)}
    plain = sample(denoiser, range(10), **options)
    assert not capsys.readouterr().err, "a CPU has no graphs, and nothing is said of them"

    def capture(function, device):
        captures.append(device)
        return fake_capture(function, device)

    monkeypatch.setattr(
        "fastambient.sampling.draw.GraphedDenoiser", lambda D, sizes: GraphedDenoiser(D, sizes, capture=capture)
    )
    graphed = sample(denoiser, range(10), graph=True, **options)
    assert (graphed.int() - plain.int()).abs().max() <= 1
    # 4 alone and 8 in two halves; of the last batch, 2 run as they are and their 4 in two halves are captured already
    assert len(captures) == 2
    monkeypatch.undo()
    assert (sample(denoiser, range(10), graph=True, **options).int() - plain.int()).abs().max() <= 1
    assert "no CUDA graph of the network (a cpu has none)" in capsys.readouterr().err


def test_classes_go_by_name_and_by_number(tmp_path):
    """Folders that are numbers are named, not counted: "10" stands before "2"."""
    named = weights(tmp_path / "n.safetensors", label_dim=4, metadata={"class_names": ["10", "2", "cat", "dog"]})
    plain = weights(tmp_path / "p.safetensors", label_dim=4)

    def picture(model, given):
        out = write_samples(model, [0], tmp_path / "x.npz", class_index=given, force=True)
        return np.load(out, allow_pickle=False)["images"][0, 0]

    for given, number in (("cat", 2), ("dog", 3), ("3", 3), ("10", 0), ("2", 1), (2, 2)):
        assert np.array_equal(picture(named, given), picture(plain, number)), given
    for model, given, message in (
        (named, "cta", "--class: there is no class 'cta'; nearest: cat"),
        (named, "bird", "--class: there is no class 'bird'; known: 10, 2, cat, dog"),
        (named, "4", r"--class: expected a class in 0\.\.3, got 4"),
        (plain, "cat", r"--class: expected a number in 0\.\.3, because its classes have no names, got 'cat'"),
        (
            weights(tmp_path / "u.safetensors"),
            "cat",
            r"the model is unconditional \(train one with --set data.use_labels=true\), got 'cat'",
        ),
    ):
        with pytest.raises(InputError, match=message):
            write_samples(model, [0], tmp_path / "y.npz", class_index=given)


def test_files_and_refusals(tmp_path):
    model = weights(tmp_path / "model.safetensors")
    out = write_samples(tmp_path, [0, 5], tmp_path / "s")  # a folder with model.safetensors is enough
    assert sorted(p.name for p in out.iterdir()) == [".gitignore", "grid.png", "seed000000000.png", "seed000000005.png"]
    with pytest.raises(InputError, match="not empty"):
        write_samples(model, [0], tmp_path / "s")
    write_samples(model, [3], tmp_path / "s", force=True)
    assert len(list(out.iterdir())) == 3, "--force replaces the folder"
    npz = write_samples(model, [0, 5], tmp_path / "x.npz")
    with np.load(npz, allow_pickle=False) as file:
        assert file["images"].shape == (2, 1, 8, 8) and file["seeds"].tolist() == [0, 5]
    with pytest.raises(InputError, match="exists"):
        write_samples(model, [0], npz)
    for arguments, message in (
        ({"steps": 1}, "one step is no sampler"),
        ({"steps": 10**10}, "2 to 10,000"),
        ({"batch": 0}, "--batch"),
        ({"class_index": 1}, "class"),
        ({"S_churn": -1}, "--S-churn must be 0 or more"),
        ({"sampler": "dpmpp-2m", "S_churn": 1}, "--S-churn must be 0 with dpmpp-2m"),
        ({"precision": "fp16"}, "--precision must be fp32 or bf16"),
        ({"guidance": 2}, "--guidance 2 needs a class-conditional model"),
        ({"guidance": -1}, "--guidance must be 0 or more"),
        ({"guidance": math.nan}, "--guidance must be 0 or more"),
        ({"guidance_interval": (0.1, 1.0)}, "nothing is guided"),
        ({"autoguidance": model, "guidance_interval": (1.0, 0.1)}, "LOW < HIGH, got 1,0.1"),
        ({"autoguidance": tmp_path / "none"}, "no run or weights file"),
    ):
        with pytest.raises(InputError, match=message):
            write_samples(model, [0], tmp_path / "bad", **arguments)
    assert not (tmp_path / "bad").exists(), "an error leaves nothing behind"


@pytest.mark.parametrize("out", ["file/x.npz", "file/x", "folder.npz"])
def test_a_place_that_cannot_be_written_is_found_before_sampling(out, tmp_path, monkeypatch):
    model = weights(tmp_path / "model.safetensors")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.npz").mkdir()
    monkeypatch.setattr("fastambient.sampling.sample", lambda *a, **k: pytest.fail("sampled first"))
    with pytest.raises(InputError, match=r"is a file|is a folder"):
        write_samples(model, [0], tmp_path / out, force=True)


def test_pickles_are_refused_unread(tmp_path):
    for suffix in (".pkl", ".pt", ".pth", ".ckpt"):
        file = tmp_path / f"model{suffix}"
        file.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
        with pytest.raises(InputError, match="never loaded"):
            load(file)
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor config"):
        load(tmp_path)
    with pytest.raises(InputError, match="no run or weights file"):
        load(tmp_path / "none.safetensors")


def test_lying_headers_are_refused(tmp_path):
    model = weights(tmp_path / "model.safetensors")
    tensors = load_file(model)
    good = {"network": json.dumps(CONFIG), "sigma_data": "0.5", "format": "fastambient-1"}
    lies = [
        ({"format": "other"}, "not written by fastambient"),
        ({"network": "{"}, "damaged"),
        ({"network": "[]"}, "usable network"),
        ({"sigma_data": "-1.0"}, "sigma_data"),
        ({"sigma_data": '"x"'}, "sigma_data"),
        ({"network": json.dumps(CONFIG | {"model_channels": 16})}, "does not fit the tensors"),
        ({"network": json.dumps(CONFIG | {"model_channels": 4096 * 1024})}, "does not fit|cannot be built|no network"),
        ({"network": json.dumps(CONFIG | {"num_blocks": 10**9})}, "no network"),
        ({"network": json.dumps(CONFIG | {"num_blocks": "x"})}, "no network"),
        ({"network": json.dumps(CONFIG | {"evil": 1})}, "no network"),
        ({"network": json.dumps({"model_type": "SongUNet"})}, "no network"),
        ({"network": "[" * 100_000}, "damaged"),
        ({"sampling": '"x"'}, "damaged"),
        ({"sampling": '{"evil": 1}'}, "damaged"),
        ({"sampling": '{"steps": "x"}'}, "damaged"),
        ({"sampling": '{"rho": 0.0}'}, r"sampling\.rho must be above 0"),
        ({"sampling": '{"sampler": "euler"}'}, r"sampling\.sampler must be one of heun, dpmpp-2m, got euler"),
        ({"sampling": '{"sampler": "dpmpp-2m", "S_churn": 1.0}'}, r"sampling\.S_churn must be 0 with dpmpp-2m"),
    ]
    for change, message in lies:
        save_file(tensors, tmp_path / "lie.safetensors", good | change)
        with pytest.raises(InputError, match=message):
            load(tmp_path / "lie.safetensors")
    save_file({k: v.to(torch.int32) for k, v in tensors.items()}, tmp_path / "lie.safetensors", good)
    with pytest.raises(InputError, match="floating-point"):
        load(tmp_path / "lie.safetensors")
    missing = {k: v for k, v in tensors.items() if k != "map_layer0.bias"}
    save_file(missing, tmp_path / "lie.safetensors", good)
    with pytest.raises(InputError, match=r"map_layer0\.bias"):
        load(tmp_path / "lie.safetensors")
    data = model.read_bytes()
    for cut in (data[:4], data[: len(data) // 2], b"\xff" * 16 + data[16:], b""):
        (tmp_path / "cut.safetensors").write_bytes(cut)
        with pytest.raises(InputError, match="damaged or no safetensors"):
            load(tmp_path / "cut.safetensors")
    assert math.isfinite(load(model).sigma_data)


class SomebodysNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        return self.conv(x)


def test_a_denoiser_of_ones_own_needs_a_shape():
    denoiser = EDMDenoiser(SomebodysNetwork())
    with pytest.raises(InputError, match=r"needs shape=\(C, H, W\)"):
        sample(denoiser, [0])
    assert sample(denoiser, [0], shape=(1, 4, 4), steps=2).shape == (1, 1, 4, 4)
