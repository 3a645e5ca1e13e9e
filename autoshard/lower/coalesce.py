"""Coalesce: collectives of one kind that wait for nothing of each other become one, on one flat buffer.

In: a module that moves parameters (what P and G run). Out: the same with fewer collectives. Two belong together if they are the same op on
the same group, reduction and dtype, and as many collectives stand before one as before the other (so neither can need the other's result).
Buckets fill in the graph's order up to a number of bytes, and what is as large by itself goes alone, without the copies into and out of the
buffer. What a collective is given has the same size on every rank of its group, so all ranks make the same buckets.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .program import Module

Op = torch.ops._c10d_functional
aten = torch.ops.aten


def coalesced(module: Module, limit: int) -> Module:
    """Every graph of a module that moves parameters, and its backward in place."""
    found = dataclasses.replace(module)
    for name in ("forward", "backward_input", "backward_weight", "backward") if limit else ():
        graph = getattr(module, name)
        setattr(found, name, None if graph is None else coalesce(graph, limit))
    found.backward_in_place = None if found.backward is None else in_place(found.backward)
    return found


def in_place(module: fx.GraphModule) -> fx.GraphModule | None:
    """The graph with all-reduces of its inputs written back into them, so that the compiler makes no copy (a functional all-reduce is one,
    and another gradient's memory). None if there are none."""
    again = copy.deepcopy(module.graph)
    found = False
    for node in list(again.nodes):
        source = node.args[0] if node.target is Op.all_reduce.default else None
        if not isinstance(source, fx.Node) or source.op != "placeholder" or len(source.users) > 1:
            continue
        (wait,) = node.users
        assert wait.target is Op.wait_tensor.default, f"{node} is used before it is there"
        with again.inserting_after(wait):
            back = again.call_function(aten.copy_.default, (source, wait))
        back.meta = dict(wait.meta)
        wait.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        found = True
    return fx.GraphModule(module, again) if found else None


def coalesce(module: fx.GraphModule, limit: int) -> fx.GraphModule:
    """The graph with collectives merged, up to `limit` bytes each."""
    buckets = [bucket for bucket in _buckets(module.graph, limit) if len(bucket) > 1]
    return _Rewriter(module, buckets).run() if buckets else module


def _buckets(graph: fx.Graph, limit: int) -> list[list[fx.Node]]:
    depth: dict[fx.Node, int] = {}
    found: list[list[fx.Node]] = []
    filling: dict[object, tuple[list[fx.Node], int]] = {}
    for node in graph.nodes:
        here = max((depth[source] for source in node.all_input_nodes), default=0)
        depth[node] = here + (node.target in KINDS)
        if node.target not in KINDS:
            continue
        size = _bytes(node)
        key = (node.target, _value(node).dtype, here, node.args[1:])
        bucket, filled = filling.get(key, ([], 0))
        if size >= limit or filled + size > limit or not bucket:
            found.append(bucket := [])
            filled = 0
        bucket.append(node)
        if size < limit:
            filling[key] = (bucket, filled + size)
    return found


def _value(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _bytes(node: fx.Node) -> int:
    """The larger of what goes in and what comes out."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return max(v.numel() * v.element_size() for v in (_value(node), _value(source)))


class _Rewriter:
    """Copies a graph. A bucket is emitted where the first of its members would be, after what any of them needs."""

    def __init__(self, module: fx.GraphModule, buckets: Sequence[Sequence[fx.Node]]) -> None:
        self.module, self.graph = module, fx.Graph()
        self.bucket = {node: bucket for bucket in buckets for node in bucket}
        self.env: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self.module.graph.nodes:
            if node.op == "output":
                self.emit_all(node.all_input_nodes)
                self.graph.node_copy(node, lambda n: self.env[n])
            elif node.op == "placeholder":
                self.env[node] = self.graph.node_copy(node)
        # inputs stay in order, used or not; of the rest what the output needs
        return fx.GraphModule(self.module, self.graph)

    def emit_all(self, wanted: Sequence[fx.Node]) -> None:
        stack = list(reversed(wanted))
        while stack:
            node = stack[-1]
            if node in self.env:
                stack.pop()
                continue
            needed = [s for n in self.bucket.get(node, (node,)) for s in n.all_input_nodes if s not in self.env]
            if needed:
                stack += reversed(needed)
                continue
            stack.pop()
            if node in self.bucket:
                self.merge(self.bucket[node])
            elif node.target is Op.wait_tensor.default and node.args[0] in self.bucket:
                self.env[node] = self.env[node.args[0]]  # type: ignore[index]
            else:
                self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])

    def merge(self, bucket: Sequence[fx.Node]) -> None:
        first, call = bucket[0], self.call
        parts = first.args[1] if first.target is Op.all_gather_into_tensor.default else first.args[-2]
        prepare, finish = KINDS[first.target]
        flat = [prepare(call, self.env[n.args[0]], parts) for n in bucket]  # type: ignore[index]
        wire = call(aten.reshape.default, call(aten.cat.default, flat, -1), [-1])
        result = call(Op.wait_tensor.default, call(first.target, wire, *first.args[1:]))
        sizes = [math.prod(_value(s).shape) for s in (n.args[0] for n in bucket)]  # type: ignore[arg-type]
        for node, piece in zip(bucket, finish(call, result, sizes, parts), strict=True):
            self.env[node] = call(aten.reshape.default, piece, list(_value(node).shape))

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A node, with the value that it makes for whom reads shapes."""
        node = self.graph.call_function(target, args)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = target(*values)
        return node


Call = Callable[..., fx.Node]


def _row(call: Call, x: fx.Node, parts: Any) -> fx.Node:
    return call(aten.reshape.default, x, [-1])


def _rows(call: Call, x: fx.Node, parts: Any) -> fx.Node:
    """What each rank is to get as a row."""
    return call(aten.reshape.default, x, [parts, -1])


def _as_they_lie(call: Call, result: fx.Node, sizes: list[int], parts: Any) -> list[fx.Node]:
    return _slices(call, result, sizes)


def _of_each_rank(call: Call, result: fx.Node, sizes: list[int], parts: Any) -> list[fx.Node]:
    return _slices(call, call(aten.reshape.default, result, [parts, -1]), sizes)


def _of_mine(call: Call, result: fx.Node, sizes: list[int], parts: Any) -> list[fx.Node]:
    return _slices(call, result, [n // parts for n in sizes])


def _slices(call: Call, x: fx.Node, sizes: list[int]) -> list[fx.Node]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [call(aten.slice.Tensor, x, -1, start, start + n) for start, n in zip(starts, sizes, strict=True)]


KINDS: dict[Any, tuple[Callable[..., fx.Node], Callable[..., list[fx.Node]]]] = {
    Op.all_reduce.default: (_row, _as_they_lie),
    Op.all_gather_into_tensor.default: (_row, _of_each_rank),
    Op.reduce_scatter_tensor.default: (_rows, _of_mine),
}
"""Collective → how a tensor goes into the buffer, and how the tensors come out of it."""
