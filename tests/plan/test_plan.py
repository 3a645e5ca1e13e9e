"""Plans: round trip, refusal of what isn't a plan, pins, notes, and what the search looks at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoshard.errors import DeadlockError, NoPlanError, PinError, PlanFileError, StalePlanError
from autoshard.lower import compile
from autoshard.plan import schedules
from autoshard.plan.cluster import Cluster
from autoshard.plan.fold import fold
from autoshard.plan.plan import Plan
from autoshard.plan.search import random_plan, search
from autoshard.trace.capture import Captured, capture


class Mlp(nn.Module):
    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


@pytest.fixture(scope="module")
def captured() -> Captured:
    torch.manual_seed(0)
    return capture(Mlp(), kwargs={"x": torch.randn(8, 4, 16)})


@pytest.mark.parametrize("mesh", [{"dp": 2}, {"tp": 2}, {"pp": 3}, {"pp": 2, "dp": 2, "tp": 2}], ids=str)
def test_a_plan_reads_back_equal(captured: Captured, mesh: dict[str, int]) -> None:
    for plan in (search(captured.graph, mesh=mesh, microbatches=2), random_plan(captured.graph, mesh, 2, seed=3)):
        again = Plan.from_yaml(plan.to_yaml())
        assert again == plan
        again.check(captured.graph)
        schedules.check(again.instructions, _edges(again))


def _edges(plan: Plan) -> list[tuple[int, int]]:
    return sorted({a.channel for actions in plan.instructions for a in actions if a.kind == "SF"})


def test_a_plan_of_another_graph_is_stale(captured: Captured) -> None:
    plan = search(captured.graph, mesh={"dp": 2})
    other = capture(Mlp(width=8), kwargs={"x": torch.randn(8, 4, 8)})
    with pytest.raises(StalePlanError, match="made for graph"):
        plan.check(other.graph)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version: 1", "version: 7"),
        ("microbatches: 2", "microbatches: 0"),
        ("cuts:\n- 0", "cuts:\n- 1"),
        ("S(", "T("),
        ("mesh: pp=", "mesh: pp:"),
        ("schedule:", "shedule:"),
    ],
)
def test_a_damaged_plan_is_refused(captured: Captured, old: str, new: str) -> None:
    text = search(captured.graph, mesh={"dp": 2, "tp": 2}, microbatches=2).to_yaml()
    assert old in text
    with pytest.raises((PlanFileError, ValueError)):
        Plan.from_yaml(text.replace(old, new))


def test_pins_hold_or_are_refused(captured: Captured) -> None:
    path = "layers.0.0.weight"
    plan = search(captured.graph, mesh={"tp": 2}, pins={"storage": {path: "S(1)"}, "schedule": "gpipe"})
    name = next(v.name for v in captured.graph.sources("param") if v.path == path)
    assert str(plan.storage[name][1]) == "S(1)"
    assert plan.schedule == "gpipe"
    for pins, message in (
        ({"storage": {"nothing": "S(0)"}}, "doesn't have"),
        ({"storage": {path: "S(7)"}}, "can't be stored as S\\(7\\) on tp=2; legal there: .*S\\(0\\)"),
        ({"ops": {"nothing": "R -> R"}}, "doesn't have"),
        ({"colour": 1}, "unknown pin"),
        ({"cuts": [0, 1]}, "don't make"),
    ):
        with pytest.raises(PinError, match=message):
            search(captured.graph, mesh={"tp": 2}, pins=pins)


def test_the_search_weighs_meshes_and_names_the_runners_up(captured: Captured) -> None:
    plan = search(captured.graph, Cluster.load("h100x8"))
    assert plan.mesh.ranks == 8
    times = [r["step_seconds"] for r in plan.runners_up if "step_seconds" in r]
    assert times and len(plan.runners_up) >= 3
    assert all(r["reason"] for r in plan.runners_up)
    assert plan.predicted["step_seconds"] <= min(times)
    assert times == sorted(times)


def test_planning_does_not_grow_with_depth() -> None:
    def layers(n: int) -> torch.nn.Module:
        blocks = [torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)) for _ in range(n)]
        return torch.nn.Sequential(*blocks, torch.nn.Linear(16, 4))

    x = torch.randn(16, 16)
    shallow, deep = (capture(layers(n), (x,), loss=lambda y: y.square().mean()).graph for n in (12, 36))
    assert len(fold(deep).graph.ops) == len(fold(shallow).graph.ops) < len(shallow.ops)
    folded = search(deep, mesh={"pp": 2, "dp": 2, "tp": 2}, microbatches=4)
    pins = {"storage": {"0.0.weight": str(folded.storage["_0_0_weight"][1])}}  # names a layer, so that nothing is folded
    whole = search(deep, mesh={"pp": 2, "dp": 2, "tp": 2}, microbatches=4, pins=pins)
    assert folded.predicted["step_seconds"] == pytest.approx(whole.predicted["step_seconds"], rel=1e-6)
    assert set(folded.ops) == set(whole.ops) and set(folded.storage) == set(whole.storage)


def test_what_does_not_fit_says_by_how_much(captured: Captured) -> None:
    with pytest.raises(NoPlanError, match=r"no plan fits: the nearest needs .* more than"):
        search(captured.graph, Cluster.load("h100x2"), memory=100.0)


def test_a_batch_statistic_forces_one_microbatch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    captured = capture(model, args=(torch.randn(8, 4),), loss=lambda y: y.square().sum())
    plan = search(captured.graph, mesh={"dp": 2}, microbatches=4)
    assert plan.microbatches == 1
    assert "one microbatch instead of 4" in plan.notes[-1]


def test_an_edited_plan_that_would_hang_is_refused_before_it_runs(captured: Captured) -> None:
    plan = search(captured.graph, mesh={"pp": 2}, microbatches=2)
    plan.instructions[0] = [a for a in plan.instructions[0] if a.kind != "SF"]
    with pytest.raises(DeadlockError):
        compile(captured, plan)
