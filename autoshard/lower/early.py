"""Start collectives early and wait for them late.

In: a graph with collectives and their waits. Out: the same nodes in another order. A collective runs beside the ops between it and its
wait, on a stream of its own: so what leads to a collective goes first (the gradient of a block's input before those of its weights),
then whatever waits for nothing, and a wait comes when there is nothing else to do. Collectives keep their order, so all ranks of a
group still meet in one; ops that draw on a random stream keep theirs.

Nothing is computed twice or kept that wasn't, but inputs of what is put off live longer: at most until the end of a block.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any

import torch
from torch import fx

from .program import Module

WAIT = torch.ops._c10d_functional.wait_tensor.default
INDUCTOR: dict[str, Any] = {
    "reorder_for_locality": False,  # it would bring what a wait puts off behind it
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}
"""Inductor's options for graphs with collectives. Fusion makes an order of its own; these bring it to the one that is meant here."""


def is_collective(node: fx.Node) -> bool:
    return str(node.target).startswith("_c10d_functional.") and node.target is not WAIT


def communicates(graph: fx.Graph) -> bool:
    return any(is_collective(node) for node in graph.nodes)


def early(module: Module) -> Module:
    """Every graph of a module, in place."""
    for graph in (module.forward, module.backward_input, module.backward_weight, module.backward, module.backward_in_place):
        if graph is not None and communicates(graph.graph):
            reorder(graph)
    return module


def reorder(module: fx.GraphModule) -> None:
    """Bring the nodes into order."""
    nodes = list(module.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    before = {node: set(node.all_input_nodes) for node in nodes}
    for kept in ([n for n in nodes if is_collective(n)], [n for n in nodes if _in_order(n)]):
        for first, second in itertools.pairwise(kept):
            before[second].add(first)
    after: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for node, sources in before.items():
        for source in sources:
            after[source].append(node)
    score = _scores(nodes, before)
    missing = {node: len(sources) for node, sources in before.items()}
    ready = [(score[node], place[node]) for node in nodes if not missing[node]]
    heapq.heapify(ready)
    anchor: fx.Node | None = None
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        if anchor is not None and node.prev is not anchor:
            anchor.append(node)
        anchor = node
        for user in after[node]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, (score[user], place[user]))
    module.graph.lint()
    module.recompile()


def _in_order(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _scores(nodes: list[fx.Node], before: dict[fx.Node, set[fx.Node]]) -> dict[fx.Node, tuple[int, int]]:
    """What comes first: inputs, in order; what leads to a collective, by the first one; then the rest, waits last."""
    leads = dict.fromkeys(nodes, len(nodes))
    collectives = 0
    for node in nodes:
        if is_collective(node):
            leads[node] = collectives
            collectives += 1
    for node in reversed(nodes):
        for source in before[node]:
            leads[source] = min(leads[source], leads[node])
    return {
        n: (-1, 0) if n.op == "placeholder" else (len(nodes) + 1, 0) if n.op == "output" else (leads[n], n.target is WAIT) for n in nodes
    }
