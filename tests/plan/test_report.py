"""Reports: golden texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autoshard.plan.cluster import Cluster
from autoshard.plan.costs.memory import StageMemory
from autoshard.plan.schedules import build, parse
from autoshard.plan.simulate import simulate
from autoshard.report import cluster_table, memory_table, plan_table, render, timeline


@dataclass
class Plan:
    mesh: Any = field(default_factory=lambda: {"pp": 2, "dp": 4})
    microbatches: int = 8
    schedule: str = "1f1b"
    cuts: Any = (0, 17)
    predicted: Any = None


def test_plan_table() -> None:
    plan = Plan(
        predicted={
            "step_seconds": 1.25,
            "memory_bytes": [2**30, 3 * 2**29],
            "breakdown": {"compute": 1.0, "stage 0": {"params_bytes": 1024}},
        }
    )
    assert (
        render(plan_table(plan))
        == """\
plan
┌──────────────────────┬───────────┐
│ mesh                 │ pp=2 dp=4 │
│ microbatches         │ 8         │
│ schedule             │ 1f1b      │
│ cuts                 │ 0, 17     │
│ step                 │ 1.25 s    │
│ memory, stage 0      │ 1 GiB     │
│ memory, stage 1      │ 1.5 GiB   │
├──────────────────────┼───────────┤
│ compute              │ 1 s       │
│ stage 0.params bytes │ 1 KiB     │
└──────────────────────┴───────────┘"""
    )


def test_plan_table_of_anything() -> None:
    """Fields that are missing, empty or of another kind never raise."""
    assert "–" in render(plan_table(object()))  # type: ignore[arg-type]
    for plan in (Plan(mesh=None, cuts=None), Plan(mesh="dp=2", predicted={"step_seconds": None, "memory_bytes": 5.0, "breakdown": None})):
        assert "1f1b" in render(plan_table(plan))
    assert "memory, head" in render(
        plan_table(Plan(predicted={"memory_bytes": {"head": 1}, "breakdown": {"note": "x", "bytes": {"a": 1}}}))
    )


def test_timeline() -> None:
    costs = {(s, k): t for s in range(3) for k, t in (("F", 1.0), ("B", 2.0), ("I", 1.0), ("W", 1.0))}
    assert (
        timeline(simulate(build("gpipe", 3, 2, [(0, 1), (1, 2)]), costs), width=24)
        == """\
rank 0 0011............aaaabbbb
rank 1 ..0011......aaaabbbb....
rank 2 ....0011aaaabbbb........
12 s, 50 % idle; a digit is a forward, a letter a backward of that microbatch (0 = a), . idle"""
    )
    halves = timeline(simulate(parse("0: P D F0.0 I0.0 W0.0 G L U"), {**costs, (0, "G"): 1.0}), width=8)
    assert halves.splitlines()[0] == "rank 0 00AAwwGG" and "capitals" in halves
    assert timeline(simulate(parse("0: P D F0.0 L"), {})) == "nothing takes any time"
    many = timeline(simulate(build("1f1b", 5, 1, []), {(s, "F"): 1.0 for s in range(5)}), width=4, rows=2)
    assert many.splitlines()[2] == "… and 3 more ranks"


def test_memory_and_cluster_tables() -> None:
    text = render(memory_table([StageMemory(params=2**30, activations=2**30), StageMemory(params=2**34)], capacity=2**33), width=140)
    assert "too large" in text and "16 GiB" in text and "26 %" in text
    text = render(cluster_table(Cluster.load("h100x16")))
    assert "16 ranks" in text and "nvlink" in text and "365 GB/s" in text
