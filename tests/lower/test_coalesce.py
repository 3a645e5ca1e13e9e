"""Parameters travel in buckets: fewer collectives, within the plan's size, and the same numbers bit for bit."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

from autoshard.errors import PlanFileError
from autoshard.lower import compile
from autoshard.lower.coalesce import coalesce, in_place
from autoshard.lower.program import Program
from autoshard.plan.cluster import Cluster
from autoshard.plan.plan import Plan
from autoshard.plan.search import random_plan, search
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import Captured
from tests.runtime import checkpoints

c10d, aten = torch.ops._c10d_functional, torch.ops.aten


@functools.cache
def subject() -> tuple[Any, dict[str, Any], Captured]:
    return checkpoints.subject(torch.float64)


def named(graph: fx.GraphModule | None) -> Counter[str]:
    names = (str(n.target).split(".")[1] for n in graph.graph.nodes if "_c10d" in str(n.target)) if graph else ()
    return Counter(name for name in names if name != "wait_tensor")


def counts(program: Program) -> tuple[Counter[str], Counter[str]]:
    """Collectives of P and of G."""
    modules = [call.module for call in program.ranks[0].gathers]
    return sum((named(m.forward) for m in modules), Counter()), sum((named(m.backward) for m in modules), Counter())


def with_buckets(plan: Plan, size: int, starts: tuple[int, ...]) -> Plan:
    again = Plan.from_yaml(plan.to_yaml())
    again.bucket_bytes, again.buckets = size, starts
    return again


def test_one_collective_a_bucket_in_place_of_one_a_parameter() -> None:
    captured = subject()[2]
    plan = search(captured.graph, mesh={"dp": 2}, microbatches=2, pins={"merge": False})
    sharded = sum(layout[0].kind == "S" for layout in plan.storage.values())
    assert sharded > 10
    alone, together = (compile(captured, with_buckets(plan, size, plan.buckets)) for size in (0, 1 << 26))
    # what is too small to be stored in shards is summed as it is
    rest = len(plan.storage) - sharded
    assert counts(alone) == (Counter(all_gather_into_tensor=sharded), Counter(reduce_scatter_tensor=sharded) + Counter(all_reduce=rest))
    assert counts(together) == (Counter(all_gather_into_tensor=1), Counter(reduce_scatter_tensor=1) + Counter(all_reduce=min(rest, 1)))
    blocks = compile(captured, with_buckets(plan, 1 << 26, (0, 1, 3)))
    assert counts(blocks)[0] == Counter(all_gather_into_tensor=3) and len(blocks.ranks[0].gathers) == 3


def steps(program: Program) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    model, kwargs, _ = subject()
    run = InProcess(program, copy.deepcopy(model))
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    losses = []
    for _ in range(2):
        losses.append(run.train_step(**kwargs))
        optimizer.step()
        optimizer.zero_grad()
    return losses, run.state_dict()


@pytest.mark.parametrize(
    ("mesh", "seed"), [({"dp": 2, "tp": 2}, 2), pytest.param({"tp": 3}, 3, marks=pytest.mark.slow), ({"pp": 2, "dp": 2}, 4)], ids=str
)
def test_buckets_change_no_bit(mesh: dict[str, int], seed: int) -> None:
    captured = subject()[2]
    plan = random_plan(captured.graph, mesh=mesh, microbatches=2, seed=seed)
    every = tuple(range(max(plan.cuts) + 2))
    programs = [compile(captured, with_buckets(plan, *how)) for how in ((0, plan.cuts), (1 << 26, plan.cuts), (1 << 12, every))]
    (losses, state), *others = map(steps, programs)
    assert sum(counts(programs[1])[1].values()) < sum(counts(programs[0])[1].values())
    for other_losses, other_state in others:
        assert all(torch.equal(a, b) for a, b in zip(losses, other_losses, strict=True))
        assert all(torch.equal(state[name], other_state[name]) for name in state)


def traced(*sizes: int) -> fx.GraphModule:
    """Gathers tensors of these sizes over dp, and the first over tp again."""
    graph = fx.Graph()

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    outs = []
    for i, size in enumerate(sizes):
        x = graph.placeholder(f"x{i}")
        x.meta["val"] = torch.empty(size, 2, dtype=torch.float64, device="meta")
        outs.append(call(c10d.wait_tensor.default, call(c10d.all_gather_into_tensor.default, x, 2, "dp")))
    outs[0] = call(c10d.wait_tensor.default, call(c10d.all_gather_into_tensor.default, outs[0], 2, "tp"))
    graph.output(tuple(outs))
    return fx.GraphModule({}, graph)


def test_a_bucket_holds_what_waits_for_nothing_up_to_its_size() -> None:
    graph = traced(1, 2, 50, 3, 4)
    gathered = [n for n in coalesce(graph, 1 << 20).graph.nodes if "all_gather" in str(n.target)]
    assert [(n.args[2], n.meta["val"].numel()) for n in gathered] == [("dp", 2 * 2 * 60), ("tp", 2 * 2 * 2)]
    # 32 bytes a row once gathered: 1, 2 and 3 fit into 200, 50 is larger by itself, 4 begins the next
    gathered = [n for n in coalesce(graph, 200).graph.nodes if "all_gather" in str(n.target)]
    assert sorted(n.meta["val"].numel() for n in gathered) == [8, 16, 24, 200]
    assert coalesce(graph, 1) is graph
    shapes = [tuple(n.meta["val"].shape) for n in next(n for n in coalesce(graph, 1 << 20).graph.nodes if n.op == "output").args[0]]
    assert shapes == [(4, 2), (4, 2), (100, 2), (6, 2), (8, 2)]


def test_all_reduces_of_inputs_are_written_back_where_nobody_else_reads_them() -> None:
    def reduce(x: fx.Node) -> fx.Node:
        return graph.call_function(c10d.wait_tensor.default, (graph.call_function(c10d.all_reduce.default, (x, "sum", "dp")),))

    graph = fx.Graph()
    mine, read, small = (graph.placeholder(name) for name in ("mine", "read", "small"))
    flat = graph.call_function(aten.cat.default, ([small, small],))
    graph.output((reduce(mine), graph.call_function(aten.add.Tensor, (reduce(read), read)), reduce(flat)))
    module = fx.GraphModule({}, graph)
    again = in_place(module)
    assert again is not None
    (back,) = [n for n in again.graph.nodes if n.target is aten.copy_.default]
    (results,) = next(n for n in again.graph.nodes if n.op == "output").args
    assert back.args[0].name == "mine" and results[0] is back and back not in results[1:]
    assert not any(n.target is aten.copy_.default for n in module.graph.nodes)
    assert in_place(traced(1)) is None


def test_edited_buckets_are_checked() -> None:
    captured = subject()[2]
    plan = search(captured.graph, mesh={"pp": 2, "dp": 2})
    for starts in ((0,), (0, *plan.cuts[1:], 999)):
        with pytest.raises(PlanFileError, match="buckets begin at rising blocks, and at every cut"):
            compile(captured, with_buckets(plan, 1, starts))


def test_the_planner_counts_collectives_as_they_are_run() -> None:
    graph, times = subject()[2].graph, []
    for size in (0, 1000, 1 << 26):
        plan = search(graph, Cluster.load("h100x4"), {"dp": 4}, pins={"buckets": size, "merge": False})
        assert plan.bucket_bytes == size
        breakdown = plan.predicted["breakdown"]
        times.append(breakdown["parameters_and_gradients_seconds"] + breakdown["hidden_communication_seconds"])
    assert times[0] > 1.5 * times[2] and times[0] > times[1] > times[2] > 0
