"""The command line: `autoshard plan | train | checkpoint | doctor`.

In: a command line. Out: an exit code (0 ok, 1 a bug of ours with its traceback, 2 a wrong command line, an AutoshardError's own code,
130 interrupted). Nothing but typer is imported before a command runs, so that help is quick; each command imports what it needs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Sequence

import typer

from ..errors import AutoshardError
from . import checkpoint, doctor, plan, train

INTERRUPTED = 130

app = typer.Typer(
    name="autoshard",
    help="Plan and train plain PyTorch transformers on many devices.",
    epilog="Exit codes: 0 ok, 1 a bug (with its traceback), 2 wrong usage, 3 a mistake in what was given, 4 no plan fits, "
    "5 a checkpoint is refused, 6 a rank died or hangs, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.add_typer(checkpoint.app, name="checkpoint")
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    """Plan and train plain PyTorch transformers on many devices."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"autoshard {installed('autoshard')}")
        raise typer.Exit


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; its exit code. Errors of ours become one message; anything else keeps its traceback (raised)."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="autoshard")
    except AutoshardError as error:
        if not (error.elsewhere or getattr(error, "quiet", False)):  # the rank that it happened on tells it
            typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _broken_pipe()
    except SystemExit as end:
        return _finish(end.code)
    return _finish(0)


def _finish(code: object) -> int:
    """Flush now, where a reader who has gone can still be told from a bug."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _broken_pipe()
    return code if isinstance(code, int) else int(bool(code))


def _broken_pipe() -> int:
    """The reader (`| head`) has what it wants. Python flushes stdout once more at exit: give it somewhere to go."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    return 0


def main() -> None:
    code = run()
    if code and "RANK" in os.environ:
        # a rank that fails leaves its communicators as they are, and tearing them down with the interpreter may abort the process
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
