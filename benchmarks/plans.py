"""Several plans of one model: what the planner predicts of each, and what each takes.

    python -m benchmarks.plans --work llama-8b-layers --plan 'dp=1' --plan 'dp=1 x 2'               # one device: microbatches
    python -m benchmarks.plans --work llama-8b-layers --ranks 4 --batch 16 --top 6                  # the planner's best, in 4 processes
    python -m benchmarks.plans --work llama-8b-layers --ranks 4 --batch 16 --plan 'tp=4' --plan 'dp=2 pp=2 x 4' --pins '{"zero": false}'

A `--plan` is a mesh, maybe a count of microbatches and pins of its own ('tp=2 x 4 {"zero": false}'). Step times are medians, the
optimizer with float32 masters included, as predicted; memory is the peak of what is allocated beyond what was there before, the largest
of all ranks (on the CPU it isn't counted).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import autoshard
from autoshard.api import this_machine
from autoshard.errors import AutoshardError, NoPlanError
from autoshard.mesh import Mesh
from autoshard.plan.plan import Plan
from autoshard.plan.search import search
from autoshard.runtime.comm import Comm
from autoshard.trace.capture import capture
from autoshard.trace.graph import Graph

from . import harness
from .models import build
from .peers import adamw
from .ranks import Ranks, launch
from .step import SIZES
from .tables import Table
from .works import WORKS, Work, find


@dataclass
class Candidate:
    """A plan to try; without one, why there is none."""

    label: str
    plan: Plan | None = None
    problem: str = ""


# ---- which plans ----------------------------------------------------------------------------------------------------


def asked(text: str) -> tuple[Mesh, int | None, dict[str, Any]]:
    """A plan's mesh, its count of microbatches and its own pins.

    >>> str(asked("tp=2")[0]), asked("tp=2")[1:], asked('dp=2 tp=2 x 4 {"zero": false}')[1:]
    ('pp=1 dp=1 tp=2', (None, {}), (4, {'zero': False}))
    """
    degrees, brace, pins = text.partition("{")
    mesh, _, count = degrees.partition(" x ")
    parsed = Mesh.parse(mesh)
    found = Mesh.of(dict(zip(parsed.names, parsed.sizes, strict=True)))
    return found, int(count) if count.strip() else None, json.loads(brace + pins) if brace else {}


def candidates(graph: Graph, cluster: autoshard.Cluster, a: argparse.Namespace) -> list[Candidate]:
    """Those that are named, then the planner's best of all meshes."""
    found = [planned(graph, cluster, text, a.pins) for text in a.plan]
    if not a.top:
        return found
    try:
        best = search(graph, cluster, None, None, a.pins)
    except NoPlanError as error:
        return [*found, Candidate("the planner's best", problem=str(error).splitlines()[0])]
    found.append(Candidate(f"{best.mesh} x {best.microbatches}", best))
    rows = sorted((row for row in best.runners_up if row.get("fits") and "step_seconds" in row), key=lambda row: row["step_seconds"])
    # found as the search found them: it divides nothing for the mesh's sake
    pins = {"divide": False, **a.pins}
    found += [planned(graph, cluster, f"{row['mesh']} x {row['microbatches']}", pins) for row in rows[: a.top - 1]]
    return found


def planned(graph: Graph, cluster: autoshard.Cluster, text: str, pins: dict[str, Any]) -> Candidate:
    mesh, count, own = asked(text)
    try:
        plan = search(graph, cluster, mesh, count, {**pins, **own})
    except AutoshardError as error:
        return Candidate(text, problem=str(error).splitlines()[0])
    return Candidate(" ".join([str(mesh), f"x {plan.microbatches}", *([json.dumps(own)] if own else [])]), plan)


# ---- what each takes ------------------------------------------------------------------------------------------------


class Trial:
    """Plans of one work, on these ranks. Rank 0 plans; the others learn what it found as they lower it."""

    def __init__(self, a: argparse.Namespace, work: Work, ranks: Ranks) -> None:
        self.a, self.work, self.ranks, self.device = a, work, ranks, ranks.device
        self.model, self.dtype = a.model or work.models[0], getattr(torch, a.dtype)
        self.comm = Comm(ranks.device)
        self.batch: dict[str, Any] = work.batch(0, self.device, self.dtype)

    def candidates(self) -> list[Candidate]:
        found: list[Candidate] = []

        def plan() -> str:
            if self.ranks.rank:
                return ""
            model = build(self.model, self.work.shape, self.dtype, self.device)
            cluster = autoshard.Cluster.load(self.a.cluster) if self.a.cluster else this_machine(self.comm)
            found.extend(candidates(capture(model, (), self.batch).graph, cluster, self.a))
            return json.dumps([[c.label, c.plan.to_yaml() if c.plan else None, c.problem] for c in found])

        text = self.comm.share(self.comm.together(plan))
        return [Candidate(label, Plan.from_yaml(plan) if plan else None, problem) for label, plan, problem in json.loads(text)]

    def measure(self, plan: Plan) -> dict[str, Any]:
        memory = harness.Memory(self.device)
        model = build(self.model, self.work.shape, self.dtype, self.device)
        sharded = autoshard.parallelize(model, str(plan.mesh), kwargs=self.batch, plan=plan, compile=self.a.compile, device=self.device)
        model.to("meta")
        optimizer = sharded.optimizer(torch.optim.AdamW, **adamw(self.device))
        losses: list[torch.Tensor] = []

        def step() -> None:
            losses.append(sharded.train_step(**self.batch).detach())
            optimizer.step()
            optimizer.zero_grad()

        step()
        memory.restart()
        seconds = self.ranks.most(harness.in_turns({"": step}, self.a.steps, self.device)[""])
        stage = plan.mesh.coords(self.ranks.rank).get("pp", 0)
        mine = [0.0] * (2 * self.ranks.size)
        mine[self.ranks.rank], mine[self.ranks.size + self.ranks.rank] = memory.peak(), plan.predicted["memory_bytes"][stage]
        peaks = self.ranks.most(mine)
        return {"all_ms": [s * 1e3 for s in seconds], "ms": harness.median(seconds) * 1e3, "loss": float(losses[0]),
                "peak_bytes": peaks[: self.ranks.size], "predicted_peak_bytes": peaks[self.ranks.size :]}  # fmt: skip

    def row(self, candidate: Candidate) -> dict[str, Any]:
        row: dict[str, Any] = {"label": candidate.label, "problem": candidate.problem}
        plan = candidate.plan
        if plan is None:
            return row
        row |= {"mesh": str(plan.mesh), "microbatches": plan.microbatches, "schedule": plan.schedule, "notes": plan.notes}
        row |= {"predicted_ms": plan.predicted["step_seconds"] * 1e3, "predicted": plan.predicted}
        try:
            row |= self.measure(plan)
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {str(error).strip()[:400]}"
        if not self.ranks.all(not row["problem"]):
            row["problem"] = row["problem"] or "failed on another rank"
        torch._dynamo.reset()
        harness.collect()
        return row


# ---- what is said of them -------------------------------------------------------------------------------------------


def judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Errors of the predictions, and whether they order the plans as the measurements do."""
    done = [row for row in rows if not row["problem"]]
    for row in done:
        row["time_error"] = row["predicted_ms"] / row["ms"] - 1
        largest = max(row["peak_bytes"])
        row["memory_error"] = max(row["predicted_peak_bytes"]) / largest - 1 if largest else None
    times = [row["time_error"] for row in done]
    memory = [row["memory_error"] for row in done if row["memory_error"] is not None]
    found: dict[str, Any] = {
        "mean_time_error": float(np.mean(np.abs(times))) if times else None,
        "mean_memory_error": float(np.mean(np.abs(memory))) if memory else None,
        "rank_correlation": rank_correlation([r["predicted_ms"] for r in done], [r["ms"] for r in done]),
    }
    if done:
        best, chosen = min(r["ms"] for r in done), min(done, key=lambda r: r["predicted_ms"])
        found["chosen_over_best"] = chosen["ms"] / best
        found["loss_spread"] = max(r["loss"] for r in done) - min(r["loss"] for r in done)
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, ties by their mean rank.

    >>> rank_correlation([1, 2, 3], [10, 30, 20])
    0.5
    """
    if len(a) < 2:
        return math.nan
    x, y = _places(a), _places(b)
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread else math.nan


def _places(values: Sequence[float]) -> np.ndarray:
    given = np.asarray(values, dtype=float)
    return np.array([(given < v).sum() + ((given == v).sum() - 1) / 2 for v in given], dtype=float)


def table(title: str, rows: Sequence[dict[str, Any]], judged: dict[str, Any]) -> Table:
    found = Table(title, ["plan", "predicted ms", "ms", "error %", "predicted GiB", "GiB", "error %", "loss", ""])
    for row in rows:
        if row["problem"]:
            found.rows.append([row["label"], row.get("predicted_ms"), *[None] * 6, row["problem"].splitlines()[0][:70]])
            continue
        gib = [max(row[key]) / 2**30 for key in ("predicted_peak_bytes", "peak_bytes")]
        errors = [None if row[key] is None else 100 * row[key] for key in ("time_error", "memory_error")]
        times = [row["predicted_ms"], row["ms"], errors[0]]
        found.rows.append([row["label"], *times, gib[0], gib[1] or None, errors[1], f"{row['loss']:.4f}", row["schedule"]])
    words = {"mean_time_error": "mean error of time", "mean_memory_error": "of memory"}
    said = [f"{what} {100 * judged[key]:.1f} %" for key, what in words.items() if judged[key] is not None]
    found.notes.append(", ".join([*said, f"rank correlation {judged['rank_correlation']:.2f}"]))
    if "chosen_over_best" in judged:
        found.notes.append(f"the plan predicted fastest takes {judged['chosen_over_best']:.3f} × the time of the fastest")
        found.notes.append(f"losses of the first step differ by {judged['loss_spread']:.2g}")
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="llama-8b-layers", choices=WORKS, metavar="NAME", help=f"of {', '.join(WORKS)}")
    for name in SIZES:
        p.add_argument(f"--{name}", type=int, help="instead of the work's")
    p.add_argument("--tiny", action="store_true", help="as small as the work's structure permits, for trying out")
    p.add_argument("--model", choices=["plain", "hf"], help="default: the work's first")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--ranks", type=int, help="processes (default: the work's)")
    p.add_argument(
        "--plan", action="append", default=[], metavar="MESH [x COUNT] [PINS]", help="a plan to try, as 'dp=2 tp=2 x 4'; again for more"
    )
    p.add_argument("--top", type=int, help="the planner's best so many (default: 4, if no --plan is given)")
    p.add_argument("--pins", type=json.loads, default={}, help="decisions to hold fixed, as JSON")
    p.add_argument("--cluster", help="what to plan for: a file or a catalogue name (default: this machine)")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="run graphs as they are")
    p.add_argument("--steps", type=int, default=8, help="timed steps")
    p.add_argument("--results", default=str(harness.RESULTS), help="folder of the record; empty: none")
    a = p.parse_args(argv)
    a.top = (0 if a.plan else 4) if a.top is None else a.top
    return a


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    a = arguments(argv)
    work = find(a.work, {name: getattr(a, name) for name in SIZES}, a.tiny)
    count = a.ranks or (asked(a.plan[0])[0].ranks if a.plan else work.ranks)
    code = launch("benchmarks.plans", sys.argv[1:] if argv is None else argv, count, a.device)
    if code is not None:
        sys.exit(code)
    ranks = Ranks.here(a.device)
    with contextlib.ExitStack() as leaving:
        leaving.callback(ranks.leave)
        trial = Trial(a, replace(work, mesh=f"dp={count}"), ranks)
        found = run(trial)
    return found


def run(trial: Trial) -> dict[str, Any]:
    a, ranks, work = trial.a, trial.ranks, trial.work
    record = functools.partial(harness.record, f"plans-{work.name}-{trial.model}", device=ranks.device, folder=Path(a.results))
    path, rows, found = None, [], {}
    for candidate in trial.candidates():
        rows.append(trial.row(candidate))
        ranks.say(f"{candidate.label}: {rows[-1]['problem'] or '{:.1f} ms'.format(rows[-1]['ms'])}")
        found = {"work": work.name, "model": trial.model, "ranks": ranks.size, "pins": a.pins, **judge(rows), "rows": rows}
        if ranks.rank == 0 and a.results:
            path = record(content=found, path=path)
    if rows:
        table(f"{work.name} ({trial.model}) on {ranks.size}", rows, judge(rows)).show(ranks.say)
    if path:
        ranks.say(f"written to {path}")
    return found


if __name__ == "__main__":
    main()
