"""Accumulate: a backward graph that adds the gradients of parameters to sums which it is given, instead of returning them.

In: a graph whose results from `first` on are gradients of parameters. Out: the same with a placeholder more for each of these, in their
order, which it changes in place. A gradient that is a matmul (of a linear layer's weight) is added where it is made, by the kernel
`matmul_into`; any other is added, which the compiler fuses with what makes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels import accumulate as _operator  # noqa: F401  (registers it)

aten = torch.ops.aten
TURNS = (aten.t.default, aten.numpy_T.default)


def accumulating(module: fx.GraphModule, first: int) -> fx.GraphModule:
    """The graph with sums as its last inputs."""
    old = next(n for n in module.graph.nodes if n.op == "output")
    results = list(old.args[0])
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.node_copy(node)
    sums = [graph.placeholder(f"gathered_{i}") for i in range(len(results) - first)]
    products: dict[fx.Node, list[tuple[fx.Node, bool]]] = {}
    for node, into in zip(results[first:], sums, strict=True):
        product, turned = _product(node)
        products.setdefault(product, []).append((into, turned))
    needed = _needed(module.graph, results[:first], products)
    for node in module.graph.nodes:
        if node in needed and node not in env:
            env[node] = graph.node_copy(node, lambda n: env[n])
        for into, turned in products.get(node, ()):
            _add(graph, env, node, into, turned, made=node in needed)
    graph.output(tuple(env[r] if isinstance(r, fx.Node) else r for r in results[:first]))
    return fx.GraphModule(module, graph)


def _product(node: fx.Node) -> tuple[fx.Node, bool]:
    """The matmul that a gradient is, and whether it is that transposed; else the gradient itself."""
    source, turned = node, False
    while source.target in TURNS:
        source, turned = source.args[0], not turned  # type: ignore[assignment]
    return (source, turned) if source.target is aten.mm.default else (node, False)


def _needed(graph: fx.Graph, results: list[Any], products: dict[fx.Node, Any]) -> set[fx.Node]:
    """What has to be computed beside the products that are added where they are made."""
    stack = [n for n in results if isinstance(n, fx.Node)]
    for product in products:
        stack += product.all_input_nodes if product.target is aten.mm.default else [product]
    found: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _add(graph: fx.Graph, env: dict[fx.Node, fx.Node], node: fx.Node, into: fx.Node, turned: bool, made: bool) -> None:
    if node.target is not aten.mm.default or made:
        value = env[node]
        graph.call_function(aten.add_.Tensor, (into, graph.call_function(aten.t.default, (value,)) if turned else value))
        return
    a, b = (env[n] for n in node.args)  # type: ignore[index]
    if turned:  # (a b)ᵀ = bᵀ aᵀ
        a, b = (graph.call_function(aten.t.default, (n,)) for n in (b, a))
    graph.call_function(torch.ops.autoshard.matmul_into.default, (into, a, b))
