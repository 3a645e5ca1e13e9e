"""Biases are added to a matmul's result as it comes, before it is shaped and split.

In: a traced graph in which views are reshapes. Out: the same values; where `reshape(x @ w) + b` stood there is `reshape(x @ w + b)`, and
where merged linears' parts each got their bias, the one result gets all of them. So the compiler finds product and sum side by side and
takes one kernel for both, wherever what reads the sum isn't fused with it anyway: a projection that goes straight into attention costs no
pass of its own for its bias.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

aten = torch.ops.aten
SPLIT = aten.split_with_sizes.default


def early_biases(graph: fx.Graph) -> None:
    """In place; whatever isn't such a sum stays."""
    for node in list(graph.nodes):
        if node.target is aten.add.Tensor and (found := _biased(node)) is not None:
            whole, bias = found
            if _product(whole) is not None:
                node.replace_all_uses_with(_added(graph, node, whole, [bias]))
        elif node.target is SPLIT:
            _split(graph, node)
    graph.eliminate_dead_code()


def _biased(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, b) of x + b, where b is an input of one dim, x's last."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    for x, b in (node.args, node.args[::-1]):
        assert isinstance(x, fx.Node) and isinstance(b, fx.Node)
        one, other = _shape(x), _shape(b)
        if b.op == "placeholder" and other is not None and one is not None and len(other) == 1 and len(one) > 1 and one[-1] == other[0]:
            return (x, b) if x.meta["val"].dtype == b.meta["val"].dtype else None
    return None


def _product(node: fx.Node) -> fx.Node | None:
    """The matmul that a value is, but for reshapes that keep its last dim, if nobody else reads it."""
    last = _shape(node)
    while len(node.users) == 1 and _shape(node) is not None and _shape(node)[-1:] == (last or ())[-1:]:  # type: ignore[index]
        if node.target is aten.mm.default:
            return node
        if node.target is not aten.reshape.default or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return None


def _split(graph: fx.Graph, node: fx.Node) -> None:
    """Parts of the last dim that all get a bias, and are read for that alone."""
    whole, dim = node.args[0], node.args[2] if len(node.args) > 2 else 0
    if not isinstance(whole, fx.Node) or _product(whole) is None or dim not in (-1, len(_shape(whole) or ()) - 1):
        return
    parts = sorted(node.users, key=lambda user: user.args[1])  # type: ignore[arg-type, return-value]
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    if [p.args[1] for p in parts] != list(range(len(sizes))) or any(p.target is not operator.getitem or len(p.users) != 1 for p in parts):
        return
    sums = [next(iter(p.users)) for p in parts]
    found = [_biased(s) if s.target is aten.add.Tensor else None for s in sums]
    if any(f is None or f[0] is not p for f, p in zip(found, parts, strict=True)):
        return
    node.replace_input_with(whole, _added(graph, node, whole, [f[1] for f in found if f is not None]))
    for s, p in zip(sums, parts, strict=True):
        s.replace_all_uses_with(p)
        graph.erase_node(s)


def _added(graph: fx.Graph, before: fx.Node, whole: fx.Node, biases: list[fx.Node]) -> fx.Node:
    """`whole` with its biases, added to the matmul."""
    product = _product(whole)
    assert product is not None
    meta = {k: v for k, v in before.meta.items() if k == "stack_trace"}

    def made(target: object, *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])  # type: ignore[type-var]
        node.meta = {**meta, "val": target(*values)}  # type: ignore[operator]
        return node

    with graph.inserting_before(before):
        bias = biases[0] if len(biases) == 1 else made(aten.cat.default, biases)
        total = made(aten.add.Tensor, product, bias)
        return total if whole is product else made(aten.reshape.default, total, list(_shape(whole) or ()))


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
