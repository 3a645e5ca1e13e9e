"""Matmuls beside the reduction of their own result.

In: a graph with process groups' names in it. Out: the graph with matmul → all-reduce → wait in one operator that does both in pieces
(`kernels.matmul_all_reduce`), wherever nothing else could run meanwhile: no matmul of the graph is independent of the all-reduce (where
one is, `early` puts it between the all-reduce and its wait, whole). Nor another collective: those stay in one order on all ranks.
"""

from __future__ import annotations

import torch
from torch import fx

from ..kernels.matmul_all_reduce import matmul_all_reduce
from ..plan.costs.collective import pieces
from .early import WAIT, is_collective

aten = torch.ops.aten
REDUCE = torch.ops._c10d_functional.all_reduce.default
MATMULS = frozenset({aten.mm.default, aten.bmm.default, aten.addmm.default})


def beside(graph: fx.Graph) -> int:
    """Rewrite what can be; how many were."""
    found = 0
    for node in graph.find_nodes(op="call_function", target=WAIT):
        chain = _chain(node)
        if chain is not None and not _others(graph, chain[0]):
            _replace(graph, node, *chain)
            found += 1
    return found


def _chain(wait: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """The all-reduce that is waited for, the matmul that it reduces (reshapes between them), and how many pieces."""
    reduce = wait.args[0]
    if not isinstance(reduce, fx.Node) or reduce.target is not REDUCE or reduce.args[1] != "sum" or len(reduce.users) > 1:
        return None
    source = reduce.args[0]
    while isinstance(source, fx.Node) and source.target is aten.reshape.default and len(source.users) == 1:
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target is not aten.mm.default or len(source.users) > 1:
        return None
    count = pieces(source.meta["val"].shape[0])
    return (reduce, source, count) if count > 1 else None


def _others(graph: fx.Graph, reduce: fx.Node) -> bool:
    """Whether a matmul or another collective neither leads to the all-reduce nor follows from it."""
    related, backward, forward = {reduce}, [reduce], [reduce]
    while backward:
        new = [n for n in backward.pop().all_input_nodes if n not in related]
        related.update(new)
        backward += new
    while forward:
        new = [n for n in forward.pop().users if n not in related]
        related.update(new)
        forward += new
    return any(n not in related and (n.target in MATMULS or is_collective(n)) for n in graph.nodes)


def _replace(graph: fx.Graph, wait: fx.Node, reduce: fx.Node, matmul: fx.Node, count: int) -> None:
    with graph.inserting_before(wait):
        one = graph.call_function(torch.ops.autoshard.matmul_all_reduce.default, (*matmul.args, count, reduce.args[2]))
        shaped = graph.call_function(aten.reshape.default, (one, list(wait.meta["val"].shape)))
    one.meta, shaped.meta = dict(matmul.meta), dict(wait.meta)
    wait.replace_all_uses_with(shaped)
    for node in (wait, reduce):
        graph.erase_node(node)
    graph.eliminate_dead_code()


assert matmul_all_reduce  # the import defines the operator
