"""Lowered programs typed independently of the rules, by what may be said without them and by execution; broken ones are found."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import fx

from autoshard.layout import I, P
from autoshard.lower import compile
from autoshard.lower.program import Module, Program
from autoshard.plan.cluster import Cluster
from autoshard.plan.plan import Plan
from autoshard.plan.search import random_plan, search
from autoshard.trace.capture import capture
from autoshard.trace.promote import promote_float32
from tests import zoo

from .boundaries import differences, played, whole
from .typing import Untyped, calls, check, fits, run

FAMILIES = ("plain_fused", "plain_llama", "plain_tied")
PLANS = (({"dp": 2, "tp": 2}, None), ({"dp": 2, "tp": 2}, 0), ({"tp": 4}, 1))
"""Mesh, and the seed of a random plan; None: the planner's own."""
Subject = tuple[Any, Any, dict[str, Any]]


@functools.lru_cache(maxsize=4)
def subject(family: str) -> Subject:
    """(captured, model, kwargs), in float64."""
    case = zoo.case(family)
    model, kwargs = case.double()
    with promote_float32():
        return capture(model, kwargs=kwargs, loss=case.loss), model, kwargs


def plan_of(captured: Any, mesh: dict[str, int], seed: int | None) -> Plan:
    if seed is None:
        return search(captured.graph, cluster=Cluster.local(math.prod(mesh.values())), mesh=mesh, microbatches=1)
    return random_plan(captured.graph, mesh=mesh, microbatches=1, seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_programs_are_well_typed(family: str) -> None:
    captured, model, kwargs = subject(family)
    expected = whole(captured, model, kwargs)
    for mesh, seed in PLANS:
        program = compile(captured, plan_of(captured, mesh, seed))
        for rank in (program.ranks[0], program.ranks[-1]):
            for call in calls(rank):
                check(rank, call)
        record = played(program, model, kwargs)
        assert len(record.gradients) > 2, "nothing crosses the blocks' boundaries"
        found = differences(record, *expected, (mesh.get("dp", 1), mesh["tp"]))
        assert not found, found


def _graphs(m: Module) -> tuple[fx.GraphModule | None, ...]:
    """Those that a step without a pipeline runs."""
    return m.forward, m.backward or m.backward_input, None if m.backward else m.backward_weight


def reductions(program: Program) -> list[tuple[fx.GraphModule, fx.Node]]:
    """Every all_reduce of every distinct graph of the first rank."""
    graphs = {id(g): g for c in calls(program.ranks[0]) for g in _graphs(c.module) if g}
    return [(g, n) for g in graphs.values() for n in g.graph.nodes if "all_reduce" in str(n.target)]


def twice(graph: fx.GraphModule, node: fx.Node) -> None:
    with graph.graph.inserting_after(node):
        again = graph.graph.call_function(node.target, node.args)  # type: ignore[arg-type]
    node.replace_all_uses_with(again, lambda user: user is not again)
    again.args = (node, *node.args[1:])


def never(graph: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.graph.erase_node(node)


def typed(program: Program) -> str:
    try:
        for call in calls(program.ranks[0]):
            check(program.ranks[0], call)
    except Untyped as error:
        return str(error)
    return ""


def broken(program: Program, number: int, change: Any) -> Program:
    found = copy.deepcopy(program.ranks)
    changed = Program(program.plan, program.graph, program.mesh, program.constants, found, program.captured)
    graph, node = reductions(changed)[number]
    change(graph, node)
    graph.recompile()
    return changed


@pytest.mark.parametrize("change", [twice, never])
def test_a_dropped_or_doubled_all_reduce_is_found(change: Any) -> None:
    captured, model, kwargs = subject("plain_tied")
    expected = whole(captured, model, kwargs)
    by_type = 0
    program = compile(captured, plan_of(captured, {"tp": 2}, None))
    assert not typed(program)
    count = len(reductions(program))
    assert count
    for number in range(count):
        bad = broken(program, number, change)
        if typed(bad):
            by_type += 1
        else:
            assert change is never, f"a doubled all_reduce passed: {reductions(program)[number][1].format_node()}"
            assert differences(played(bad, model, kwargs), *expected, (1, 2))
    assert by_type >= count // 2, (by_type, count)


def test_a_gradient_of_another_type_is_found() -> None:
    """Megatron's f without its backward all-reduce: the input's gradient stays a term."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    graph.output((graph.call_function(torch.ops.aten.mm.default, (x, w)),))
    (found,) = run(fx.GraphModule({}, graph), ["V", "V"], "tp")
    assert not fits(found, I) and fits(found, P)
