"""Numbers of a training run → a JSONL file, TensorBoard, Weights & Biases. The names are torchtitan's, so that its readers read ours.

In: losses, norms and seconds of steps (`Meter`). Out: one dict of `NAMES` per log. Sinks are imported when asked for.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import ConfigError, DataError
from ..plan.prices import flops

if TYPE_CHECKING:
    from ..config import Metrics
    from ..plan.cluster import DeviceType
    from ..trace.graph import Graph

NAMES = {
    "loss_metrics/global_avg_loss": "mean loss of the steps since the last log (each the whole batch's, over all ranks)",
    "loss_metrics/global_max_loss": "the largest of them",
    "grad_norm": "the gradient's global norm before clipping, of the last step",
    "lr": "learning rate of the last step",
    "throughput(tps)": "tokens a second and device",
    "tflops": "10**12 operations of the model a second and device",
    "mfu(%)": "that, as a part of the device's peak",
    "n_tokens_seen": "tokens trained on since the beginning",
    "time_metrics/end_to_end(s)": "seconds a step",
    "time_metrics/data_loading(s)": "of these, waiting for data",
    "time_metrics/data_loading(%)": "that, as a part",
    "memory/max_active(GiB)": "most memory in live tensors (on CUDA; else the process's peak)",
    "memory/max_active(%)": "that, as a part of the device's memory",
    "memory/max_reserved(GiB)": "most memory that the allocator held (on CUDA; else the process's peak)",
    "memory/max_reserved(%)": "that, as a part of the device's memory",
    "memory/num_alloc_retries": "times that the allocator had to free and try again",
    "memory/num_ooms": "times that it failed",
    "skipped_steps": "steps skipped so far because the loss or the gradient wasn't finite (ours)",
    "validation_metrics/loss": "mean loss of held-out text",
    "validation_metrics/throughput(tps)": "tokens of it a second and device",
    "validation_metrics/memory/max_active(GiB)": "as memory/..., since the last metrics",
    "validation_metrics/memory/max_active(%)": "that, as a part of the device's memory",
    "validation_metrics/memory/max_reserved(GiB)": "as memory/..., since the last metrics",
    "validation_metrics/memory/max_reserved(%)": "that, as a part of the device's memory",
}
"""Every name that is written, and what it means."""


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One object a line, appended. `after`: where a run resumes; lines of later steps, which are about to be run again, go."""

    def __init__(self, path: str | Path, after: int | None) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut(after)
            self.file = open(self.path, "a" if after is not None else "w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"can't write metrics to {self.path}: {error.strerror or error}") from error

    def _cut(self, after: int | None) -> None:
        if after is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text("utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line cut short by a crash
            if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= after:
                kept.append(line + "\n")
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text("".join(kept), "utf-8")
        os.replace(fresh, self.path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN
        plain = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **plain}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """`after`: where a run resumes; TensorBoard hides what an earlier writer had of later steps."""

    def __init__(self, folder: str, after: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "metrics.tensorboard needs the package tensorboard, which isn't installed",
                hint="pip install tensorboard, or metrics.tensorboard: null",
            ) from error
        try:
            self.writer: Any = SummaryWriter(folder, purge_step=None if after is None else after + 1)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise ConfigError(f"can't write metrics to {folder}: {error.strerror or error}") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """`run`: the id of the run that a resumed one goes on with (W&B keeps what it has of steps that come again)."""

    def __init__(self, project: str, config: Mapping[str, Any], run: str | None) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise ConfigError(
                "metrics.wandb needs the package wandb, which isn't installed", hint="pip install wandb, or metrics.wandb: null"
            ) from error
        resumed = {} if run is None else {"id": run, "resume": "allow"}
        try:
            self.run: Any = wandb.init(project=project, config=dict(config), **resumed)
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases doesn't start: {error}", hint="wandb login, or WANDB_MODE=offline, or metrics.wandb: null"
            ) from error

    @property
    def id(self) -> str:
        return str(self.run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def open_sinks(wanted: Metrics, config: Mapping[str, Any], after: int | None, run: str | None = None) -> list[Sink]:
    """What a config asks for. `after`, `run`: the step and the W&B run that are resumed. Raises ConfigError where a package is missing
    or a file can't be written."""
    sinks: list[Sink] = []
    try:
        if wanted.file:
            sinks.append(JsonLines(wanted.file, after))
        if wanted.tensorboard:
            sinks.append(TensorBoard(wanted.tensorboard, after))
        if wanted.wandb:
            sinks.append(Wandb(wanted.wandb, config, run))
    except BaseException:
        for sink in sinks:
            sink.close()
        raise
    return sinks


def read(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a metrics file. Raises DataError."""
    try:
        return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"can't read metrics from {path}: {error}") from error


def model_flops(graph: Graph) -> float:
    """Operations of one forward and backward of a graph: recomputation doesn't count, as MFU has it."""
    total = 0.0
    for op in graph.ops:
        work = flops(op, graph.values)
        if work:
            trained = sum(graph.values[name].grad for name in op.inputs[:3]) if any(graph.values[o].grad for o in op.outs) else 0
            total += work * (1 + min(trained, 2))
    return total


@dataclass
class Meter:
    """Collects steps between two logs. `flops`: of a whole step; `tokens`: of a step; `ranks`: devices that share both."""

    flops: float
    tokens: int
    ranks: int
    device: torch.device
    kind: DeviceType
    dtype: str
    losses: list[float] = field(default_factory=list)
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def step(self, loss: float, waited: float) -> None:
        self.losses.append(loss)
        self.waited += waited

    def pause(self, seconds: float) -> None:
        """Time that isn't training's (evaluation, checkpoints)."""
        self.since += seconds

    def evaluated(self, loss: float, batches: int, seconds: float) -> dict[str, float]:
        """What `NAMES` says of an evaluation."""
        memory = {f"validation_metrics/{name}": value for name, value in self._memory().items() if "max" in name}
        speed = self.tokens * batches / max(seconds, 1e-9) / self.ranks
        return {"validation_metrics/loss": loss, "validation_metrics/throughput(tps)": speed, **memory}

    def values(self, seen: int, norm: float, rate: float, skipped: int) -> dict[str, float]:
        """What `NAMES` says, of the steps since the last call. `seen`: tokens since the beginning."""
        now, count = time.perf_counter(), max(len(self.losses), 1)
        each = max(now - self.since, 1e-9) / count
        tflops = self.flops / each / self.ranks / 1e12
        found = {
            "loss_metrics/global_avg_loss": sum(self.losses) / count,
            "loss_metrics/global_max_loss": max(self.losses, key=lambda x: math.inf if math.isnan(x) else x, default=math.nan),
            "grad_norm": norm,
            "lr": rate,
            "throughput(tps)": self.tokens / each / self.ranks,
            "tflops": tflops,
            "mfu(%)": 100 * tflops * 1e12 / self.kind.peak_flops(self.dtype),
            "n_tokens_seen": float(seen),
            "time_metrics/end_to_end(s)": each,
            "time_metrics/data_loading(s)": self.waited / count,
            "time_metrics/data_loading(%)": 100 * self.waited / count / each,
            "skipped_steps": float(skipped),
            **self._memory(),
        }
        self.losses, self.waited, self.since = [], 0.0, now
        return found

    def _memory(self) -> dict[str, float]:
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)
            active, reserved = stats.get("active_bytes.all.peak", 0), stats.get("reserved_bytes.all.peak", 0)
            whole = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            import resource

            stats = {}
            active = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            whole = int(self.kind.memory)
        return {
            "memory/max_active(GiB)": active / 2**30,
            "memory/max_active(%)": 100 * active / whole,
            "memory/max_reserved(GiB)": reserved / 2**30,
            "memory/max_reserved(%)": 100 * reserved / whole,
            "memory/num_alloc_retries": float(stats.get("num_alloc_retries", 0)),
            "memory/num_ooms": float(stats.get("num_ooms", 0)),
        }
