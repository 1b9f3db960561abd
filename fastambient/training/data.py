"""What a run trains on: the rows of its store, or of a hand-out and a clean store."""

from __future__ import annotations

from functools import partial

from fastambient.data.mixed import HandOutRows
from fastambient.data.rows import SizedRows, StoreRows
from fastambient.data.store import Store
from fastambient.diffusion.edm import draw_sigma
from fastambient.errors import InputError
from fastambient.training.config import Settings


def check_hand_out(settings: Settings, store: Store) -> None:
    """InputError where these settings cannot train on this store."""
    d, n = settings.data, settings.noise
    if not store.hand_out:
        if d.clean is not None:
            raise InputError(f"--clean {d.clean}: {store.path} holds clean images itself; leave --clean out")
        if n.regime == "ambient":
            raise InputError(
                f"--regime ambient is for a store that was handed out; {store.path} holds clean images: leave it out"
            )
        return
    if d.clean is None and n.regime == "both":
        raise InputError(
            f"{store.path} was handed out: it holds images noised at sigma_tn {store.sigma_tn:g} alone, and below that"
            " level a model is trained on clean ones. Pass --clean STORE with clean images of your own, or --regime"
            " ambient to train the levels from sigma_tn on alone (its samples stop at sigma_tn)"
        )
    if d.clean is not None and n.regime == "ambient":
        raise InputError("--regime ambient trains no level that needs clean images: leave --clean out, or --regime")
    if n.mode != "fixed":
        raise InputError(f"noise.mode {n.mode}: the noise of a hand-out is in its images")
    if settings.training.augment_ambient != "none":
        raise InputError("training.augment_ambient reference needs clean images, which a hand-out has not")


def open_clean(settings: Settings) -> Store | None:
    """The store of clean images beside a hand-out. InputError where it is none."""
    if settings.data.clean is None:
        return None
    clean = Store.open(settings.data.clean)
    if clean.hand_out:
        raise InputError(f"--clean {clean.path} was handed out, too: it holds no clean image")
    return clean


def training_rows(settings: Settings, store: Store, clean: Store | None, noise_seed: int) -> SizedRows:
    """What the loader draws from.

    Raises
    ------
    InputError : a noised copy that is not there, or clean images unlike those handed out
    """
    n, seed = settings.noise, settings.training.seed
    if not store.hand_out:
        return StoreRows(store.train, seed=seed, use_noisy=settings.data.noisy != "none" and n.mode == "fixed")
    assert n.sigma_tn is not None
    return HandOutRows(
        store.train, None if clean is None else clean.train, seed=seed, sigma_tn=n.sigma_tn, noise_seed=noise_seed,
        sigma_of=partial(draw_sigma, seed=seed, P_mean=n.P_mean, P_std=n.P_std), labelled=settings.data.use_labels,
    )  # fmt: skip
