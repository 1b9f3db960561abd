"""The compiled Triton kernels on a GPU: float64, graphs, compile. AdamEMA: test_kernels_adam_ema*."""

from __future__ import annotations

import math

import ambient_checks as checks
import pytest
import torch
import torch.nn.functional as F
from conftest import make_run
from test_kernels_group_norm_silu import assert_within, errors, inputs
from test_kernels_resample import compare
from test_kernels_residual import assert_right, results
from test_kernels_residual import inputs as residual_inputs

from fastambient_kernels import ambient_loss, ambient_noise, dropout, group_norm_silu, residual
from fastambient_kernels.noise import random_words

pytestmark = pytest.mark.gpu
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image", [torch.uint8, torch.float32])
@pytest.mark.parametrize("F_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma_tn", [0.0, 0.4, math.inf])
@pytest.mark.parametrize("size", [(6, 3, 64, 64), (3, 3, 17, 19), (2, 1, 8, 8)])
def test_noise_and_loss(size, sigma_tn, F_dtype, image, layout):
    data, keywords = checks.batch(*size, dtype=image), checks.KEYS | {"sigma_tn": sigma_tn}
    found = checks.compare("triton", data, keywords, F_dtype=F_dtype, layout=layout, device="cuda")
    checks.assert_within(found, checks.GPU, F_dtype=F_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("shape", "groups"), [((4, 256, 32, 32), 32), ((2, 24, 8, 8), 6), ((2, 96, 5, 7), 24), ((1, 1536, 8, 8), 32)])  # fmt: skip
def test_group_norm_silu(dtype, last, shape, groups):
    assert_within(errors("triton", inputs(shape, last=last), groups, dtype, device="cuda"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(4, 256, 32, 32), (2, 24, 8, 8), (2, 96, 5, 7), (1, 1536, 8, 8)])
def test_residual(dtype, last, bias, scale, shape):
    made = residual_inputs(shape, bias=bias, last=last, dtype=dtype)
    on_gpu = [v if v is None else v.cuda() for v in made]
    found = results(lambda *leaves: residual(*leaves, scale=scale, impl="triton"), *on_gpu)
    assert_right([v.cpu() for v in found], made, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mode", ["down", "up", "filter"])
@pytest.mark.parametrize("shape", [(4, 256, 32, 32), (3, 3, 17, 19), (2, 24, 8, 8)])
def test_resample(shape, mode, last, dtype):
    compare("triton", shape, (1, 3, 3, 1), mode, 1, dtype=dtype, last=last, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 256, 32, 32), (3, 6, 5, 7), (3, 1030)])
def test_dropout_is_the_reference_to_the_bit(shape, dtype):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    positions, keywords = torch.arange(len(x)) + 2**40, {"p": 0.13, "seed": 2**64 - 5, "layer": 255}
    reference = dropout(x, positions, impl="reference", **keywords)
    assert torch.equal(dropout(x.cuda(), positions.cuda(), impl="triton", **keywords).cpu(), reference)


@pytest.mark.parametrize(("count", "first"), [(1, 0), (7, 4), (1001, 2**33)])
def test_words_are_the_references(count, first):
    ids, keywords = torch.tensor([5, 2**40, -1]), {"seed": 2**64 - 3, "stream": 2, "first": first}
    reference = random_words(ids, count, impl="reference", **keywords)
    assert torch.equal(random_words(ids.cuda(), count, impl="triton", **keywords).cpu(), reference)


def step(weight, affine, images, ids, flips, positions, sigma, seeds):
    keys = {"sigma_tn": 0.4, "sigma_data": 0.5, "noise_seed": seeds[0], "run_seed": seeds[1], "impl": "triton"}
    x = ambient_noise(images, ids, flips, positions, sigma, **keys).net_input
    out = group_norm_silu(F.conv2d(x, weight, padding=1), *affine, groups=1, impl="triton")
    return ambient_loss(out, images, ids, flips, positions, sigma, **keys).sum()


def test_a_cuda_graph_and_compile_give_the_eager_step():
    """Seeds are tensors, so that a replay draws new noise."""
    data = tuple(t.cuda() for t in checks.batch(4, 3, 16, 16))
    weight = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
    affine = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    seeds = torch.tensor([[5], [6]], device="cuda")

    def gradient(run):
        weight.grad = None
        loss = run(weight, affine, *data, seeds)
        loss.backward()
        return loss.detach().clone(), weight.grad.clone()

    eager = gradient(step)
    torch.testing.assert_close(gradient(torch.compile(step, fullgraph=True)), eager, rtol=1e-5, atol=1e-5)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up
        gradient(step)
    torch.cuda.current_stream().wait_stream(side)
    weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(weight, affine, *data, seeds)
        loss.backward()
    grad = weight.grad
    graph.replay()
    torch.testing.assert_close((loss.detach(), grad), eager, rtol=1e-5, atol=1e-5)
    seeds.add_(1)
    data[3].add_(64)  # the positions of the next batch
    graph.replay()
    fresh = gradient(step)
    torch.testing.assert_close((loss.detach(), grad), fresh, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fresh[0], eager[0], rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains(tmp_path, precision):
    from fastambient.training.distributed import World
    from fastambient.training.loop import train

    run = make_run(tmp_path / "r", "training.device=cuda", f"training.precision={precision}", "noise.sigma_tn=0.2")
    train(run, World(device=torch.device("cuda", 0)), resume=False)
    assert (run / "model.safetensors").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp-2m"])
def test_sampling_from_graphs_is_sampling(tmp_path, capsys, sampler, precision):
    """Both sizes of a guided batch, churn's new noise and a last smaller batch; the capture must not fall back."""
    from test_sampling import weights

    from fastambient.sampling import load, sample

    denoiser = load(weights(tmp_path / "m.safetensors", label_dim=3, label_dropout=0.1), device="cuda")
    options = {"sampler": sampler, "precision": precision, "batch": 4, "guidance": 2.0, "guidance_interval": (0.1, 10)}
    if sampler == "heun":
        options["S_churn"] = 5.0
    graphed, plain = (sample(denoiser, range(10), steps=8, graph=graph, **options).int() for graph in (True, False))
    assert "no CUDA graph" not in capsys.readouterr().err
    assert (graphed - plain).abs().max() <= (1 if precision == "fp32" else 16)
    assert plain.float().std() > 5
    assert torch.equal(graphed, sample(denoiser, range(10), steps=8, **options).int()), "a GPU takes graphs by itself"


def test_a_failed_capture_falls_back(capsys):
    from fastambient.sampling import GraphedDenoiser

    def reads_back(x, sigma, class_labels):
        return x / sigma.max().item()

    graphed = GraphedDenoiser(reads_back, (4,))
    x, sigma = torch.randn(4, 3, device="cuda"), torch.full((4,), 2.0, device="cuda")
    for _ in range(2):
        torch.testing.assert_close(graphed(x, sigma, None), x / 2)
    assert capsys.readouterr().err.count("no CUDA graph of the network") == 1
