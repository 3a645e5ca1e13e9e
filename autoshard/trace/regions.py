"""Flatten the nested graphs of an exported program, and fold what a static graph can't hold into opaque ops.

`inline_regions`: grad-mode (and disabled autocast) regions are inlined, with a detach wherever a value made without gradients is used with
gradients. `fold_dynamic`: each minimal region of values with data-dependent sizes, and each other higher-order op, becomes one
`autoshard.opaque` call of an fx.GraphModule between values of static shape.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..errors import CaptureError
from . import primitives
from .provenance import source_of

GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(module: fx.GraphModule, enabled: bool = True) -> None:
    """Inline every region of `module`, in place. `enabled`: whether gradients are on outside of them."""
    made_without: set[fx.Node] = set()
    _inline(module, module.graph, enabled, made_without)
    _cut_writes(module.graph, made_without)
    _cut_gradients(module.graph, made_without)
    module.graph.lint()
    module.recompile()


def _inline(owner: fx.GraphModule, graph: fx.Graph, enabled: bool, made_without: set[fx.Node]) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (GRAD, AUTOCAST):
            _inline_one(owner, node, enabled, made_without)
        elif not enabled:
            made_without.add(node)


def _inline_one(owner: fx.GraphModule, node: fx.Node, enabled: bool, made_without: set[fx.Node]) -> None:
    handle: Any
    inner_enabled: Any
    if node.target is GRAD:
        inner_enabled, handle, *args = node.args
    else:
        device, dtype, active, _, handle, *args = node.args
        inner_enabled = enabled
        if active:
            raise CaptureError(
                f"a torch.autocast({device!r}, {dtype}) region is not supported",
                where=_region_source(owner, handle),
                hint="cast the model (model.to(torch.bfloat16)), or let the plan choose the precision",
            )
    inner = getattr(owner, str(handle.target))
    _copy_region(owner, node, inner, args, bool(inner_enabled), made_without)
    if not handle.users:
        owner.graph.erase_node(handle)


def _region_source(owner: fx.GraphModule, handle: fx.Node) -> str:
    inner = getattr(owner, str(handle.target))
    return next((s for n in inner.graph.nodes if n.op == "call_function" and (s := source_of(n))), "")


def _copy_region(
    owner: fx.GraphModule, node: fx.Node, inner: fx.GraphModule, args: Iterable[Any], enabled: bool, made_without: set[fx.Node]
) -> None:
    """Replace `node` by the nodes of `inner`, which it calls with `args`."""
    graph, env = node.graph, dict(zip(inner.graph.find_nodes(op="placeholder"), args, strict=True))
    result: Any = ()
    with graph.inserting_before(node):
        for n in inner.graph.nodes:
            if n.op == "placeholder":
                continue
            if n.op == "output":
                result = fx.map_arg(n.args[0], env.__getitem__)
            elif n.op == "get_attr":
                name = f"{node.name}_{str(n.target).replace('.', '_')}"
                setattr(owner, name, _attribute(inner, str(n.target)))
                env[n] = graph.get_attr(name)
            else:
                env[n] = graph.node_copy(n, env.__getitem__)
    for use in list(node.users):
        assert use.target is operator.getitem
        use.replace_all_uses_with(result[use.args[1]])
        graph.erase_node(use)
    graph.erase_node(node)
    for copy in [env[n] for n in inner.graph.nodes if n.op == "call_function"]:
        if copy.target in (GRAD, AUTOCAST):
            _inline_one(owner, copy, enabled, made_without)
        elif not enabled:
            made_without.add(copy)


def _attribute(module: torch.nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _cut_writes(graph: fx.Graph, made_without: set[fx.Node]) -> None:
    """An in-place op with gradients off: what it writes carries no gradient, and what it writes into must have none to lose."""
    carries = _gradient_carriers(graph, made_without)
    for node in list(graph.nodes):
        if node not in made_without or not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if not isinstance(value, fx.Node) or not _floating(value):
                continue
            if argument.alias_info is not None and argument.alias_info.is_write:
                if value in carries:
                    raise CaptureError(
                        f"{node.target} changes a tensor that has a gradient, inside no_grad",
                        where=source_of(node),
                        hint="make a new tensor instead of writing into that one",
                    )
            else:
                _detach_before(graph, node, value)


def _gradient_carriers(graph: fx.Graph, made_without: set[fx.Node]) -> set[fx.Node]:
    """Floating values that may depend on a parameter through ops with gradients on, and views of them."""
    carries: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if isinstance(value := node.meta.get("val"), torch.Tensor) and value.requires_grad:
                carries.add(node)
        elif node.op == "call_function" and _floating(node) and node.target is not torch.ops.aten.detach.default:
            if any(i in carries for i in node.all_input_nodes) and (node not in made_without or _is_view(node)):
                carries.add(node)
    return carries


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _detach_before(graph: fx.Graph, node: fx.Node, value: fx.Node) -> None:
    with graph.inserting_before(node):
        cut = graph.call_function(torch.ops.aten.detach.default, (value,))
    cut.meta = dict(value.meta)
    node.replace_input_with(value, cut)


def _cut_gradients(graph: fx.Graph, made_without: set[fx.Node]) -> None:
    """Detach each value made with gradients off where it is used with gradients on."""
    for node in list(graph.nodes):
        if node not in made_without or not _floating(node):
            continue
        users = [u for u in node.users if u not in made_without]
        if not users:
            continue
        with graph.inserting_after(node):
            cut = graph.call_function(torch.ops.aten.detach.default, (node,))
        cut.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, cut)


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


# ---- data-dependent sizes

ASSERTIONS = frozenset("_assert_tensor_metadata _assert_async _assert_scalar sym_constrain_range sym_constrain_range_for_size".split())


def drop_assertions(module: fx.GraphModule) -> None:
    """Remove what export checks at run time, in place; its texts name symbols by number."""
    for node in reversed(list(module.graph.nodes)):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.split("::")[1] in ASSERTIONS:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def fold_dynamic(module: fx.GraphModule, keys: dict[str, Callable[..., Any]]) -> None:
    """Replace each minimal region of nodes with data-dependent sizes by one opaque op, in place; `keys` receives the callables."""
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    for region in _regions(module.graph, order):
        _fold(module, sorted(region, key=order.__getitem__), keys)
    module.graph.lint()
    module.recompile()


def _dynamic(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    value = node.meta.get("val")
    return any(_unbacked(v) for v in (value if isinstance(value, (tuple, list)) else (value,)))


def _unbacked(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(not isinstance(s, int) and free_unbacked_symbols(s) for s in value.shape)
    return isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat))


def _regions(graph: fx.Graph, order: dict[fx.Node, int]) -> list[set[fx.Node]]:
    """Connected sets of dynamic nodes with their static consumers, each made convex."""
    region_of: dict[fx.Node, set[fx.Node]] = {}

    def join(a: fx.Node, b: fx.Node) -> None:
        left, right = region_of.setdefault(a, {a}), region_of.setdefault(b, {b})
        if left is not right:
            left |= right
            for n in right:
                region_of[n] = left

    for node in graph.nodes:
        if _dynamic(node):
            region_of.setdefault(node, {node})
            for user in node.users:
                if user.op != "output":
                    join(node, user)
    for region in {id(r): r for r in region_of.values()}.values():
        for node in _between(graph, region):
            join(next(iter(region)), node)
    return sorted({id(r): r for r in region_of.values()}.values(), key=lambda r: min(map(order.__getitem__, r)))


def _between(graph: fx.Graph, region: set[fx.Node]) -> list[fx.Node]:
    """Nodes outside that depend on the region and that the region depends on."""
    below: set[fx.Node] = set()
    for node in graph.nodes:
        if any(i in region or i in below for i in node.all_input_nodes):
            below.add(node)
    above: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if any(u in region or u in above for u in node.users):
            above.add(node)
    return [n for n in graph.nodes if n in below and n in above and n not in region]


def _fold(module: fx.GraphModule, nodes: list[fx.Node], keys: dict[str, Callable[..., Any]]) -> None:
    inside = set(nodes)
    outer = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    inputs = [i for i in outer if i.op != "get_attr" or isinstance(i.meta.get("val"), torch.Tensor)]
    outputs = [n for n in nodes if any(u not in inside for u in n.users)]
    inner, env = fx.Graph(), {}
    for n in outer:
        env[n] = inner.placeholder(n.name) if n in inputs else inner.get_attr(str(n.target))
    for n in nodes:
        env[n] = inner.node_copy(n, env.__getitem__)
    inner.output(tuple(env[n] for n in outputs))
    body = fx.GraphModule(module, inner)
    values = [n.meta["val"] for n in outputs]
    if not all(isinstance(v, torch.Tensor) for v in values):
        raise CaptureError("a data-dependent value that isn't a tensor is used across the model", where=source_of(nodes[0]))
    text = body.code + "".join(f"{tuple(v.shape)}{v.dtype}" for v in [i.meta["val"] for i in inputs] + values)
    entry = primitives.Opaque(text, body, tuple(tuple(v.shape) for v in values), tuple(v.dtype for v in values))
    key = primitives.register_opaque("region_" + hashlib.sha256(text.encode()).hexdigest()[:16], entry)
    keys[key] = body
    _replace(module.graph, nodes, inputs, outputs, key)


def _replace(graph: fx.Graph, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node], key: str) -> None:
    values, inside = [n.meta["val"] for n in outputs], set(nodes)
    with graph.inserting_before(outputs[0]):
        call = graph.call_function(torch.ops.autoshard.opaque.default, (key, inputs))
        call.meta = {**{k: v for k, v in nodes[0].meta.items() if k in ("stack_trace", "nn_module_stack")}, "val": values}
        items = [graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))]
    for node, item in zip(outputs, items, strict=True):
        item.meta = dict(node.meta)
        node.replace_all_uses_with(item, delete_user_cb=lambda u: u not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)
    _sort(graph)


def _sort(graph: fx.Graph) -> None:
    """Order the nodes topologically, moving only those that stand before one of their inputs."""
    done: set[fx.Node] = set()
    waiting = list(graph.nodes)
    last = graph._root
    while waiting:
        later = []
        for node in waiting:
            if all(i in done for i in node.all_input_nodes):
                last.append(node)
                last = node
                done.add(node)
            else:
                later.append(node)
        assert len(later) < len(waiting), "cyclic region"
        waiting = later
