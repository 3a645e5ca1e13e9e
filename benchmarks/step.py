"""One training step, ours beside our peers': same weights, same data, one run.

    python -m benchmarks.step --work llama-8b-layers
    python -m benchmarks.step --work llama-8b-layers-12-tp2             # starts its two ranks itself
    python -m benchmarks.step --work llama-1.2b --model plain --layers 4 --impl 'ours,ours[microbatches=2],plain-eager'

A step is forward, backward, fused AdamW and zero_grad. `--impl` names implementations (`peers`), with options in brackets; without it,
ours and the work's own peers. The first stays; each of the others runs its first steps (losses, peak memory, compile time), is timed alone,
then in turns with the first if both fit into memory, and is let go. Ratios are of times taken in turns. What is missing here or fails is
reported, and the others go on. FLOPs are the model's, attention counted causally; the floor (`ceilings`) is measured in the same run.
Exits with 1 if losses part, or if ours ran anything that wasn't compiled; the record is written all the same, after each implementation.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ceilings, harness, peers
from .peers import Absent, Made, Spec, Task
from .peers.ours import uncompiled
from .ranks import Ranks, launch
from .summary import check, ratios, table
from .works import WORKS, Batch, Work, find

SIZES = ("layers", "hidden", "ffn", "heads", "kv", "vocab", "seq", "batch")


@dataclass
class Run:
    """One implementation, and what was found of it. `problem`: why there is nothing to find."""

    spec: Spec
    made: Made | None = None
    problem: str = ""
    ready: float = 0.0
    first: float = 0.0
    losses: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    """In turns with the first implementation: its own steps, and the first one's."""
    held: int = 0
    peak: int = 0
    compiled: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        if self.problem:
            return {"problem": self.problem}
        seconds = harness.median(self.seconds or self.alone)
        return {
            "ms": seconds * 1e3,
            "alone_ms": harness.median(self.alone) * 1e3,
            "tflops_per_device": self.facts["flops_per_device"] / seconds / 1e12,
            "tokens_per_s_per_device": self.facts["tokens_per_device"] / seconds,
            "peak_gib": self.peak / 2**30,
            "held_gib": self.held / 2**30,
            "ready_s": self.ready,
            "first_step_s": self.first,
            "losses": self.losses,
            "all_ms": [s * 1e3 for s in self.seconds],
            "relative": harness.median(self.seconds) / harness.median(self.beside) if self.beside else None,
            "compiled": self.compiled,
            **self.facts,
        }


class Benchmark:
    """The run of one work. `record` is what has been found so far."""

    def __init__(self, a: argparse.Namespace, work: Work, ranks: Ranks) -> None:
        self.a, self.work, self.ranks = a, work, ranks
        self.model, self.dtype, self.device = a.model or work.models[0], getattr(torch, a.dtype), ranks.device
        self.batch = work.batch(0, self.device, self.dtype)
        self.compared = [work.batch(i % 2, self.device, self.dtype, few=True) for i in range(a.losses)]
        self.runs: list[Run] = []
        self.floors: dict[str, ceilings.Floor] = {}
        self.path: Path | None = None
        self.finished = False

    def run(self) -> dict[str, Any]:
        say = self.ranks.say
        say(f"{self.work.name}: {self.model} {self.dtype} {asdict(self.work.shape)}, {self.work.mesh}, on {harness.machine(self.device)}")
        for spec in self.a.impl:
            run = Run(spec)
            self.runs.append(run)
            self.attempt(run)
            if run.problem:
                say(f"{spec}: {run.problem}")
            else:
                losses = ", ".join(f"{x:.4f}" for x in run.losses)
                say(f"{spec}: ready {run.ready:.1f} s, first {run.first:.1f} s, {run.summary()['ms']:.1f} ms, losses {losses}")
            if run is not self.first:
                run.made = None
                harness.collect()
            self.write()
        for run in self.runs:
            run.made = None
        harness.collect()
        self.floor()
        self.finished = True
        return self.write()

    # ---- one implementation -----------------------------------------------------------------------------------------

    @property
    def first(self) -> Run | None:
        return next((run for run in self.runs if not run.problem), None)

    def attempt(self, run: Run) -> None:
        """Measure one implementation. What fails is noted."""
        memory = harness.Memory(self.device)
        try:
            self.measure(run, memory)
        except Absent as reason:
            run.problem = f"absent: {reason}"
        except Exception as error:
            run.problem = f"failed: {type(error).__name__}: {str(error).strip()[:600]}"
            if self.ranks.rank == 0:
                traceback.print_exception(error, limit=-12, file=sys.stderr)
        if not self.ranks.all(not run.problem):
            run.problem = run.problem or "failed on another rank"
        elif run is not self.first:
            self.turns(run, memory)

    def measure(self, run: Run, memory: harness.Memory) -> None:
        harness.forget_counters()
        task = Task(self.work, self.model, self.dtype, self.ranks, run.spec.options)
        start = time.perf_counter()
        made = run.made = peers.make(run.spec, task)
        run.ready = time.perf_counter() - start
        data = [made.prepare(self.cut(made, batch)) for batch in self.compared]
        losses: list[Tensor] = []
        run.first = harness.timed(lambda: losses.append(made.step(data[0])), self.device)
        run.held = memory.held()
        memory.restart()
        losses += [made.step(each) for each in data[1:]]
        run.losses = [self.ranks.mean(float(loss)) if made.shared else float(loss) for loss in losses]
        batch = made.prepare(self.cut(made, self.batch))
        run.alone = harness.in_turns({"": functools.partial(made.step, batch)}, self.a.steps, self.device)[""]
        run.peak = memory.peak()
        if run.spec.ours:
            run.compiled = {**harness.compiled(), **uncompiled(made, batch)}
        elif "compile" in run.spec.name:
            run.compiled = harness.compiled()
        run.alone = self.ranks.most(run.alone)
        run.peak, run.held = (int(x) for x in self.ranks.most([run.peak, run.held]))
        run.facts = {**self.facts(run.spec, made), "coarse": losses[0].dtype == torch.bfloat16}

    def cut(self, made: Made, batch: Batch) -> Batch:
        """The part of a batch that an implementation of another work takes."""
        return {name: tensor[: made.work.shape.batch] for name, tensor in batch.items()}

    def facts(self, spec: Spec, made: Made) -> dict[str, Any]:
        work = made.work
        return {
            "devices": made.devices,
            "flops_per_device": work.flops / made.devices,
            "tokens_per_device": work.shape.tokens / made.devices,
            "same_work": work.name == self.work.name and work.shape == self.work.shape,
            "precise": made.precise,
            "noisy": bool(work.shape.dropout),
            "floor": self.share(made),
            "bubble": work.bubble if made.devices == work.ranks and spec.ours else 1.0,
            "plan": _plan(made),
        }

    def share(self, made: Made) -> str:
        """Name of the floor that a device's share of this implementation's work has."""
        if made.devices == self.work.ranks:
            return self.work.mesh
        return f"{made.work.name} on one device"

    def turns(self, run: Run, memory: harness.Memory) -> None:
        """Time it and the first in turns, if there is room for both (the steps themselves follow each other)."""
        first = self.first
        assert first is not None and first.made is not None and run.made is not None
        if not self.ranks.all(memory.free() > 1.3 * (first.peak - first.held)):
            return
        steps = [functools.partial(r.made.step, r.made.prepare(self.cut(r.made, self.batch))) for r in (first, run) if r.made]
        try:
            beside, mine = harness.in_turns(dict(enumerate(steps)), self.a.steps, self.device).values()
        except torch.OutOfMemoryError as error:
            self.ranks.say(f"{run.spec}: not in turns: {error}")
            return
        run.seconds, run.beside = self.ranks.most(mine), self.ranks.most(beside)
        first.seconds = first.seconds + run.beside

    # ---- all of them ------------------------------------------------------------------------------------------------

    def floor(self) -> None:
        """Measure what each needs to be compared with."""
        if not self.a.floor:
            return
        wanted = {self.work.mesh: self.work.parts()}
        for run in self.runs:
            if run.facts and run.facts["floor"] not in wanted:
                alone = self.work.half() if not run.facts["same_work"] else replace(self.work, mesh="dp=1")
                wanted[run.facts["floor"]] = alone.parts()
        try:
            self.floors = {name: ceilings.measure(parts, self.device, self.dtype) for name, parts in wanted.items()}
        except Exception as error:
            self.ranks.say(f"no floor: {type(error).__name__}: {error}")

    def write(self) -> dict[str, Any]:
        found = {str(run.spec): run.summary() for run in self.runs}
        for row in found.values():
            if (floor := self.floors.get(row.get("floor", ""))) is not None:
                row["times_floor"] = row["ms"] / (floor.seconds * 1e3)
        content = {
            "work": self.work.name, "about": self.work.about, "shape": asdict(self.work.shape), "model": self.model,
            "dtype": str(self.dtype).removeprefix("torch."), "mesh": self.work.mesh, "microbatches": self.work.count,
            "flops": self.work.flops, "runs": found, "ratios": ratios(found), "problems": check(found, self.dtype),
            "floors": {name: floor.asdict() for name, floor in self.floors.items()}, "finished": self.finished,
        }  # fmt: skip
        if self.ranks.rank == 0 and self.a.results:
            name = f"step-{self.work.name}-{self.model}"
            self.path = harness.record(name, content, self.device, Path(self.a.results), self.path)
        return content


def _plan(made: Made) -> str:
    if made.sharded is None:
        return ""
    plan = made.sharded.plan
    return f"{plan.mesh}, {plan.microbatches} microbatches, {plan.schedule}, predicted {plan.predicted['step_seconds'] * 1e3:.1f} ms"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="llama-1.2b", choices=WORKS, metavar="NAME", help=f"of {', '.join(WORKS)}")
    for name in SIZES:
        p.add_argument(f"--{name}", type=int, help="instead of the work's")
    p.add_argument("--tiny", action="store_true", help="as small as the work's structure permits, for trying out")
    p.add_argument("--model", choices=["plain", "hf"], help="the model as one writes it, or Hugging Face's (default: the work's first)")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--impl", help=f"of {', '.join(peers.names())} (default: ours and the work's peers)")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--steps", type=int, default=8, help="timed steps")
    p.add_argument("--losses", type=int, default=4, help="first steps, whose losses are compared")
    p.add_argument("--no-floor", dest="floor", action="store_false", help="don't measure the work's floor")
    p.add_argument("--results", default=str(harness.RESULTS), help="folder of the record; empty: none")
    a = p.parse_args(argv)
    work = WORKS[a.work]
    if a.model and a.model not in work.models:
        p.error(f"{work.name} is there as {' and '.join(work.models)}, not {a.model}")
    try:
        a.impl = peers.parse(a.impl or ",".join(("ours", "ours-masters", *work.peers)))
    except ValueError as error:
        p.error(str(error))
    return a


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    a = arguments(argv)
    work = find(a.work, {name: getattr(a, name) for name in SIZES}, a.tiny)
    code = launch("benchmarks.step", sys.argv[1:] if argv is None else argv, work.ranks, a.device)
    if code is not None:
        sys.exit(code)
    ranks = Ranks.here(a.device)
    try:
        benchmark = Benchmark(a, work, ranks)
        found = benchmark.run()
        table(found).show(ranks.say)
        for floor in benchmark.floors:
            benchmark.floors[floor].table(f"the floor of {work.name}, {floor}").show(ranks.say)
        if benchmark.path:
            ranks.say(f"written to {benchmark.path}")
    finally:
        ranks.leave()
    return found


if __name__ == "__main__":
    sys.exit(1 if main()["problems"] else 0)
