"""What communication beside the loop gains and costs: one trainer, its lane on a stream of its own and in place, in turns.

    python -m benchmarks.overlap --work llama-8b-layers-12-dp2 --impl 'ours,ours[pins.zero=false]'

Printed for each: milliseconds of a step, the peak of allocated and of reserved bytes, and how far the gradients of one batch are apart
(not at all, where a step is deterministic; a GPU may sum embeddings' gradients by atomics). On the CPU both run in place: for trying out.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoshard.runtime.lane import Lane

from . import harness, peers
from .peers import Made, Task
from .ranks import Ranks, launch
from .step import SIZES
from .tables import Table
from .works import WORKS, Batch, find

GIB = 2.0**30


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    a = arguments(argv)
    work = find(a.work, {name: getattr(a, name) for name in SIZES}, a.tiny)
    code = launch("benchmarks.overlap", sys.argv[1:] if argv is None else argv, work.ranks, a.device)
    if code is not None:
        sys.exit(code)
    ranks, found = Ranks.here(a.device), {}
    try:
        shown = Table(f"a step of {work.name}", ["", "lane", "ms", "peak GiB", "reserved GiB", "gradients apart"])
        for spec in a.impl:
            made = peers.make(spec, Task(work, a.model or work.models[0], getattr(torch, a.dtype), ranks, spec.options))
            rows = found[str(spec)] = compare(made, work.batch(0, ranks.device, getattr(torch, a.dtype)), a.steps, ranks)
            shown.rows += [[str(spec), name, *row.values()] for name, row in rows.items()]
            del made
            harness.collect()
        shown.show(ranks.say)
    finally:
        ranks.leave()
    return found


def compare(made: Made, batch: Batch, steps: int, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Per lane: milliseconds, bytes, and the largest distance of its gradients from those in place."""
    assert made.sharded is not None, "overlap is measured of ours"
    lanes = {"beside": made.sharded.lane, "in place": Lane()}
    step = functools.partial(made.step, made.prepare(batch))
    apart = _apart(*(_gradients(made, lane, batch) for lane in lanes.values()))
    found: dict[str, dict[str, Any]] = {}
    for name, lane in lanes.items():
        _take(made, lane)
        harness.in_turns({name: step}, 1, ranks.device)
        harness.collect()
        memory = harness.Memory(ranks.device)
        harness.in_turns({name: step}, 2, ranks.device)
        reserved = torch.cuda.max_memory_reserved(ranks.device) / GIB if ranks.device.type == "cuda" else 0.0
        found[name] = {"ms": 0.0, "peak": (memory.peak() + memory.base) / GIB, "reserved": reserved, "apart": apart}

    def run(lane: Lane) -> None:
        _take(made, lane)
        step()

    seconds = harness.in_turns({name: functools.partial(run, lane) for name, lane in lanes.items()}, steps, ranks.device)
    for name, each in seconds.items():
        found[name]["ms"] = 1e3 * statistics.median(ranks.most(each))
    return found


def _take(made: Made, lane: Lane) -> None:
    for executor in made.sharded.training.executors:
        executor.lane = lane


def _gradients(made: Made, lane: Lane, batch: Batch) -> dict[str, Tensor]:
    _take(made, lane)
    made.sharded.train_step(**made.prepare(batch))
    found = {name: p.grad.clone() for name, p in made.sharded.named_parameters() if p.grad is not None}
    made.sharded.zero_grad()
    return found


def _apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """How many differ, and the largest distance by the largest element."""
    assert a.keys() == b.keys()
    far = {n: float((a[n].float() - b[n].float()).abs().max() / b[n].float().abs().max().clamp(min=1e-30)) for n in a if a[n].numel()}
    differ = {n: d for n, d in far.items() if d}
    worst = max(differ, key=differ.__getitem__, default="")
    return f"{len(differ)} of {len(far)}" + (f", {worst} by {differ[worst]:.1e}" if worst else "")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", default="llama-8b-layers-12-dp2", choices=WORKS, metavar="NAME", help=f"of {', '.join(WORKS)}")
    for name in SIZES:
        p.add_argument(f"--{name}", type=int, help="instead of the work's")
    p.add_argument("--tiny", action="store_true", help="as small as the work's structure permits, for trying out")
    p.add_argument("--model", choices=["plain", "hf"], help="default: the work's first")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--impl", default="ours,ours[pins.zero=false]", help="ours, with options")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--steps", type=int, default=8, help="timed steps")
    a = p.parse_args(argv)
    try:
        a.impl = peers.parse(a.impl)
    except ValueError as error:
        p.error(str(error))
    return a


if __name__ == "__main__":
    main()
