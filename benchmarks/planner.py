"""How long capture, search and lowering take, by depth: CPU seconds of one process, no device.

    python -m benchmarks.planner --layers 16,80,126 --cluster h100x64 --batch 256 --seq 8192

The model is a plain Llama on meta (the shape of the 70B by default). Planning and lowering work per distinct block, so their time should
hardly grow with depth: the ratios to the first depth say so. `configurations` counts the meshes and microbatch counts that were looked at.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from autoshard import Cluster, lower
from autoshard.plan.search import search
from autoshard.trace.capture import capture

from . import harness
from .models import Shape, build

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def one(layers: int, a: argparse.Namespace) -> dict[str, Any]:
    shape = Shape(layers, a.hidden, a.ffn, a.heads, a.kv, a.vocab, a.seq, a.batch)
    model = build("plain", shape, torch.bfloat16, torch.device("meta"))
    ids = torch.empty(a.batch, a.seq, dtype=torch.int64, device="meta")
    captured, traced = timed(lambda: capture(model, kwargs={"input_ids": ids, "labels": ids}))
    plan, searched = timed(lambda: search(captured.graph, Cluster.load(a.cluster)))
    program, lowered = timed(lambda: lower.compile(captured, plan, ranks=[0]))
    source, printed = timed(lambda: program.source(0))
    return {
        "layers": layers,
        "ops": len(captured.graph.ops),
        "capture_s": traced,
        "search_s": searched,
        "lower_s": lowered,
        "source_s": printed,
        "configurations": 1 + len(plan.runners_up),
        "plan": f"{plan.mesh}, {plan.microbatches} microbatches",
        "step_s": plan.predicted["step_seconds"],
        "source_lines": source.count("\n"),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", default="80,126", help="depths, in this order")
    for name, size in (("hidden", 8192), ("ffn", 28672), ("heads", 64), ("kv", 8), ("vocab", 128256), ("seq", 8192), ("batch", 256)):
        p.add_argument(f"--{name}", type=int, default=size)
    p.add_argument("--cluster", default="h100x64")
    p.add_argument("--results", default=str(harness.RESULTS), help="folder of the record; empty: none")
    a = p.parse_args(argv)
    rows = [one(int(layers), a) for layers in a.layers.split(",")]
    print(f"{'layers':>7}{'capture s':>11}{'search s':>10}{'lower s':>9}{'plan+lower':>12}{'peak GiB':>10}  plan")
    first = rows[0]["search_s"] + rows[0]["lower_s"]
    for r in rows:
        r["ratio"] = (r["search_s"] + r["lower_s"]) / first
        seconds = f"{r['capture_s']:11.1f}{r['search_s']:10.1f}{r['lower_s']:9.1f}"
        print(f"{r['layers']:7}{seconds}{r['ratio']:11.2f}×{r['peak_gib']:10.2f}  {r['plan']}")
    found = {"rows": rows, "cluster": a.cluster, "batch": a.batch, "seq": a.seq}
    if a.results:
        print(f"written to {harness.record('planner', found, torch.device('cpu'), Path(a.results))}")
    return found


if __name__ == "__main__":
    main()
