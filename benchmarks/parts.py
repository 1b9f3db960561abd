"""What each part of the fast step gives: the trainer's step beside the same step without one part, in one run.

    python benchmarks/parts.py [--preset P] [--batch B] [--precision fp32|bf16] [--device cpu|cuda] [--parts NAME,...]
                               [--rounds N] [--json FILE] [--out DIR]

A part that is taken out is replaced by what the reference does there (`baselines.py`) or by torch's own fused pieces; all
else stays. Work is ``part PRESET PRECISION``, competitor ``without NAME``, and the ratio says how many times as long a
step takes without it. Before a time is taken, loss and gradient without the part are compared with those of the whole.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import protocol
import step_time
import torch
import torch.nn.functional as F
from baselines import REFERENCE, TORCH, FusedAdam, rearranged, two_regime_loss
from torch import Tensor, nn

from fastambient.data import Batch
from fastambient.models.blocks import BlockEmbeddings, UNetBlock
from fastambient.models.layers import Conv2d, Dropout, DropoutKey, GroupNorm
from fastambient.models.presets import PRESETS
from fastambient.training.loop import Trainer
from fastambient.training.optimizer import build_optimizer


def _contiguous(trainer: Trainer) -> None:
    for network in (trainer.network, trainer.step.network):
        network.to(memory_format=torch.contiguous_format)
    # A copy: pictures of one channel are contiguous whatever their strides, and torch then goes by the strides.
    trainer.step.network.register_forward_pre_hook(
        lambda _, given: (given[0].clone(memory_format=torch.contiguous_format), *given[1:])
    )


class _TorchDropout(Dropout):
    def forward(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        return F.dropout(x, self.p, self.training)


def _torch_dropout(trainer: Trainer) -> None:
    for module in trainer.step.network.modules():
        if type(module) is Dropout:
            module.__class__ = _TorchDropout


def _float32_leaves(trainer: Trainer) -> None:
    """Autocast casts every weight at each step, and widens its gradient."""
    step = trainer.step
    step.network = step.parallel = trainer.network
    trainer.optimizer = step.optimizer = build_optimizer(trainer.network, trainer.settings.training)


class _TorchAdam:
    """torch's fused Adam and foreach average behind what `TrainingStep` asks of AdamEMA; it has no bfloat16 leaves."""

    def __init__(self, params: Sequence[nn.Parameter], lr: float) -> None:
        self.fused, self.param_groups = FusedAdam(params, lr=lr), []
        device = params[0].device
        self.grad_norm, self.nonfinite = torch.zeros((), device=device), torch.zeros((), device=device)

    def zero_grad(self, *, set_to_none: bool) -> None:
        self.fused.optimizer.zero_grad(set_to_none=set_to_none)

    def refresh(self) -> None:
        pass

    def step(self, *, ema_betas: Sequence[Tensor]) -> None:
        self.fused.step(float(ema_betas[0]))


def _torch_adam(trainer: Trainer) -> None:
    _float32_leaves(trainer)
    trainer.step.optimizer = _TorchAdam(list(trainer.network.parameters()), trainer.settings.training.lr)  # type: ignore[assignment]


class _Formulas:
    """`TrainingStep.forward` with noise, masks, D and both losses as one writes them."""

    same_noise = False  # as ours, for comparisons; else torch's generator draws

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        step, n = self.trainer.step, self.trainer.settings.noise
        assert n.sigma_tn is not None and n.sigma_data is not None
        if self.same_noise:
            _, sigma, noises = step_time.draws(self.trainer, batch.positions)
        else:
            normal = torch.randn(len(batch.positions), device=batch.positions.device)
            sigma, noises = torch.exp(n.P_mean + n.P_std * normal), None

        def network(x: Tensor, c_noise: Tensor) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=step.settings.training.precision == "bf16"):
                return step.parallel(x, c_noise, None, None, dropout_key=(step.seed, batch.positions)).float()

        known = {"sigma_tn": n.sigma_tn, "sigma_data": n.sigma_data, "noises": noises}
        return sigma, two_regime_loss(batch.images, batch.flips, sigma, network, **known)  # type: ignore[arg-type]


def _formulas(trainer: Trainer) -> None:
    trainer.step.forward = _Formulas(trainer)  # type: ignore[method-assign]


def _layer(
    arrangement: Mapping[type[nn.Module], type[nn.Module]], *kinds: type[nn.Module]
) -> Callable[[Trainer], None]:
    def take_out(trainer: Trainer) -> None:
        rearranged(trainer.step.network, {kind: arrangement[kind] for kind in kinds})

    return take_out


PARTS: dict[str, Callable[[Trainer], None]] = {
    "channels-last": _contiguous,
    "group_norm_silu": _layer(REFERENCE, GroupNorm),
    "conv2d and resample": _layer(TORCH, Conv2d),
    "residual": _layer(TORCH, UNetBlock, BlockEmbeddings),  # and biases, and the blocks' embeddings
    "residual and attention": _layer(REFERENCE, UNetBlock, BlockEmbeddings),
    "dropout": _torch_dropout,
    "noise+loss": _formulas,
    "AdamEMA": _torch_adam,
    "bf16 leaves": _float32_leaves,  # in float32 there are none
}


def names_of(text: str) -> list[str]:
    names = text.split(",")
    if wrong := sorted(set(names) - set(PARTS)):
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not one of {', '.join(PARTS)}")
    return names


def differences(trainers: dict[str, Trainer]) -> tuple[dict[str, float], float]:
    """(largest relative difference of losses and gradient from ours, allowed), on the same noise, without dropout.

    In bfloat16 twice what ours itself is off from float32, and one rounding: docs/numerics.md.
    """
    ours = trainers["ours"]
    batch, *_ = step_time.draws(ours, torch.arange(ours.step.share, device=ours.world.device))
    _Formulas.same_noise = True
    with step_time.without_dropout(*(t.step.network for t in trainers.values()), ours.network):
        found = {
            name: step_time.results(t.step.network, lambda t=t: t.step.forward(batch)[1])
            for name, t in trainers.items()
        }
        settings, allowed = ours.step.settings, 2e-4
        if settings.training.precision == "bf16":
            ours.step.settings = replace(settings, training=replace(settings.training, precision="fp32"))
            ours.step.parallel = ours.network
            wide = step_time.results(ours.network, lambda: ours.step.forward(batch)[1])
            ours.step.settings, ours.step.parallel = settings, ours.step.network
            allowed = 2 * step_time.difference(found["ours"], wide) + 2**-8
    _Formulas.same_noise = False
    return {name: step_time.difference(found[name], found["ours"]) for name in trainers}, allowed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=PRESETS, help="network and settings (default digits)")
    parser.add_argument("--batch", type=int, help="images a step (default: 64 on a GPU, 2 to 64 on a CPU, by preset)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 where the device computes in it")
    parser.add_argument("--parts", type=names_of, default=list(PARTS), help=f"of {','.join(PARTS)} (default all)")
    protocol.arguments(parser, rounds=9, competitors=False)
    arguments = parser.parse_args()
    device, preset = arguments.device, arguments.preset
    batch = arguments.batch or step_time.usual_batch(preset, device)
    precision = arguments.precision or step_time.usual_precision(device)
    chosen = [name for name in arguments.parts if precision == "bf16" or name != "bf16 leaves"]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: step_time.make_trainer(Path(folder) / name.replace("+", "-"), preset, batch, device, precision)
            for name in ("ours", *chosen)
        }
        weights = step_time.filled(trainers["ours"].network)
        for name, trainer in trainers.items():
            step_time.load(trainer, weights)
            if name != "ours":
                PARTS[name](trainer)
        found, allowed = differences(trainers)
        for name, apart in found.items():
            if not apart <= allowed:
                sys.exit(
                    f"without {name}: loss or gradient differs by {apart:.1e}, allowed {allowed:.1e}; no time is reported"
                )

        nimg = dict.fromkeys(trainers, 0)

        def step(name: str) -> None:
            trainers[name].step(nimg[name])
            nimg[name] += batch

        works: dict[str, protocol.Work] = {
            name if name == "ours" else f"without {name}": lambda name=name: step(name) for name in trainers
        }
        times = protocol.interleave(works, rounds=arguments.rounds, device=device, seconds=240)
    agreement = {f"without {name}": value for name, value in found.items()}
    rows = protocol.rows_of(
        f"part {preset} {precision}", "ours", times, floor=None, agreement=agreement, size=f"batch {batch}"
    )
    protocol.write(rows, arguments, results=f"parts-{preset}-{precision}")


if __name__ == "__main__":
    main()
