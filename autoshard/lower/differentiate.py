"""Differentiate: trace a routine with its gradients as one graph, and split it in three.

`forward` holds what the outputs need; of the rest, `backward_input` holds what the gradients of incoming values need, and
`backward_weight` what is left for the parameters (the ancestor split of zero-bubble schedules, Qi et al., 2023). What one
part hands to the next is explicit: the last outputs of `forward` are saved for the backward, those of `backward_input` are kept for
the weights. Traced on CPU fakes whatever the device: nothing is allocated.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .partition import Port, Routine
from .program import Module


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
    return _split(graph, len(primals), len(routine.outputs), tuple(grad_outputs), reached, [p.param for p in routine.inputs], key)


def _empty(port: Port) -> torch.Tensor:
    return torch.empty(port.tensor.shape, dtype=getattr(torch, port.tensor.dtype))


def _split(
    joint: fx.GraphModule, inputs: int, outputs: int, grad_outputs: tuple[int, ...], reached: list[int], is_param: list[bool], key: str
) -> Module:
    joint.graph.eliminate_dead_code()
    for node in joint.graph.nodes:
        # fakes are contiguous where what arrives at run time may not be
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
        elif node.target is torch.ops.aten.detach.default:  # nothing is differentiated any more
            node.replace_all_uses_with(node.args[0])
    joint.graph.eliminate_dead_code()
    nodes = list(joint.graph.nodes)
    holders = [n for n in nodes if n.op == "placeholder"]
    primals, tangents = holders[:inputs], holders[inputs:]
    results = list(next(n for n in nodes if n.op == "output").args[0])
    outs, grads = results[:outputs], results[outputs:]
    grad_inputs = [i for i in reached if not is_param[i]]
    grad_params = [i for i in reached if is_param[i]]
    by_index = dict(zip(reached, grads, strict=True))
    of_inputs, of_params = [by_index[i] for i in grad_inputs], [by_index[i] for i in grad_params]

    first = _with_items(_ancestors(outs), nodes)
    second = _with_items(_ancestors(of_inputs) - first, nodes)
    third = _ancestors(of_params) - first - second
    later = [n for n in nodes if n in second or n in third]
    saved = _needed_from(first | set(primals), later, [*of_inputs, *of_params])
    tail = [n for n in nodes if n in third and n.op not in ("placeholder", "get_attr")]
    kept = _needed_from(first | second | set(primals) | set(tangents), tail, of_params)
    forward = _extract(joint, primals, nodes, first, [*outs, *saved])
    if not reached:
        return Module(forward, None, None, outputs, (), (), (), key)
    backward_input = _extract(joint, [*saved, *tangents], nodes, second, [*of_inputs, *kept])
    backward_weight = _extract(joint, kept, nodes, third, of_params) if grad_params else None
    return Module(forward, backward_input, backward_weight, outputs, grad_outputs, tuple(grad_inputs), tuple(grad_params), key)


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
