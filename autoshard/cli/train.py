"""`autoshard train`: a config → a trained model, on one process, under torchrun, or on processes that it starts itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..config import Config

EXAMPLES = """[bold]Examples[/bold]

autoshard train examples/train.yaml --nproc 2

autoshard train examples/train.yaml --nproc 4 --set run.steps=1000 --set optimizer.lr=1e-3

autoshard train examples/train.yaml --nproc 4 --resume

torchrun --nnodes 8 --nproc-per-node 8 ... -m autoshard train config.yaml --resume

autoshard train --print-config > config.yaml
"""


def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; --print-config shows what may stand in it.", show_default=False)
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override one key, as a.b=value; may be given again.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint, if there is one.")] = False,
    nproc: Annotated[int | None, typer.Option(min=1, max=1024, help="Start so many processes here; not under torchrun.")] = None,
    restarts: Annotated[int, typer.Option(min=0, help="With --nproc: how often to start all again when one dies.")] = 0,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the config with all defaults and comments, and exit.")
    ] = False,
) -> None:
    """Train a plain model on all ranks, with the plan that is fastest for them.

    Every fault of the config is told at once, with file, line and column, before anything starts. SIGTERM ends the run after the step
    that it finds, with a checkpoint; --resume goes on with exactly what would have come.
    """
    from ..config import load, to_yaml

    overrides = list(set_ or [])
    if config is None:
        if print_config:
            sys.stdout.write(to_yaml())
            return
        raise typer.BadParameter("give a config (--print-config writes one to start from)", param_hint="CONFIG")
    read = load(config, overrides)
    if print_config:
        sys.stdout.write(to_yaml(read))
        return
    ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if nproc is not None and nproc > 1 and not ranked:
        raise typer.Exit(_start(config, overrides, resume, nproc, restarts))
    _work(read, resume)


def _start(config: Path, overrides: list[str], resume: bool, nproc: int, restarts: int) -> int:
    """Run `nproc` processes of this command under torch's launcher; the exit code of the first that fails."""
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the ranks say themselves what went wrong; the launcher's own account of it is for who asks
    if "TORCHELASTIC_LOG" not in os.environ:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=f"autoshard{os.getpid()}",
        max_restarts=restarts, monitor_interval=0.1,
    )  # fmt: skip
    command = [
        "-m",
        "autoshard",
        "train",
        str(config),
        *(part for o in overrides for part in ("--set", o)),
        *(["--resume"] if resume else []),
    ]
    try:
        elastic_launch(launch, entrypoint=sys.executable)(*command)
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        return failure.exitcode if failure.exitcode > 0 else 6
    except Exception as error:
        # the launcher's own, for a signal that it passed on: the ranks have finished their step and saved
        if type(error).__name__ != "SignalException":
            raise
        import signal

        return 130 if getattr(error, "sigval", None) == signal.SIGINT else 0
    return 0


def _work(config: Config, resume: bool) -> None:
    """One rank of the run."""
    import logging
    import warnings

    import torch.distributed as dist

    from .progress import Progress
    from .setup import assemble

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler")  # a first step that is skipped
    rank = int(os.environ.get("RANK", 0))
    resume = resume or (bool(config.checkpoints.folder) and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
    with Progress(config, quiet=rank != 0) as progress:
        trainer = assemble(config, resume, progress)
        progress.start(trainer.step)
        summary = trainer.run()
    progress.end(summary)
    if dist.is_initialized():
        dist.destroy_process_group()
