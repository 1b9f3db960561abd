"""The command line: parse, call one function, print. No logic lives here.

A module a group of commands; long, because every option is declared there with its help.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import typer

from fastambient.cli import machine, measuring, sampling, training
from fastambient.errors import FastambientError

app = typer.Typer(
    name="fastambient",
    help="Train diffusion models that copy their training set less, and measure by how much.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

_COMMANDS = (
    training.prepare, training.train, sampling.sample, measuring.evaluate, measuring.audit, measuring.sweep,
    machine.plan, machine.info, training.quickstart,
)  # fmt: skip
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(measuring.figure, name="figure")


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM outside the training loop unwinds like Ctrl-C, so that temporary folders vanish."""
    raise SystemExit(128 + signum)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors are one line on stderr; exit code 2 for bad input, 1 for a failure, 130/143 for a signal."""
    signal.signal(signal.SIGTERM, _terminate)
    _wait_politely()
    # A library says what each operator took; a command says what is slow, in one line (options.py, training/notes.py).
    os.environ.setdefault("FASTAMBIENT_QUIET", "1")
    try:
        code = app(args=arguments, standalone_mode=False)
    except FastambientError as error:
        _complain(str(error), plain=error.exit_code > 2)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        _complain(f"{error.filename or ''}{': ' if error.filename else ''}{error.strerror or error}")
        code = 1
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())  # type: ignore[attr-defined]  # the help, which is no one line
            code = 2
        elif hasattr(error, "format_message"):
            _complain(error.format_message())  # the parser's own: unknown option, missing argument, bad number
            code = 2
        elif "FASTAMBIENT_TRACEBACK" in os.environ:
            raise
        else:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            _complain(f"unexpected {what}; please report it, with what FASTAMBIENT_TRACEBACK=1 shows")
            code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _wait_politely() -> None:
    """Where other programs want the CPUs, OpenMP's waiting threads should sleep: spinning, they take the time that the
    thread they wait for needs, and a step takes ten times as long beside one other job. With the CPUs to itself a run
    is faster spinning. Read when torch loads OpenMP, so before the first import of torch."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > cpus / 4 and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100")


def _complain(message: str, *, plain: bool = False) -> None:
    text = " ".join(message.split())
    print(text if plain else f"error: {text}", file=sys.stderr, flush=True)
