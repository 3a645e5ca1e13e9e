"""Where the time of a step goes: kernels by kind, communication behind computation and exposed, idle time; ours beside peers.

    python -m benchmarks.profile --work llama-8b-layers --impl ours,plain-compile,megatron

Each implementation runs `--steps` steps under torch.profiler after some that warm it up. Written for each: a chrome trace (open it in
ui.perfetto.dev), and in the record its breakdown and its busiest kernels; printed: one table, and Markdown for documents. Of several ranks,
the first one's. On the CPU operators stand for kernels, as there is nothing else to see.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import harness, peers, traces
from .peers import Absent, Spec, Task
from .ranks import Ranks, launch
from .step import SIZES
from .tables import Table
from .works import WORKS, Work, find


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    a = arguments(argv)
    work = find(a.work, {name: getattr(a, name) for name in SIZES}, a.tiny)
    code = launch("benchmarks.profile", sys.argv[1:] if argv is None else argv, work.ranks, a.device)
    if code is not None:
        sys.exit(code)
    ranks = Ranks.here(a.device)
    try:
        return run(a, work, ranks)
    finally:
        ranks.leave()


def run(a: argparse.Namespace, work: Work, ranks: Ranks) -> dict[str, Any]:
    model = a.model or work.models[0]
    folder = Path(a.results)
    found: dict[str, Any] = {"work": work.name, "model": model, "mesh": work.mesh, "steps": a.steps, "runs": {}}
    path: Path | None = None
    for spec in a.impl:
        row = attempt(spec, Task(work, model, getattr(torch, a.dtype), ranks, spec.options), a.steps, folder)
        problem = row.get("problem", "")
        if not ranks.all(not problem):
            row = {"problem": problem or "failed on another rank"}
        found["runs"][str(spec)] = row
        ranks.say(f"{spec}: {row.get('problem') or row['trace']}")
        harness.collect()
        if ranks.rank == 0:
            path = harness.record(f"profile-{work.name}-{model}", found, ranks.device, folder, path)
    shown = table(found)
    shown.show(ranks.say)
    for name, row in found["runs"].items():
        if "problem" not in row:
            busiest(name, row).show(ranks.say)
    ranks.say(f"{shown.markdown()}\n\nwritten to {path}")
    return found


def attempt(spec: Spec, task: Task, steps: int, folder: Path) -> dict[str, Any]:
    try:
        return one(spec, task, steps, folder)
    except Absent as reason:
        return {"problem": f"absent: {reason}"}
    except Exception as error:
        traceback.print_exception(error, limit=-12, file=sys.stderr)
        return {"problem": f"failed: {type(error).__name__}: {str(error).strip()[:400]}"}


def one(spec: Spec, task: Task, steps: int, folder: Path) -> dict[str, Any]:
    made = peers.make(spec, task)
    whole = task.work.batch(0, task.device, task.dtype)
    batch = made.prepare({name: tensor[: made.work.shape.batch] for name, tensor in whole.items()})
    plain = harness.median(harness.in_turns({"": lambda: made.step(batch)}, max(3, steps), task.device)[""])
    path = folder / f"trace-{task.work.name}-{_file(spec)}-{task.ranks.rank}.json.gz"
    trace = trace_of(lambda: made.step(batch), steps, task.device, path)
    found = traces.breakdown(traces.load(trace)).per(steps)
    return {
        "ms": plain * 1e3,
        "profiled_ms": found.span * 1e3,
        "parts_ms": {kind: s * 1e3 for kind, s in found.seconds.items()},
        "hidden_communication_ms": found.hidden * 1e3,
        "busiest": [{"kernel": n, "kind": k, "ms": s * 1e3, "calls": c} for n, k, s, c in found.busiest],
        "trace": str(trace),
    }


def trace_of(step: Callable[[], Any], steps: int, device: torch.device, path: Path) -> Path:
    """The chrome trace of some steps, one after another without a pause."""
    from torch.profiler import ProfilerActivity, profile

    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities):  # the first use is slow to start, and loses its first kernels
        step()
        harness.synchronize(device)
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        harness.synchronize(device)
    recorded.export_chrome_trace(str(path))
    return path


def _file(spec: Spec) -> str:
    when = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    return "".join(c if c.isalnum() else "-" for c in str(spec)).strip("-") + f"-{when}"


def table(found: Mapping[str, Any]) -> Table:
    """A row for each kind of work, a column for each implementation: milliseconds of a step."""
    runs = {name: run for name, run in found["runs"].items() if "problem" not in run}
    shown = Table(f"where a step of {found['work']} ({found['model']}, {found['mesh']}) goes, ms", ["", *runs])
    for kind in traces.ORDER:
        if any(run["parts_ms"][kind] for run in runs.values()):
            shown.rows.append([kind, *(run["parts_ms"][kind] for run in runs.values())])
    shown.rows.append(["the step, profiled", *(run["profiled_ms"] for run in runs.values())])
    shown.rows.append(["the step, not profiled", *(run["ms"] for run in runs.values())])
    if any(run["hidden_communication_ms"] for run in runs.values()):
        shown.rows.append(["communication behind computation", *(run["hidden_communication_ms"] for run in runs.values())])
    shown.notes += [f"{name}: {run['problem']}" for name, run in found["runs"].items() if "problem" in run]
    return shown


def busiest(name: str, run: Mapping[str, Any], count: int = 15) -> Table:
    shown = Table(f"{name}: the busiest kernels", ["kernel", "kind", "ms a step", "calls"])
    shown.rows += [[k["kernel"][:90], k["kind"], k["ms"], k["calls"]] for k in run["busiest"][:count]]
    return shown


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="llama-8b-layers", choices=WORKS, metavar="NAME", help=f"of {', '.join(WORKS)}")
    for name in SIZES:
        p.add_argument(f"--{name}", type=int, help="instead of the work's")
    p.add_argument("--tiny", action="store_true", help="as small as the work's structure permits, for trying out")
    p.add_argument("--model", choices=["plain", "hf"], help="default: the work's first")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--impl", help=f"of {', '.join(peers.names())} (default: ours and the work's first two peers)")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--steps", type=int, default=3, help="profiled steps")
    p.add_argument("--results", default=str(harness.RESULTS), help="folder of the record and the traces")
    a = p.parse_args(argv)
    try:
        a.impl = peers.parse(a.impl or ",".join(("ours", *WORKS[a.work].peers[:2])))
    except ValueError as error:
        p.error(str(error))
    return a


if __name__ == "__main__":
    main()
