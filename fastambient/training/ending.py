"""How a run came to its end, how it is given a later one, and how another goes on where it ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fastambient.errors import InputError
from fastambient.files import write_bytes, write_json
from fastambient.training import checkpoint
from fastambient.training.config import Settings, check
from fastambient.training.run import RunFolder
from fastambient.training.stopping import how_to_resume


def finished(run: RunFolder, settings: Settings) -> str:
    """How a run came to its end, in words: by its length, or by the stop rule. "" where it goes on when resumed."""
    state = checkpoint.last_state(run.checkpoints)
    if state is None or not run.weights.is_file() or state.get("audit_owed"):
        return ""
    if state.get("ended") == "copying":
        rate = settings.training.stop_when_copying
        return f"stopped at {state['nimg'] / 1000:g} kimg, where copying exceeded the control by more than {rate:.3g}"
    return f"{settings.training.kimg:g} kimg" if state["nimg"] >= settings.training.kimg * 1000 else ""


def set_length(run: RunFolder, kimg: float) -> None:
    """Give a run another length, also one that is finished: no other setting follows from the length, so the numbers
    are those of a run that was this long from the start. Its figures are of its old weights until it is evaluated.

    Raises
    ------
    InputError : a length that it already has behind it, or a run that its stop rule ended
    """
    settings = run.read_settings()
    state = checkpoint.last_state(run.checkpoints) or {}
    trained = state.get("nimg", 0) / 1000
    if state.get("ended") == "copying":
        raise InputError(f"--kimg {kimg:g}: {run.path} was ended by --stop-when-copying, it does not go on")
    if not kimg > trained:  # not a number, too
        raise InputError(f"--kimg {kimg:g}: {run.path} has trained {trained:g} kimg; name its whole length, above that")
    longer = settings.with_values({"training": {"kimg": kimg}}, where="--kimg")
    check(longer)
    run.write_settings(longer)


def how_to_extend(path: Path, settings: Settings) -> str:
    """For a run that reached its length."""
    if (checkpoint.last_state(RunFolder(path).checkpoints) or {}).get("ended") == "copying":
        return ""
    return f"; for a longer one: {how_to_resume(path).partition(': ')[2]} --kimg {2 * settings.training.kimg:g}"


def go_on_from(run: RunFolder, stopped: RunFolder) -> bool:
    """Let `run`, which has not begun, go on where the finished run `stopped` ended, rather than train the same again.

    Its numbers are then those of a run of its own, since neither audits nor the stop rule touch training's: the two
    must agree in every other setting, and in the seed of fixed noise. begun.json says what was taken over.

    Returns
    -------
    bool : False, and nothing is written, where the runs differ, `run` has begun, or `stopped` is not there or finished
    """
    if not stopped.config.is_file():
        return False
    settings, there = run.read_settings(), stopped.read_settings()
    alike = _without_rule(settings) == _without_rule(there) and run.read_noise_seed() == stopped.read_noise_seed()
    if not alike or checkpoint.checkpoints(run.checkpoints) or not finished(stopped, there):
        return False
    found = checkpoint.load_latest(stopped.checkpoints)
    assert found is not None  # it is finished
    tensors, state = found
    sizes = dict(state["log_sizes"])
    if settings.training.audit_kimg != there.training.audit_kimg:
        sizes["audits"] = 0
    for name, size in sizes.items():
        if size:
            write_bytes(run.path / f"{name}.jsonl", (stopped.path / f"{name}.jsonl").read_bytes()[:size])
    if stopped.tensorboard.is_dir():
        shutil.copytree(stopped.tensorboard, run.tensorboard, dirs_exist_ok=True)
    write_json(run.begun, {"run": stopped.path.name, "nimg": state["nimg"], "seconds": state["seconds"]})
    state = {k: v for k, v in state.items() if k not in ("nimg", "format_version")}  # last: with it, the run has begun
    keep = settings.training.keep_checkpoints
    checkpoint.save(run.checkpoints, found[1]["nimg"], tensors, state | {"log_sizes": sizes, "ended": None}, keep=keep)
    return True


def seconds_taken_over(run: RunFolder) -> float:
    """Of the run that this one went on from; 0 where it was trained from its start."""
    return float(json.loads(run.begun.read_text())["seconds"]) if run.begun.is_file() else 0.0


def _without_rule(settings: Settings) -> dict[str, dict[str, Any]]:
    tree = settings.tree()
    for name in ("audit_kimg", "stop_when_copying"):
        del tree["training"][name]
    return tree
