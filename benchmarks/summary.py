"""What is said of a work's runs: ratios, whether they computed the same, one table.

In: a record of `step` (its `runs`: implementation → what was found of it). Out: text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .tables import Table

Found = Mapping[str, Mapping[str, Any]]


def measured(runs: Found) -> dict[str, Mapping[str, Any]]:
    return {name: run for name, run in runs.items() if "problem" not in run}


def ratios(runs: Found) -> dict[str, float]:
    """Time of each of ours over each peer's, in turns where they were (with the first one, both); per device and FLOP, if the work or the
    number of devices differs; once more with the pipeline's bubble apart, where the peer does one stage's work alone."""
    found: dict[str, float] = {}
    there = measured(runs)
    first = next(iter(there), None)
    for mine, a in there.items():
        for theirs, b in there.items():
            if not mine.startswith("ours") or theirs.startswith("ours"):
                continue
            ratio = a["ms"] / b["ms"]
            relative = [1.0 if name == first else run["relative"] for name, run in ((mine, a), (theirs, b))]
            if all(relative):
                ratio = relative[0] / relative[1]
            ratio *= b["flops_per_device"] / a["flops_per_device"]
            found[f"{mine} / {theirs}"] = ratio
            if a["bubble"] > b["bubble"]:
                found[f"{mine} / {theirs}, bubble apart"] = ratio * b["bubble"] / a["bubble"]
    return found


def check(runs: Found, dtype: torch.dtype) -> list[str]:
    """What is wrong: losses that part from the first peer's (or ours, alone), anything of ours that ran uncompiled."""
    problems: list[str] = []
    there = {name: run for name, run in measured(runs).items() if run["same_work"]}
    first = next((name for name in there if not name.startswith("ours") and there[name]["precise"]), next(iter(there), None))
    for name, run in there.items():
        assert first is not None
        for i, (mine, theirs) in enumerate(zip(run["losses"], there[first]["losses"], strict=True)):
            allowed = tolerance(theirs, i, dtype, run)
            if not abs(mine - theirs) <= allowed:
                problems.append(f"step {i}: {name} has the loss {mine:.5f}, {first} {theirs:.5f}; {allowed:.5f} are allowed")
                break
    for name, run in measured(runs).items():
        c = run["compiled"]
        if not name.startswith("ours") or "compile=false" in name or not c:
            continue
        if c["graph_breaks"] or c["ran_uncompiled"] or c["never_compiled"]:
            problems.append(f"{name} ran uncompiled graphs: {c}")
        elif c["graphs"] < c["with_ops"]:
            problems.append(f"{name}: {c['with_ops']} graphs have ops, but {c['graphs']} were compiled")
    return problems


def tolerance(loss: float, step: int, dtype: torch.dtype, run: Mapping[str, Any]) -> float:
    """Of a loss over few labels, which other weights would change by 0.2 and more. The first step compares the forward, the others what
    the optimizer made of the gradients."""
    if run["noisy"]:
        return 0.5  # every implementation draws its own dropout
    if dtype != torch.bfloat16:
        return 1e-3 * abs(loss)
    # an activation keeps 8 bits, a matmul in FP8 3 of its operands'
    close = 0.03 if run["precise"] else 0.1
    if run["coarse"]:  # the loss itself keeps 8 bits
        close += abs(loss) / 64
    return close if step == 0 else max(2 * close, 0.01 * abs(loss))


def table(record: Mapping[str, Any]) -> Table:
    """A row for each implementation."""
    runs: Found = record["runs"]
    headings = ["", "ms", "TFLOP/s", "× floor", "peak GiB", "held GiB", "alone ms", "ready s", "first s", "ours takes"]
    found = Table(f"{record['work']} ({record['model']}, {record['dtype']}, {record['mesh']})", headings)
    ours = next((name for name in measured(runs) if name.startswith("ours")), None)
    for name, run in runs.items():
        if "problem" in run:
            found.rows.append([name, *[None] * 8, run["problem"].splitlines()[0][:60]])
            continue
        row = [name, run["ms"], run["tflops_per_device"], run.get("times_floor"), run["peak_gib"], run["held_gib"], run["alone_ms"]]
        ratio = record["ratios"].get(f"{ours} / {name}")
        found.rows.append([*row, run["ready_s"], run["first_step_s"], f"{ratio:.3f} ×" if ratio else ""])
    found.notes += [f"{pair}: {ratio:.3f} × the time" for pair, ratio in record["ratios"].items()]
    found.notes += [f"{name}: {run['plan']}" for name, run in measured(runs).items() if run["plan"]]
    found.notes += [f"{name}: {run['compiled']}" for name, run in measured(runs).items() if any(run["compiled"].values())]
    found.notes += [f"WRONG: {problem}" for problem in record["problems"]]
    return found
