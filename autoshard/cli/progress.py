"""What a person sees of a run: a progress bar on a terminal, a line per log elsewhere. Only the first rank speaks."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..runtime.trainer import Summary, Watcher

if TYPE_CHECKING:
    from ..config import Config


class Progress(Watcher):
    def __init__(self, config: Config, quiet: bool) -> None:
        self.console = Console(highlight=False, quiet=quiet, width=None if sys.stdout.isatty() else 140)
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = Bar(*columns, console=self.console, disable=quiet or not self.console.is_terminal)
        self.task = self.bar.add_task("training", total=config.run.steps, loss=float("nan"), visible=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def start(self, step: int) -> None:
        self.bar.update(self.task, completed=step, visible=True)
        self.bar.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def step(self, step: int, loss: float) -> None:
        self.bar.update(self.task, completed=step, loss=loss)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        if "validation_metrics/loss" in values:
            self.say(f"step {step:6d}  held-out loss {values['validation_metrics/loss']:.4f}")
            return
        self.say(
            f"step {step:6d}  loss {values['loss_metrics/global_avg_loss']:.4f}  norm {values['grad_norm']:.3f}  "
            f"lr {values['lr']:.2e}  {values['throughput(tps)']:,.0f} tokens/s a rank  mfu {values['mfu(%)']:.1f} %"
        )

    def end(self, summary: Summary) -> None:
        skipped = f", {summary.skipped} skipped" if summary.skipped else ""
        if summary.stopped:
            self.say(f"stopped after step {summary.step}{skipped}; --resume goes on")
            return
        held = "" if summary.evaluation is None else f", held-out loss {summary.evaluation:.4f}"
        self.say(f"done: {summary.step} steps{skipped}{held}")
