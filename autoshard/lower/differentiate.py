"""Differentiate: trace a routine with its gradients as one graph, and split it in three.

`forward` holds what the outputs need; of the rest, `backward_input` holds what the gradients of incoming values need, and
`backward_weight` what is left for the parameters (the ancestor split of zero-bubble schedules, Qi et al., 2023). What one
part hands to the next is explicit: the last outputs of `forward` are saved for the backward, those of `backward_input` are kept for
the weights; `recompute` says what is made again instead. `backward` is both backward parts as one graph, for schedules that run them
at once. Traced on CPU fakes whatever the device: nothing is allocated.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .biases import early_biases
from .program import Module
from .recompute import made_again, parts_copied
from .routine import Port, Routine


def differentiate(routine: Routine, key: str = "") -> Module:
    """The routine's module. Raises nothing of its own: what can't be traced fails with torch's error and the routine's label."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        primals = [_empty(p) for p in routine.inputs]
        wanted = [i for i, p in enumerate(routine.inputs) if p.grad]
        candidates = [i for i, p in enumerate(routine.outputs) if p.grad]
        tangents = [_empty(routine.outputs[i]) for i in candidates]
        grad_outputs: list[int] = []
        reached: list[int] = []

        def joint(primals: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[torch.Tensor]:
            leaves = [p.detach().requires_grad_(True) if i in wanted else p for i, p in enumerate(primals)]
            with torch.enable_grad():
                outs = routine(*leaves)
            given = [(i, t) for i, t in zip(candidates, tangents, strict=True) if outs[i].requires_grad]
            found: Sequence[torch.Tensor | None] = []
            if given and wanted:
                found = torch.autograd.grad(
                    [outs[i] for i, _ in given], [leaves[i] for i in wanted], [t for _, t in given], allow_unused=True
                )
            grad_outputs[:] = [i for i, _ in given]
            reached[:] = [i for i, g in zip(wanted, found, strict=False) if g is not None]
            return [*(o.detach() for o in outs), *(g for g in found if g is not None)]

        graph = make_fx(joint, tracing_mode="real", _error_on_data_dependent_ops=True)(primals, tangents)
    for i in reversed(range(len(candidates))):
        if candidates[i] not in grad_outputs:
            holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
            graph.graph.erase_node(holders[len(primals) + i])
    return _split(graph, routine.inputs, len(routine.outputs), tuple(grad_outputs), reached, key)


def _empty(port: Port) -> torch.Tensor:
    return torch.empty(port.tensor.shape, dtype=getattr(torch, port.tensor.dtype))


def _split(
    joint: fx.GraphModule, ports: Sequence[Port], outputs: int, grad_outputs: tuple[int, ...], reached: list[int], key: str
) -> Module:
    _without_detach(joint.graph)
    early_biases(joint.graph)
    nodes = list(joint.graph.nodes)
    holders = [n for n in nodes if n.op == "placeholder"]
    primals, tangents = holders[: len(ports)], holders[len(ports) :]
    results = list(next(n for n in nodes if n.op == "output").args[0])
    outs, grads = results[:outputs], results[outputs:]
    grad_inputs = [i for i in reached if not ports[i].param]
    grad_params = [i for i in reached if ports[i].param]
    by_index = dict(zip(reached, grads, strict=True))
    of_inputs, of_params = [by_index[i] for i in grad_inputs], [by_index[i] for i in grad_params]

    first = _with_items(_ancestors(outs), nodes)
    forward_only = _extract(joint, primals, nodes, first, outs)
    if not reached:
        return Module(forward_only, None, None, outputs, (), (), (), key)
    second = _with_items(_ancestors(of_inputs) - first, nodes)
    third = _ancestors(of_params) - first - second
    free = {n for n, p in zip(primals, ports, strict=True) if p.param or not p.grad}
    constants = {n for n in nodes if n.op == "get_attr"}
    later = [n for n in nodes if n in second or n in third]
    again = made_again(first - constants, primals, free, [n for n in later if n not in constants], grads, outs) - constants
    again = _with_items(again, nodes)
    inner = first - again
    saved = _needed_from(inner | set(primals), [n for n in nodes if n in second or n in third or n in again], grads)
    copies = parts_copied(joint.graph, saved, first, outs)
    forward = _extract(joint, primals, list(joint.graph.nodes), first | set(copies.values()), [*outs, *(copies.get(n, n) for n in saved)])
    # what is made again for the weights alone, or for both, is made again in each
    tail = third - constants | (again & {n for n in of_params if isinstance(n, fx.Node)})
    for node in reversed(nodes):
        if node in again and any(user in tail for user in node.users):
            tail.add(node)
    kept = _needed_from(inner | second | set(primals) | set(tangents), [n for n in nodes if n in tail], of_params)
    backward_input = _extract(joint, [*saved, *tangents], nodes, second | again, [*of_inputs, *kept])
    if not grad_params:
        return Module(forward, backward_input, None, outputs, grad_outputs, tuple(grad_inputs), (), key)
    backward_weight = _extract(joint, kept, nodes, tail, of_params)
    backward = _extract(joint, [*saved, *tangents], nodes, second | third | again, [*of_inputs, *of_params])
    return Module(forward, backward_input, backward_weight, outputs, grad_outputs, tuple(grad_inputs), tuple(grad_params), key, backward)


def _without_detach(graph: fx.Graph) -> None:
    """Nothing here is differentiated again, so that a detach is its input. Views become reshapes: fakes are contiguous where what arrives
    at run time may not be."""
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    graph.eliminate_dead_code()


def _ancestors(nodes: Sequence[object]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [n for n in nodes if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return {n for n in found if n.op != "placeholder"}


def _with_items(chosen: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """With every output of a chosen multi-output op, so that what is handed on is always a tensor."""
    return chosen | {n for n in nodes if n.target is operator.getitem and n.args[0] in chosen}


def _needed_from(available: set[fx.Node], users: list[fx.Node], results: Sequence[object]) -> list[fx.Node]:
    """What of `available` the users, or the results themselves, take; in the order of first use."""
    found: dict[fx.Node, None] = {}
    for node in users:
        for source in node.all_input_nodes:
            if source in available and source.op != "get_attr":
                found[source] = None
    for result in results:
        if isinstance(result, fx.Node) and result in available and result not in found:
            found[result] = None
    return list(found)


def _extract(
    joint: fx.GraphModule, inputs: list[fx.Node], nodes: list[fx.Node], chosen: set[fx.Node], results: Sequence[object]
) -> fx.GraphModule:
    """A graph of its own: `inputs` become placeholders, `chosen` nodes are copied in order."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        if node not in env:
            env[node] = graph.placeholder(node.name)
            env[node].meta = dict(node.meta)
        else:
            graph.placeholder(node.name + "_again")
    for node in nodes:
        if node in env or not (node in chosen or (node.op == "get_attr")):
            continue
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[r] for r in results if isinstance(r, fx.Node)))
    graph.eliminate_dead_code()
    module = fx.GraphModule(joint, graph)
    return module
