"""EDM's networks from its arguments and weights: the same outputs and gradients, and nothing loaded by halves."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import read_safetensors

from fastambient.errors import InputError
from fastambient.interop.edm import build

NETS = ("ddpmpp", "ncsnpp", "adm")


def recorded(name):
    tensors, metadata = read_safetensors(f"net_{name}.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return tensors, json.loads(metadata["config"]), state


def per_sample_error(value, reference):
    return (value - reference).abs().flatten(1).amax(1) / reference.abs().flatten(1).amax(1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", NETS)
def test_outputs_and_gradients_equal_the_recorded_ones(name, memory_format):
    t, config, state = recorded(name)
    D = build(config, state).to(memory_format=memory_format)
    x = t["in.x"].contiguous(memory_format=memory_format)
    denoised = D(x, t["in.sigma"], t.get("in.labels"), t.get("in.augment_labels"))
    assert per_sample_error(denoised, t["out.denoised"]).max() < 1e-5

    denoised.square().sum().backward()
    parameters = dict(D.network.named_parameters())
    gradients = {key.removeprefix("grad.model."): value for key, value in t.items() if key.startswith("grad.")}
    assert len(gradients) == 4
    for key, reference in gradients.items():
        assert (parameters[key].grad - reference).abs().max() < 2e-5 * reference.abs().max(), key
    norm = torch.stack([p.grad.double().norm() for p in parameters.values()]).norm()
    assert norm.item() == pytest.approx(t["grad_norm_all"].item(), rel=2e-5)


@pytest.mark.parametrize("name", NETS)
def test_each_sample_stands_alone(name):
    t, config, state = recorded(name)
    D = build(config, state)
    labels, augment = t.get("in.labels"), t.get("in.augment_labels")
    for i in range(4):
        one = [None if v is None else v[i : i + 1] for v in (labels, augment)]
        with torch.no_grad():
            denoised = D(t["in.x"][i : i + 1], t["in.sigma"][i], *one)
        assert per_sample_error(denoised, t["out.denoised"][i : i + 1]) < 1e-5


@pytest.mark.parametrize("name", NETS)
def test_state_is_exactly_edms(name):
    _, config, state = recorded(name)
    D = build(config, state)
    assert not D.training
    own = D.network.state_dict()
    assert {"model." + key for key in own} == set(state)
    assert all(torch.equal(value, state["model." + key]) for key, value in own.items())


def test_the_networks_settings_choose_the_data_scale_and_the_samplers_range_is_without_effect():
    t, config, state = recorded("ddpmpp")
    x, sigma = t["in.x"], t["in.sigma"]
    D = build(config, state)
    same = build({**config, "sigma_data": 0.5, "sigma_min": 0.0, "sigma_max": float("inf"), "use_fp16": False}, state)
    other = build({**config, "sigma_data": 1.0}, state)
    with torch.no_grad():
        assert torch.equal(D(x, sigma), same(x, sigma))
        assert not torch.allclose(D(x, sigma), other(x, sigma))


def test_half_precision_weights_load():
    t, config, state = recorded("ddpmpp")
    D = build(config, {key: value.half() for key, value in state.items()})
    assert all(p.dtype == torch.float32 for p in D.parameters())
    with torch.no_grad():
        error = per_sample_error(D(t["in.x"], t["in.sigma"], None, t["in.augment_labels"]), t["out.denoised"])
    assert 1e-6 < error.max() < 0.05


def test_missing_unexpected_and_misshapen_entries_are_named():
    _, config, state = recorded("ncsnpp")
    key = "model.enc.8x8_block0.conv0.weight"
    with pytest.raises(InputError, match=f"lacks {key};"):
        build(config, {k: v for k, v in state.items() if k != key})
    with pytest.raises(InputError, match=r"lacks model\.map_noise\.freqs"):
        build(config, {k: v for k, v in state.items() if "freqs" not in k})
    with pytest.raises(InputError, match=r"unexpected model\.nonsense;"):
        build(config, {**state, "model.nonsense": torch.zeros(1)})
    with pytest.raises(InputError, match=r"unexpected stray;"):
        build(config, {**state, "stray": torch.zeros(1)})
    with pytest.raises(InputError, match=rf"{key} \[1, 2\] \(expected \[32, 16, 3, 3\]\)"):
        build(config, {**state, key: torch.zeros(1, 2)})
    with pytest.raises(InputError, match=r"lacks .* and \d+ more;") as caught:
        build(config, {})
    assert "\n" not in str(caught.value)


def test_a_filter_other_than_the_settings_is_refused():
    _, config, state = recorded("ddpmpp")
    key = "model.enc.8x8_down.conv0.resample_filter"
    with pytest.raises(InputError, match=f"another filter .* {key};"):
        build(config, {**state, key: torch.tensor([[[[0.4, 0.2], [0.2, 0.2]]]])})


def test_unknown_settings_are_named():
    _, config, state = recorded("adm")
    with pytest.raises(InputError, match="no setting 'model_chanels'; nearest: model_channels"):
        build({**config, "model_chanels": 64}, state)
