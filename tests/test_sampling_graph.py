"""The captured step: its static memory and its fall-back, with a stand-in that records what a CUDA graph would."""

from __future__ import annotations

import pytest
import torch

from fastambient.sampling import GraphedDenoiser


def fake_capture(function, device):
    """Runs `function` anew at each replay, on whatever its tensors then hold, into the output of the capture."""
    output = function()
    return lambda: output.copy_(function()), output


class Denoiser:
    def __init__(self):
        self.calls, self.inputs = 0, set()

    def __call__(self, x, sigma, class_labels):
        self.calls += 1
        self.inputs.add(x.data_ptr())
        return x / sigma.view(-1, 1) + (0 if class_labels is None else class_labels.sum(1, keepdim=True))


def draw(n, dtype=torch.float32):
    return torch.randn(n, 5, dtype=dtype), torch.rand(n, dtype=dtype) + 0.1, torch.rand(n, 2)


@pytest.mark.parametrize("labelled", [True, False])
def test_replays_read_what_is_given_and_results_stay(labelled):
    D, captures = Denoiser(), []

    def capture(function, device):
        captures.append(device)
        return fake_capture(function, device)

    graphed = GraphedDenoiser(D, (4, 8), capture=capture)
    results, expected = [], []
    for n in (4, 4, 8, 4, 8):
        x, sigma, labels = draw(n)
        labels = labels if labelled else None
        before = x.clone()
        results.append(graphed(x, sigma, labels))
        expected.append(Denoiser()(x, sigma, labels))
        assert torch.equal(x, before)
    for found, wanted in zip(results, expected, strict=True):  # a later replay must not write into an earlier result
        assert torch.equal(found, wanted)
    assert captures == [torch.device("cpu")] * 2, "one for each size"
    assert len(D.inputs) == 2, "the denoiser reads static memory only"


def test_other_sizes_run_as_they_are_and_other_dtypes_are_captured_again():
    captures = []
    graphed = GraphedDenoiser(Denoiser(), (4,), capture=lambda f, d: captures.append(1) or fake_capture(f, d))
    for n, dtype, count in ((3, torch.float32, 0), (4, torch.float32, 1), (4, torch.float64, 2), (4, torch.float32, 2)):
        data = draw(n, dtype)
        out = graphed(*data)
        assert torch.equal(out, Denoiser()(*data)) and out.dtype == dtype and len(captures) == count


def test_a_failed_capture_is_said_once_and_the_network_runs_as_it_is(capsys):
    def broken(function, device):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    D = Denoiser()
    graphed = GraphedDenoiser(D, (4, 8), capture=broken)
    for n in (4, 4, 8):
        data = draw(n)
        assert torch.equal(graphed(*data), Denoiser()(*data))
    assert D.calls == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no CUDA graph of the network (operation not permitted)" in said


def test_what_is_wrong_with_the_denoiser_is_not_hidden():
    def wrong(x, sigma, class_labels):
        raise ValueError("class_labels must be [4, 3]")

    with pytest.raises(ValueError, match="class_labels"):
        GraphedDenoiser(wrong, (4,), capture=fake_capture)(*draw(4))
