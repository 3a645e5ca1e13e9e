"""The training loop: steps, metrics, evaluation, checkpoints, and when to stop.

In: a `Sharded` with its program, a `Config`, batches. Out: a `Summary`, the same on every rank. A step whose loss or gradient norm isn't
finite is skipped on every rank, as both numbers are the whole batch's; SIGTERM ends the run after the step that it finds, on all ranks
after the same one.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import math
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import AutoshardError, CheckpointError, ConfigError
from . import checkpoint
from .comm import Comm
from .data import Batches
from .metrics import Meter, Sink, Wandb, model_flops, open_sinks
from .module import Sharded

if TYPE_CHECKING:
    from ..config import Config
    from ..plan.cluster import DeviceType

log = logging.getLogger("autoshard")
OPTIONS = {"initial_lr": "learning rate", "betas": "betas", "eps": "eps", "weight_decay": "weight decay"}
"""Options of AdamW that a config decides, and what they are called."""


class NonFiniteError(AutoshardError, ArithmeticError):
    """Too many steps in a row whose loss or gradient isn't finite."""


@dataclass
class Summary:
    """How a run ended. `losses`: those of the steps that this process ran. `stopped`: by SIGTERM, before the last step."""

    step: int
    losses: list[float] = field(default_factory=list)
    evaluation: float | None = None
    skipped: int = 0
    stopped: bool = False


class Watcher:
    """Hears of what happens, on the first rank: the command line's progress bar. This one is silent."""

    def say(self, text: str) -> None:
        pass

    def step(self, step: int, loss: float) -> None:
        pass

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass


def rate(step: int, config: Config) -> float:
    """The part of the peak learning rate at a step, from 0: a linear warm-up, then what `schedule.kind` says."""
    schedule, steps = config.schedule, config.run.steps
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = min(1.0, (step - schedule.warmup) / max(1, steps - schedule.warmup))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule.kind]
    return schedule.floor + (1 - schedule.floor) * left if schedule.kind != "constant" else 1.0


class Trainer:
    """One rank of a run. `kind`: the device that MFU is of."""

    def __init__(
        self, sharded: Sharded, config: Config, batches: Batches, held_out: Batches | None, kind: DeviceType, watcher: Watcher | None = None
    ) -> None:
        self.sharded, self.config, self.batches, self.held_out, self.kind = sharded, config, batches, held_out, kind
        self.comm, self.first = sharded.comm, sharded.comm.rank == 0
        self.watcher = watcher if watcher is not None and self.first else Watcher()
        sharded.manual_seed(config.run.seed)
        self.optimizer = sharded.optimizer(
            torch.optim.AdamW,
            groups=_groups(config, [path for path, owner in sharded.owner.items() if path == owner]),
            masters=config.optimizer.masters,
            lr=config.optimizer.lr,
            betas=tuple(config.optimizer.betas),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate(step, config))
        self.step = self.skipped = self.in_a_row = self.saved = 0
        self.wandb: str | None = None
        self.meter = self._meter()
        self.told_to_stop = False

    # ---- checkpoints ----------------------------------------------------------------------------------------------------

    def begin(self, resume: bool) -> None:
        """Resume from the newest whole checkpoint (`claim` says whether there is one), or start anew. What the config says of the
        optimizer and the schedule holds from here on, whatever it was before. Raises CheckpointError, DataError."""
        folder = self.config.checkpoints.folder
        if not resume or not folder:
            return
        wanted = [{key: group[key] for key in OPTIONS} for group in self.optimizer.param_groups]
        restored = self.sharded.load(folder, scheduler=self.scheduler)
        self.batches.restore(restored.data)
        self.step = self.saved = restored.step
        self.skipped = int(restored.extra.get("skipped", 0))
        run = restored.extra.get("wandb")
        self.wandb = run if isinstance(run, str) and re.fullmatch(r"[\w.-]{1,128}", run) else None
        self.watcher.say(f"resumed from {restored.path}, step {restored.step}")
        self._change(wanted)
        batch = restored.data.get("batch", self.batches.batch)
        if batch != self.batches.batch:
            self.watcher.say(f"data.batch is {self.batches.batch} from here on, it was {batch}")
        if self.step >= self.config.run.steps:
            self.watcher.say(f"nothing is left to train: run.steps is {self.config.run.steps}")

    def _change(self, wanted: Sequence[Mapping[str, Any]]) -> None:
        """Set the optimizer's options, after a checkpoint brought its own."""
        said = set()
        for group, options in zip(self.optimizer.param_groups, wanted, strict=True):
            for key, value in options.items():
                if group[key] != value and str(group[key]) != str(value):
                    said.add(f"the optimizer's {OPTIONS[key]} is {value} from here on, it was {group[key]}")
                group[key] = value
            group["lr"] = group["initial_lr"] * rate(self.step, self.config)
        for text in sorted(said):
            self.watcher.say(text)
        self.scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def save(self) -> None:
        checkpoints = self.config.checkpoints
        if not checkpoints.folder or self.saved == self.step:
            return
        path = self.sharded.save(
            checkpoints.folder, step=self.step, scheduler=self.scheduler, data=self.batches.state(),
            extra={"skipped": self.skipped, "wandb": self.wandb}, keep=checkpoints.keep, wait=not checkpoints.background,
        )  # fmt: skip
        self.saved = self.step
        self.watcher.say(f"{'writing' if checkpoints.background else 'saved'} {path}")

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Train to the end. Raises NonFiniteError."""
        summary = Summary(self.step)
        sinks = self.comm.together(self._sinks)
        self.wandb = next((sink.id for sink in sinks if isinstance(sink, Wandb)), self.wandb)
        self.meter = meter = self._meter()
        try:
            with self._stoppable():
                while self.step < self.config.run.steps and not summary.stopped:
                    norm, used = self._train_step(meter, summary)
                    self._report(meter, sinks, norm, used)
                    summary.stopped = self._stop()
                    self._between(meter, sinks, summary)
            if summary.evaluation is None and not summary.stopped:
                summary.evaluation = self.evaluate(sinks)
            if (path := self.sharded.saved()) is not None:
                self.watcher.say(f"saved {path}")
        finally:
            for sink in sinks:
                with contextlib.suppress(OSError):  # what couldn't be written was told
                    sink.close()
        summary.step, summary.skipped = self.step, self.skipped
        return summary

    def _train_step(self, meter: Meter, summary: Summary) -> tuple[float, float]:
        """One step. The gradient's norm, and the learning rate."""
        began = time.perf_counter()
        batch: dict[str, Any] = self.comm.together(lambda: next(self.batches)) if self.step == 0 else next(self.batches)
        waited = time.perf_counter() - began
        used = float(self.scheduler.get_last_lr()[-1])
        loss = float(self.sharded.train_step(**batch))
        norm = float(self.sharded.clip_grad_norm_(self.config.optimizer.clip or math.inf))
        self.step += 1
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self.watcher.say(f"step {self.step} is skipped: loss {loss}, gradient norm {norm} ({self.in_a_row} in a row)")
        self.optimizer.zero_grad()
        self.scheduler.step()
        summary.losses.append(loss)
        meter.step(loss, waited)
        self.watcher.step(self.step, loss)
        if self.in_a_row >= self.config.run.max_nonfinite:
            raise _once(
                self.comm,
                NonFiniteError(
                    f"{self.in_a_row} steps in a row up to step {self.step} had a loss or a gradient that isn't finite",
                    hint="lower optimizer.lr, lengthen schedule.warmup, or look at the data; earlier checkpoints are whole",
                ),
            )
        return norm, used

    def _report(self, meter: Meter, sinks: Sequence[Sink], norm: float, used: float) -> None:
        if self.step % self.config.run.log_every and self.step not in (1, self.config.run.steps):
            return
        values = meter.values(self.batches.tokens_seen, norm, used, self.skipped)
        self._write(sinks, values)

    def _write(self, sinks: Sequence[Sink], values: dict[str, float]) -> None:
        """Metrics that can't be written (the disk is full) don't end a run."""
        for sink in sinks:
            try:
                sink.write(self.step, values)
            except OSError as error:
                self.watcher.say(f"step {self.step}: metrics can't be written: {error.strerror or error}")
        self.watcher.metrics(self.step, values)

    def _between(self, meter: Meter, sinks: Sequence[Sink], summary: Summary) -> None:
        """What happens after a step, and isn't training's time."""
        began, config = time.perf_counter(), self.config
        last = self.step == config.run.steps
        if config.evaluation.every and self.step % config.evaluation.every == 0 and not summary.stopped:
            found = self.evaluate(sinks)
            summary.evaluation = found if last else None
        due = bool(config.checkpoints.every) and self.step % config.checkpoints.every == 0
        if due or last or summary.stopped:
            self.save()
        meter.pause(time.perf_counter() - began)

    def evaluate(self, sinks: Sequence[Sink] = ()) -> float | None:
        """The mean loss of held-out batches, the same ones each time; None where nothing is held out."""
        if self.held_out is None:
            return None
        self.held_out.taken = [0] * len(self.held_out.streams)
        began, count, total = time.perf_counter(), self.config.evaluation.batches, 0.0
        for _ in range(count):
            batch: dict[str, Any] = next(self.held_out)
            total += float(self.sharded.eval_step(**batch))
        values = self.meter.evaluated(total / count, count, time.perf_counter() - began)
        self._write(sinks, values)
        return total / count

    # ---- parts ----------------------------------------------------------------------------------------------------------

    def _sinks(self) -> list[Sink]:
        return open_sinks(self.config.metrics, asdict(self.config), self.step or None, self.wandb) if self.first else []

    def _meter(self) -> Meter:
        program, data = self.sharded.program, self.config.data
        assert program is not None
        work = model_flops(program.graph) * program.microbatches
        dtypes = [v.tensor.dtype for v in program.graph.sources("param")]
        common = max(set(dtypes), key=dtypes.count, default="float32")
        return Meter(work, data.batch * data.seq, self.comm.size, self.comm.device, self.kind, common)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """SIGTERM sets a flag, for as long as the loop runs."""

        def told(number: int, frame: Any) -> None:
            self.told_to_stop = True

        before = signal.signal(signal.SIGTERM, told)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _stop(self) -> bool:
        """Whether any rank was told to stop: all must stop after the same step."""
        mine = torch.tensor([int(self.told_to_stop)], device=self.comm.device)
        stop = bool(int(self.comm.all_reduce(mine, "max")))
        if stop:
            self.watcher.say(f"told to stop: ending after step {self.step}")
        return stop


def claim(folder: str | None, comm: Comm, resume: bool) -> bool:
    """Whether there is a checkpoint to resume from; before anything costly is made, and the folder is one that can be written. Raises
    ConfigError where starting anew would mix with another run's checkpoints, CheckpointError where all that are there are damaged."""
    if not folder:
        if resume:
            raise _once(comm, ConfigError("there is nothing to resume from: checkpoints.folder isn't set"))
        return False
    found = comm.share(comm.together(lambda: _found(folder) if comm.rank == 0 else ""))
    if found and not resume:
        hint = "--resume goes on from them; or give another checkpoints.folder"
        raise _once(comm, ConfigError(f"{folder} has checkpoints already, {found} the latest", hint=hint))
    checkpoint.prepare(folder, comm)
    return bool(found)


def _found(folder: str) -> str:
    """The name of the newest checkpoint, "" where there is none. Raises CheckpointError where none is whole."""
    there = checkpoint.folder.steps(Path(folder))
    whole = checkpoint.newest(folder) if there else None
    if there and whole is None:
        raise CheckpointError(
            f"none of its {len(there)} checkpoints is whole", where=folder, hint="autoshard checkpoint verify says what is wrong; "
            "to start anew, move them away or give another checkpoints.folder",
        )  # fmt: skip
    return whole.name if whole else ""


def _once(comm: Comm, error: AutoshardError) -> AutoshardError:
    """An error that all ranks raise alike, and the first tells."""
    error.elsewhere = comm.rank != 0
    return error


def _groups(config: Config, names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Name patterns with their options: the config's own groups, then what has no weight decay."""
    groups: list[tuple[str, dict[str, Any]]] = []
    for group in config.optimizer.groups:
        options = {"lr": group.lr, "weight_decay": group.weight_decay}
        groups.append((group.match, {k: v for k, v in options.items() if v is not None}))
    for pattern in config.optimizer.no_decay:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            groups.append((pattern, {"weight_decay": 0.0}))
    return groups


__all__ = ["NonFiniteError", "Summary", "Trainer", "Watcher", "claim", "rate"]
