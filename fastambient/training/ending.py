"""How a run came to its end, and how it is given a later one."""

from __future__ import annotations

from pathlib import Path

from fastambient.errors import InputError
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
