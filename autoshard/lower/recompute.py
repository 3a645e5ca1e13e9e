"""Choose what a block saves for its backward: the fewest bytes from which cheap ops make the rest again.

In: a joint graph's forward nodes, the backward's nodes, which inputs are free to keep (parameters, data). Out: the forward nodes that the
backward makes again; what these and the backward read of the forward is saved. The fewest bytes are a minimum cut between what can't be
made again (matmuls, attention, reductions, collectives, anything random) and what the backward reads, where cutting a value costs
its bytes. Pointwise ops and views may be repeated: they fuse into the kernels that read them. So of ways that cost the same bytes the one
is taken that keeps what lies in memory anyway, a kernel's result or an output, and not what would be written for the backward alone. A
value that a matmul or another opaque kernel of the backward reads would have to be written to memory again, so it is saved as it is; unless
it is rows gathered several times each, which take a multiple of the memory of those that they are gathered from.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from ..trace.interpret import UNTAGGED_POINTWISE

SOURCE, SINK = "source", "sink"
VIEWS = frozenset(
    """view _unsafe_view reshape t transpose permute expand slice select squeeze unsqueeze split_with_sizes split detach alias
    unbind""".split()
)
# fused by the compiler as pointwise ops are, though not elementwise
MOVES = frozenset("arange cat constant_pad_nd full zeros ones scalar_tensor new_zeros index_select".split())


def made_again(
    first: set[fx.Node],
    inputs: Iterable[fx.Node],
    free: set[fx.Node],
    later: list[fx.Node],
    results: Iterable[object],
    outputs: Iterable[object] = (),
) -> set[fx.Node]:
    """The nodes of `first` that `later` makes again. `inputs`: placeholders; those in `free` cost nothing to keep. `outputs`: of the
    forward, which are written in any case."""
    written = set(outputs)
    read = {source for node in later for source in node.all_input_nodes} | {r for r in results if isinstance(r, fx.Node)}
    pinned = {_base(s) for node in later if not _cheap(node) for s in node.all_input_nodes if not _repeats_rows(s)}
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from([SOURCE, SINK])
    for node in (*inputs, *first):
        size = _bytes(node)
        if size is None:
            graph.add_edge((node, 0), (node, 1))
        else:
            # of a value and its views the value; what a kernel makes before what would be fused
            late = _name(node) in (*VIEWS, "index_select")
            more = 1 if node not in first or not _cheap(node) or node in written else 3 if late else 2
            graph.add_edge((node, 0), (node, 1), capacity=0 if node in free else 8 * size + more)
        if node not in first or node in pinned or not _cheap(node):
            graph.add_edge(SOURCE, (node, 0))
        for source in node.all_input_nodes if node in first else ():
            graph.add_edge((source, 1), (node, 0))
        if node in read:
            graph.add_edge((node, 1), SINK)
    reachable = nx.minimum_cut(graph, SOURCE, SINK)[1][0]
    cut = {node for node in first if (node, 0) in reachable and (node, 1) not in reachable}
    again: set[fx.Node] = set()
    stack = [node for node in read if node in first]
    while stack:
        node = stack.pop()
        if node not in cut and node not in again:
            again.add(node)
            stack += [source for source in node.all_input_nodes if source in first]
    return again


def parts_copied(graph: fx.Graph, saved: Sequence[fx.Node], first: set[fx.Node], results: Iterable[object]) -> dict[fx.Node, fx.Node]:
    """Saved node → a copy of it to save instead. A view keeps all of its buffer in memory: of q, k and v in one, v alone is saved where q
    and k are rotated. Where what is saved of a buffer is at most half of it, and nobody else keeps it, it is copied: the buffer goes."""
    kept = {_buffer(node, first) for node in results if isinstance(node, fx.Node)}
    of: dict[fx.Node, list[fx.Node]] = {}
    for node in saved:
        of.setdefault(_buffer(node, first), []).append(node)
    found: dict[fx.Node, fx.Node] = {}
    for buffer, parts in of.items():
        size = sum(_bytes(part) or 0 for part in parts)
        if buffer in kept or buffer in parts or buffer not in first or 2 * size > (_bytes(buffer) or 0):
            continue
        for part in parts:
            with graph.inserting_after(part):
                found[part] = graph.call_function(torch.ops.aten.clone.default, (part,), {"memory_format": torch.contiguous_format})
            found[part].meta = {k: v for k, v in part.meta.items() if k in ("val", "stack_trace")}
    return found


def _buffer(node: fx.Node, first: set[fx.Node]) -> fx.Node:
    """What a chain of views is a view of."""
    while node in first and (_name(node) in VIEWS or node.target is operator.getitem) and len(node.all_input_nodes) == 1:
        source = node.all_input_nodes[0]
        if node.target is operator.getitem and _name(source) not in VIEWS:
            break
        node = source
    return node


def _base(node: fx.Node) -> fx.Node:
    """What a chain of views of one tensor starts from, whether forward or backward made them."""
    while _name(node) in VIEWS and len(node.all_input_nodes) == 1 and _bytes(node.all_input_nodes[0]) is not None:
        node = node.all_input_nodes[0]
    return node


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if node.op == "call_function" and str(node.target).startswith("aten.") else ""


def _cheap(node: fx.Node) -> bool:
    """Whether the compiler fuses the node into whatever reads it."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _name(source) in VIEWS
    target: Any = node.target
    if _name(node) in VIEWS or _name(node) in MOVES:
        return True
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or str(target) in UNTAGGED_POINTWISE


def _repeats_rows(node: fx.Node) -> bool:
    """Whether it gathers rows more than once, so that it takes more memory than what it gathers from."""
    source = node.args[0] if _name(node) == "index_select" else None
    return isinstance(source, fx.Node) and 2 * (_bytes(source) or 0) <= (_bytes(node) or 0)


def _bytes(node: fx.Node) -> int | None:
    """None for what isn't one tensor."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else None
