"""The settings of a run: one tree of frozen dataclasses, the same in presets, YAML files, ``--set`` and checkpoints.

Names are EDM's where EDM has one. ``None`` means "follows from the data or from another setting", and is filled in
before the run starts, so that config.yaml holds no unknown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastambient.data.downloads import CACHE_GB
from fastambient.diffusion.ambient import default_sigma_tn
from fastambient.errors import InputError, check_seed, did_you_mean, nearest_beside
from fastambient.models.presets import PRESETS, default_preset
from fastambient.sampling import SamplingSettings, check_sampling

PREVIEW_IMAGES = 64  # in a grid of samples while training


@dataclass(frozen=True)
class DataSettings:
    source: str = "digits"  # SOURCE or STORE
    resolution: int | None = None  # pixels; None: the source's own
    train: int | None = None  # training images; None: all that are not held out (digits: 100)
    holdout: int | None = None  # held-out images; None: 10 %, 2 to 10,000 (digits: all that do not train)
    split_seed: int = 0
    noisy: Literal["none", "float16", "float32"] = "none"  # precomputed noised copy; none: regenerated every step
    on_bad_image: Literal["error", "skip"] = "error"
    xflip: bool = False  # mirror half of the draws, together with their noise
    use_labels: bool = False  # train a class-conditional model
    clean: str | None = None  # STORE of clean images beside a hand-out
    stream: bool = False  # train from the tar shards that `source` names, without a store
    window: int = 8  # shards whose images are mixed, when streaming; another number is another order
    shard_index: str | None = None  # shards.json of the stream; None: beside the shards
    cache: str | None = None  # folder for downloaded shards; None: the user's folder for caches
    cache_gb: float = CACHE_GB  # how large it may become, in 10^9 bytes
    loader: Literal["auto", "resident", "dali", "workers"] = "auto"  # changes no number of a run
    workers: int | None = None  # processes of a rank that read (dali, workers); None: by processors, and as it pays


@dataclass(frozen=True)
class ModelSettings:
    preset: str | None = None  # None: by resolution
    model_type: Literal["SongUNet", "DhariwalUNet"] = "SongUNet"
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)  # per resolution, times model_channels
    channel_mult_emb: int = 4
    num_blocks: int = 4  # residual blocks per resolution
    attn_resolutions: tuple[int, ...] = (16,)  # pixels
    dropout: float = 0.10  # probability
    label_dropout: float = 0.0  # probability of hiding the class
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: tuple[int, ...] = (1, 1)


@dataclass(frozen=True)
class NoiseSettings:
    sigma_tn: float | None = None  # noise level of the training set; 0: plain EDM; None: 1.5*R/64
    sigma_data: float | None = None  # None: measured from the training images
    P_mean: float = -1.2  # ln sigma ~ N(P_mean, P_std^2)
    P_std: float = 1.2
    weighting: Literal["paper", "unit"] = "paper"
    regime: Literal["both", "ambient"] = "both"  # ambient: sigma >= sigma_tn alone, for a hand-out without clean images
    mode: Literal["fixed", "fresh"] = "fixed"  # fresh: new noise at every draw, an ablation that undoes the method


@dataclass(frozen=True)
class TrainingSettings:
    kimg: float = 1000.0  # length of the run, in thousands of images
    batch: int = 64  # images an optimizer step, over all ranks
    batch_gpu: int | None = None  # images a rank takes at once; None: its whole share
    lr: float = 1e-3
    lr_rampup_kimg: float = 0.0
    ema_halflife_kimg: float = 500.0
    ema_rampup_ratio: float | None = 0.05  # half-life at most this share of the images seen; None: no ramp
    checkpoint_levels: int = 0  # highest resolutions whose blocks are computed anew in the backward pass: less memory
    optimizer: Literal["adam", "adamw", "apex"] = "adam"  # apex: Adam by NVIDIA's FusedAdam, on CUDA
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # adam, apex: coupled (L2), adamw: decoupled
    precision: Literal["fp32", "bf16"] = "fp32"
    cuda_graph: Literal["auto", "on", "off"] = "auto"  # a step as one CUDA graph; on: says so where there is none
    compile: Literal["auto", "on", "off"] = "auto"  # blocks by torch.compile; auto: off, until it is seen to pay
    seed: int = 0  # of initialisation, data order, sigma and fresh noise
    augment: float = 0.0  # probability of each of EDM's geometric augmentations, clean regime only
    augment_ambient: Literal["none", "reference"] = "none"  # reference: also in the ambient regime, which leaks
    checkpoint_kimg: float | None = None  # None: a tenth of the run, at most 500
    keep_checkpoints: int = 3
    sample_kimg: float | None = None  # a grid of samples this often; 0: never; None: as checkpoint_kimg
    audit_kimg: float | None = (
        None  # audit this often; 0: never; None: never, with stop_when_copying a tenth of the run
    )
    stop_when_copying: float | None = None  # end when an audit's copy rate exceeds its control's by more than this
    device: Literal["cpu", "cuda"] = "cpu"  # set by --gpus
    ranks: int = 1  # set by --gpus or --processes; the numbers of a run do not depend on it


@dataclass(frozen=True)
class EvaluationSettings:
    num: int = 1000  # samples
    audit_num: int = 256  # samples of an audit while training
    audit_features: str = "pixel"  # embedder of an audit's Frechet distance: any that `features` may be, but none
    threshold: float = 1 / 3  # gap ratio below which a sample counts as a copy
    bootstrap: int = 1000  # resamples of the 95 % interval
    seed: int = 0  # of the bootstrap
    flips: bool = False  # search mirrored training images, too
    features: str = "efficientnet-lite0"  # embedder of similarity and quality, or PATH.pt; none: pixels alone
    weights: str | None = None  # file with the embedder's weights; None: where they are looked for
    preprocess: Literal["standard", "paper"] = "standard"  # paper: DINOv2 at native size, as in Shah et al. (2025)


@dataclass(frozen=True)
class Settings:
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def tree(self) -> dict[str, dict[str, Any]]:
        """Plain sections of plain values, as YAML and JSON hold them."""
        plain = dataclasses.asdict(self)
        return {
            s: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} for s, values in plain.items()
        }

    def with_values(self, tree: Mapping[str, Any], *, where: str) -> Settings:
        """A copy with the values of a (partial) tree, each checked against its type.

        Raises
        ------
        InputError : unknown section or name (with the nearest ones), or a value of the wrong type
        """
        if not isinstance(tree, Mapping):
            raise InputError(f"{where}: expected sections of settings, got {type(tree).__name__}")
        changed = {}
        for section, values in tree.items():
            if section not in _SECTIONS:
                raise InputError(f"{where}: unknown section {section!r}{did_you_mean(str(section), _SECTIONS)}")
            current = getattr(self, section)
            types_of = typing.get_type_hints(type(current))
            if not isinstance(values, Mapping):
                raise InputError(f"{where}: section {section} must hold name: value pairs, got {values!r}")
            new = {}
            for name, value in values.items():
                if name not in types_of:
                    known = did_you_mean(str(name), types_of)
                    raise InputError(f"{where}: unknown setting {section}.{name}{known}")
                new[name] = _coerce(value, types_of[name], f"{where}: {section}.{name}")
            changed[section] = dataclasses.replace(current, **new)
        return dataclasses.replace(self, **changed)

    def with_assignments(self, assignments: Iterable[str]) -> Settings:
        """A copy with ``section.name=value`` strings applied; values are read as YAML."""
        settings = self
        for text in assignments:
            key, equals, raw = text.partition("=")
            section, dot, name = key.strip().partition(".")
            if not (equals and dot and name):
                raise InputError(f"--set {text!r}: expected section.name=value, such as training.lr=2e-4")
            try:
                value = yaml.safe_load(raw)
            except yaml.YAMLError:
                raise InputError(f"--set {text!r}: the value is no YAML") from None
            settings = settings.with_values({section: {name: value}}, where="--set")
        return settings


_SECTIONS = [f.name for f in dataclasses.fields(Settings)]


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` as the annotated type: the few kinds that the tree uses, no more."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(value, next(o for o in options if o is not type(None)), where)
    if origin is Literal:
        if isinstance(value, bool) and "on" in options:  # YAML 1.1 reads a bare on and off as true and false
            value = "on" if value else "off"
        if value not in options:
            raise InputError(f"{where} must be one of {', '.join(map(str, options))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} must be a list such as [1, 2], got {value!r}")
        return tuple(_coerce(v, options[0], where) for v in value)
    if kind is float:
        # YAML 1.1 reads 1e-3 (no dot) as text; people write it all the time.
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, kind):
        return value
    raise InputError(f"{where} must be {_KINDS[kind]}, got {value!r}")


_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings tree of a YAML file."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the settings file {path}: {reason}{nearest_beside(path)}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections of settings, got {type(tree).__name__}")
    return tree


def resolve(
    *,
    resolution: int,
    preset: str | None = None,
    layers: Iterable[tuple[str, Mapping[str, Any]]] = (),
    assignments: Iterable[str] = (),
) -> Settings:
    """Defaults, then the preset, then `layers` of (where it comes from, tree), then ``--set``; nothing left open but
    what only the data can tell (sigma_data, split sizes)."""
    layers, assignments = list(layers), list(assignments)
    # --set model.preset=NAME is a preset as well, and wins as every --set does.
    assigned = Settings().with_assignments(assignments).model.preset
    if assigned is not None:
        preset = assigned
    for _, tree in layers:
        section = tree.get("model") if isinstance(tree, Mapping) else None
        if preset is None and isinstance(section, Mapping) and isinstance(section.get("preset"), str):
            preset = section["preset"]
    name = preset or default_preset(resolution)
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    settings = Settings().with_values(PRESETS[name], where=f"preset {name}")
    for where, tree in layers:
        settings = settings.with_values(tree, where=where)
    settings = settings.with_values({"model": {"preset": name}, "data": {"resolution": resolution}}, where="preset")
    settings = settings.with_assignments(assignments)
    t = settings.training
    if settings.noise.sigma_tn is None:
        settings = settings.with_values({"noise": {"sigma_tn": default_sigma_tn(resolution)}}, where="default")
    checkpoint = min(t.kimg / 10, 500.0) if t.checkpoint_kimg is None else t.checkpoint_kimg
    audit = t.audit_kimg
    if audit is None:
        audit = 0.0 if t.stop_when_copying is None else t.kimg / 10
    filled = {
        "checkpoint_kimg": checkpoint,
        "sample_kimg": checkpoint if t.sample_kimg is None else t.sample_kimg,
        "audit_kimg": audit,
    }
    settings = settings.with_values({"training": filled}, where="default")
    check(settings)
    return settings


def check_sigma_tn(sigma_tn: float, sigma_max: float = SamplingSettings.sigma_max) -> None:
    """The command line takes 0 (plain EDM) up to sigma_max; above it nothing would ever be ambient."""
    if not 0 <= sigma_tn <= sigma_max:
        raise InputError(f"sigma_tn must lie between 0 (plain EDM) and sigma_max = {sigma_max:g}, got {sigma_tn:g}")


def check(settings: Settings) -> None:
    """Ranges that types cannot say. Raises InputError naming the setting, its value and what was expected."""
    n, t, s, e = settings.noise, settings.training, settings.sampling, settings.evaluation

    def need(ok: bool, name: str, value: object, expected: str) -> None:
        if not ok:
            raise InputError(f"{name} must be {expected}, got {value}")

    def finite(name: str, value: float, *, above: float | None = None, least: float | None = None) -> None:
        if above is not None:
            need(math.isfinite(value) and value > above, name, value, f"above {above:g}")
        else:
            need(math.isfinite(value) and (least is None or value >= least), name, value, f"{least or 0:g} or more")

    check_sigma_tn(n.sigma_tn or 0.0 if n.sigma_tn == n.sigma_tn else math.nan, s.sigma_max)
    if n.sigma_data is not None:
        finite("noise.sigma_data", n.sigma_data, above=0)
    finite("noise.P_std", n.P_std, above=0)
    need(math.isfinite(n.P_mean), "noise.P_mean", n.P_mean, "finite")
    d = settings.data
    need(d.train is None or d.train >= 1, "data.train", d.train, "1 or more")
    need(d.holdout is None or d.holdout >= 0, "data.holdout", d.holdout, "0 or more")
    check_seed("data.split_seed", d.split_seed)
    need(d.window >= 1, "data.window", d.window, "1 or more")
    finite("data.cache_gb", d.cache_gb, above=0)
    need(d.workers is None or d.workers >= 1, "data.workers", d.workers, "1 or more")
    need(math.isfinite(t.kimg) and t.kimg * 1000 >= 1, "training.kimg", t.kimg, "0.001 (one image) or more")
    need(t.batch >= 1, "training.batch", t.batch, "1 or more")
    need(t.batch_gpu is None or t.batch_gpu >= 1, "training.batch_gpu", t.batch_gpu, "1 or more")
    most = len(settings.model.channel_mult)
    need(
        0 <= t.checkpoint_levels <= most, "training.checkpoint_levels", t.checkpoint_levels,
        f"between 0 and {most}, the number of resolutions in the network",
    )  # fmt: skip
    finite("training.lr", t.lr, above=0)
    finite("training.lr_rampup_kimg", t.lr_rampup_kimg, least=0)
    finite("training.ema_halflife_kimg", t.ema_halflife_kimg, least=0)
    need(
        t.ema_rampup_ratio is None or t.ema_rampup_ratio > 0, "training.ema_rampup_ratio", t.ema_rampup_ratio, "above 0"
    )
    need(0 <= t.beta1 < 1 and 0 <= t.beta2 < 1, "training.beta1/beta2", (t.beta1, t.beta2), "in [0, 1)")
    finite("training.eps", t.eps, above=0)
    finite("training.weight_decay", t.weight_decay, least=0)
    if t.optimizer == "apex" and t.device == "cpu":
        raise InputError("training.optimizer apex runs on CUDA alone and training.device is cpu; use adam")
    need(0 <= t.augment <= 1, "training.augment", t.augment, "a probability in [0, 1]")
    if t.augment > 0 and t.augment_ambient == "reference" and settings.data.noisy != "none" and n.mode == "fixed":
        raise InputError(  # the copy was noised unaugmented, so that ambient draws would stay as they are
            f"training.augment_ambient reference noises augmented images anew, data.noisy {settings.data.noisy} holds"
            " noised ones; use data.noisy none"
        )
    check_seed("training.seed", t.seed)
    need(t.ranks >= 1, "training.ranks", t.ranks, "1 or more")
    need(t.keep_checkpoints >= 1, "training.keep_checkpoints", t.keep_checkpoints, "1 or more")
    finite("training.checkpoint_kimg", t.checkpoint_kimg or 0, above=0)
    finite("training.sample_kimg", t.sample_kimg or 0, least=0)
    finite("training.audit_kimg", t.audit_kimg or 0, least=0)
    if t.stop_when_copying is not None:
        rule = "training.stop_when_copying (--stop-when-copying)"
        need(0 <= t.stop_when_copying < 1, rule, t.stop_when_copying, "a rate in [0, 1), 0.05 for 5 %")
        need(t.audit_kimg != 0, "training.audit_kimg (--audit-every)", t.audit_kimg, "above 0 with --stop-when-copying")
    for name, p in (("dropout", settings.model.dropout), ("label_dropout", settings.model.label_dropout)):
        need(0 <= p < 1, f"model.{name}", p, "a probability in [0, 1)")
    check_sampling(s)
    need(e.bootstrap >= 1, "evaluation.bootstrap", e.bootstrap, "1 or more")
    need(e.seed >= 0, "evaluation.seed", e.seed, "0 or more")
    need(e.num >= 2, "evaluation.num", e.num, "2 or more")
    need(e.audit_num >= 2, "evaluation.audit_num", e.audit_num, "2 or more")
    need(e.audit_features != "none", "evaluation.audit_features (--audit-features)", "none", "pixel or a network")
    need(0 < e.threshold < 1, "evaluation.threshold", e.threshold, "between 0 and 1")


def network_config(settings: Settings, *, channels: int, num_classes: int) -> dict[str, Any]:
    """Arguments of `fastambient.models.build` for these settings and a data set's shape."""
    tree = settings.tree()
    model = {k: v for k, v in tree["model"].items() if k != "preset"}
    if model["model_type"] == "DhariwalUNet":  # SongUNet's own
        for name in ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter"):
            del model[name]
    return model | {
        "img_resolution": settings.data.resolution,
        "img_channels": channels,
        "label_dim": num_classes if settings.data.use_labels else 0,
        "augment_dim": 9 if settings.training.augment > 0 else 0,
    }
