"""What the planner takes to hide behind the loop, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from autoshard import Cluster
from autoshard.plan.estimate import BlockCosts
from autoshard.plan.search import search
from autoshard.trace.graph import Graph
from tests.runtime import checkpoints


def costs(seconds: list[float], gather: list[float], reduce: list[float]) -> BlockCosts:
    """Blocks of so many seconds: a third forward, two backward."""
    found = BlockCosts.random(np.array(seconds))
    found.gather, found.reduce = np.array(gather), np.array(reduce)
    return found


@pytest.mark.parametrize(
    ("gather", "reduce", "waits"),
    [
        ([0, 0, 0], [0, 0, 0], 0.0),
        ([0.5, 0.5, 0.5], [0, 0, 0], 0.5),  # the first block's, which nothing runs before
        ([0.5, 3, 0.5], [0, 0, 0], 2.5),  # the second is there at 3.5, and its block could have begun at 1
        ([0, 0, 0], [1, 1, 1], 1.0),  # the first block's, which nothing runs after
        ([0, 0, 0], [0, 0, 5], 1.0),  # begun at 2, done at 7; the loop ends at 6
        ([0, 0, 0], [1, 5, 1], 4.0),  # begun at 4
        ([9, 0, 0], [9, 0, 0], 18.0),
    ],
)
def test_the_loop_waits_for_what_it_can_not_hide(gather: list[float], reduce: list[float], waits: float) -> None:
    blocks = costs([3.0, 3.0, 3.0], gather, reduce)
    assert blocks.beside(0, 3) == pytest.approx((waits, sum(gather) + sum(reduce) - waits))


def test_a_stage_hides_its_own() -> None:
    blocks = costs([3.0, 3.0, 3.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert blocks.beside(0, 1) == pytest.approx((3.0, 0.0))
    assert blocks.beside(1, 3) == pytest.approx((3.0, 3.0))


def graph() -> Graph:
    return checkpoints.subject()[2].graph


def test_a_plan_says_what_is_hidden_and_counts_the_contention() -> None:
    plan = search(graph(), Cluster.load("h100x4"), {"dp": 4})
    stage, found = plan.predicted["stages"][0], plan.predicted["breakdown"]
    assert found["hidden_communication_seconds"] == stage["hidden_seconds"] > 0
    loop = stage["compute_seconds"] + stage["communication_seconds"]
    assert plan.predicted["step_seconds"] == pytest.approx(loop + stage["parameters_seconds"])
    alone = search(graph(), Cluster.load("h100x4"), {"tp": 4})
    assert alone.predicted["breakdown"]["hidden_communication_seconds"] == 0
