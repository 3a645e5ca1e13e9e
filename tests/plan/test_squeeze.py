"""A price on bytes: the walk against brute force, and plans that fit where the fastest don't."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from autoshard.errors import NoPlanError
from autoshard.mesh import Mesh
from autoshard.plan.candidate import Candidates, Refused
from autoshard.plan.cluster import Cluster
from autoshard.plan.search import search
from autoshard.plan.solve import Problem
from autoshard.plan.squeeze import walk
from autoshard.trace.capture import capture
from autoshard.trace.graph import Graph


@dataclass
class Chosen:
    seconds: float
    choice: dict[str, int]


@pytest.mark.parametrize("seed", range(20))
def test_the_walk_is_within_its_gap_of_the_best_that_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"v{i}" for i in range(6)]
    sizes = {n: int(rng.integers(2, 5)) for n in names}
    seconds, held = Problem(dict(sizes)), Problem(dict(sizes))
    for n in names:
        order = np.sort(rng.random(sizes[n]))
        seconds.add((n,), order)
        held.add((n,), order[::-1] * 1e9 * rng.random())  # what is faster holds more
    for a, b in itertools.pairwise(names):
        seconds.add((a, b), 0.3 * rng.random((sizes[a], sizes[b])))
        held.add((a, b), 2e8 * rng.random((sizes[a], sizes[b])))
    every = [dict(zip(names, c, strict=True)) for c in itertools.product(*(range(sizes[n]) for n in names))]
    bytes_of = np.array([held.cost(c) for c in every])
    limit = float(np.quantile(bytes_of, rng.uniform(0.02, 0.5)))
    best = min(seconds.cost(c) for c, size in zip(every, bytes_of, strict=True) if size <= limit)

    def solve(price: float) -> tuple[Chosen, float]:
        problem = Problem(dict(sizes), dict(seconds.tables))
        for scope, table in held.tables.items():
            problem.add(scope, table * price)
        _, choice = problem.minimum()
        return Chosen(seconds.cost(choice), choice), held.cost(choice)

    found = walk(solve, lambda chosen: chosen.choice if held.cost(chosen.choice) <= limit else None)
    assert found is not None
    assert held.cost(found.value) <= limit
    assert best - 1e-12 <= found.seconds <= best * (1 + found.gap) + 1e-12
    assert walk(solve, lambda chosen: None) is None


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


@pytest.fixture(scope="module")
def graph() -> Graph:
    with torch.device("meta"):
        return capture(Wide(), kwargs={"x": torch.empty(16, 8, 64)}).graph


def test_what_does_not_fit_is_placed_for_memory(graph: Graph) -> None:
    cluster, apart = Cluster.load("h100x4"), {"divide": False}
    fast = search(graph, cluster, {"tp": 4}, 2, apart)
    peak = fast.predicted["memory_bytes"][0]
    assert any("ranks of tp all do the same 100 % of the matmul FLOPs" in note for note in fast.notes)
    squeezed = search(graph, cluster, {"tp": 4}, 2, apart, memory=0.6 * peak)
    assert squeezed.predicted["memory_bytes"][0] <= 0.6 * peak
    assert squeezed.predicted["step_seconds"] > fast.predicted["step_seconds"]
    assert squeezed.predicted["memory_gap"] >= 0 and any("don't fit; these hold less" in note for note in squeezed.notes)
    assert not any("all do the same 100 %" in note for note in squeezed.notes)
    with pytest.raises(NoPlanError, match="out of memory"):
        search(graph, cluster, {"tp": 4}, 2, apart, memory=0.1 * peak)


@pytest.mark.parametrize("mesh", [{"tp": 4}, {"dp": 4}, {"pp": 2, "tp": 2}, {"pp": 3}], ids=str)
def test_a_floor_is_below_all_placements(graph: Graph, mesh: dict[str, int]) -> None:
    shape = Mesh.of(mesh)
    roomy = Candidates(graph, Cluster.load("h100x12").subset(shape.ranks), {}, 1e12, folding=True)
    opened = roomy.open(shape, 2)
    assert opened.found is not None
    assert roomy.floor(shape, 2).step(shape.size("pp"), 2) <= opened.found.seconds
    low, high = 0.0, float(opened.found.memory)
    for _ in range(12):  # the smallest limit that the floor lets pass
        roomy.limit = (low + high) / 2
        try:
            roomy.floor(shape, 2)
            high = roomy.limit
        except Refused:
            low = roomy.limit
    roomy.limit = 0.98 * low
    with pytest.raises(Refused):
        roomy.floor(shape, 2)
    with pytest.raises(Refused):
        roomy.squeeze(opened)


def test_of_equals_the_plain_one_is_taken(graph: Graph) -> None:
    plan = search(graph, Cluster.load("h100x8"))
    others = [r for r in plan.runners_up if "step_seconds" in r]
    assert all(r["step_seconds"] >= plan.predicted["step_seconds"] / 1.001 for r in others)
    equal = [r for r in others if r["step_seconds"] <= plan.predicted["step_seconds"]]
    assert all(Mesh.parse(r["mesh"]).size("pp") >= plan.mesh.size("pp") for r in equal)
