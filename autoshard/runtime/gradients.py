"""Gradients of parameters: when they are complete, which tensors hold nothing else, and how they come into `.grad`.

In: a rank's calls and instruction list; gradients as a step makes them. `completed` and `unshared` are worked out once, before any step.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from ..lower.program import Call, Module
from ..plan.schedules import Action

aten = torch.ops.aten
Moment = tuple[Action, int]
"""After a call has run backward in an action."""

_MAY_VIEW = frozenset({aten.reshape.default, aten.contiguous.default, aten.view_as.default, operator.getitem})
"""Those whose schema doesn't say that the result may be the argument's memory."""


def completed(instructions: Sequence[Action], calls: Sequence[Call], maker: Mapping[str, int]) -> dict[Moment, list[int]]:
    """Which gathers' gradients have all their parts at a moment, and not before. `maker`: a parameter as used → the gather that makes it.

    It follows from the instruction list and the calls, which are the same on all ranks of a stage; groups of dp and tp lie in one stage.
    So their ranks issue a bucket's reduction at the same place among their other collectives. And no rank waits for ever: `schedules.check`
    finds an order in which one replica's stages get through their lists, which all replicas can follow step by step.
    """
    parts: dict[str, list[tuple[int, set[int]]]] = {}
    for kind in ("B", "I", "W"):
        found = []
        for i, call in enumerate(calls):
            numbers = [*(call.module.grad_inputs if kind in "BI" else ()), *(call.module.grad_params if kind in "BW" else ())]
            found.append((i, {maker[call.inputs[k]] for k in numbers if call.inputs[k] in maker}))
        parts[kind] = [entry for entry in found if entry[1]]
    left = {g for entries in parts.values() for _, gathers in entries for g in gathers}
    moments: dict[Moment, list[int]] = {}
    for action in reversed(instructions):
        if not left:
            break
        for i, gathers in parts.get(action.kind, ()):  # backwards in time: the first call is the last to run
            if here := sorted(gathers & left, reverse=True):
                moments[action, i] = here
                left -= gathers
    return moments


def unshared(calls: Sequence[Call], names: Mapping[str, int]) -> set[str]:
    """Of these parameters as used, those whose gradient, fresh from any backward, is memory that nothing else speaks of."""
    known: dict[int, tuple[list[bool], list[bool]]] = {}
    shared: set[str] = set()
    for call in calls:
        module = call.module
        if id(module) not in known:
            known[id(module)] = _owned(module)
        for numbers, owned in zip((module.grad_inputs, module.grad_params), known[id(module)], strict=True):
            shared |= {call.inputs[k] for k, own in zip(numbers, owned, strict=True) if not own}
    return set(names) - shared


def _owned(module: Module) -> tuple[list[bool], list[bool]]:
    """Of the gradients of inputs and of parameters, whichever graph makes them."""
    n = len(module.grad_inputs)
    inputs, params = [True] * n, [True] * len(module.grad_params)
    for graph, first in ((module.backward, 0), (module.backward_input, 0), (module.backward_weight, n)):
        if graph is not None:
            both = _own_outputs(graph)
            whole = graph is module.backward
            for i, own in enumerate(both, first):
                if i < n:
                    inputs[i] &= own
                elif (whole or first) and i - n < len(params):
                    params[i - n] &= own
    return inputs, params


def _own_outputs(graph: fx.GraphModule) -> list[bool]:
    results = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    bases = [_base(n) if isinstance(n, fx.Node) else None for n in (results if isinstance(results, (tuple, list)) else (results,))]
    return [b is not None and b.op == "call_function" and hasattr(b.target, "_schema") and bases.count(b) == 1 for b in bases]


def _base(node: fx.Node) -> fx.Node:
    """Whose memory a value may be."""
    while node.op == "call_function" and node.all_input_nodes and (node.target in _MAY_VIEW or _views(node.target)):
        node = node.all_input_nodes[0]
    return node


def _views(target: object) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


# ---- sums, and into .grad -------------------------------------------------------------------------------------------


def add(into: dict[str, Tensor], name: str, grad: Tensor | None) -> None:
    """Never in place: a gradient may be a view of something else, or stand for two values at once."""
    if grad is not None:
        into[name] = into[name] + grad if name in into else grad


def wide(grad: Tensor) -> Tensor:
    return grad.to(sum_dtype(grad.dtype))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which gradients gather."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def place(placed: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Into `.grad`, as autograd does it: added to what is there, else as a dense tensor that shares no element with anything else.
    Gradients that fill a buffer together, without overlap, are left there."""
    fresh: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
    for param, grad in placed:
        grad = grad.to(param.dtype)
        assert grad.shape == param.shape, f"gradient of shape {tuple(grad.shape)} for a shard of {tuple(param.shape)}"
        if param.grad is not None:
            param.grad.add_(grad)
        else:
            fresh.setdefault(grad.untyped_storage().data_ptr(), []).append((param, grad))
    for sharing in fresh.values():
        own = _tiled([grad for _, grad in sharing])
        for param, grad in sharing:
            param.grad = grad if own else grad.clone(memory_format=torch.contiguous_format)


def _tiled(views: Sequence[Tensor]) -> bool:
    """Whether contiguous views of one storage lie end to end in all of it."""
    at = 0
    for view in sorted(views, key=lambda v: v.storage_offset()):
        if not view.is_contiguous() or view.storage_offset() * view.element_size() != at:
            return False
        at += view.numel() * view.element_size()
    return at == views[0].untyped_storage().nbytes()
