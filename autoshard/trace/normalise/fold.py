"""Evaluate, once and at capture, what depends on constants and shapes only.

In: a graph in normal form. Out: the same with each such value of at most 1 MiB replaced by a constant. A constant that repeats along a
dim is stored with size 1 there and expanded, so that no batch size is baked into its contents; pointwise ops are evaluated on those small
forms, so that a 131k × 131k `mask & True` costs nothing. Buffers and parameters are never folded: their contents may change or be loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..graph import Graph, Op, Ref, map_refs
from ..interpret import call, is_pointwise
from ..legal import is_random

LIMIT = 2**20  # bytes of one folded value, as stored
WORK = 2**26  # bytes of a value that is evaluated only to evaluate others


def fold(captured: Captured) -> Captured:
    """Replace constant values by their contents, and drop `& True`."""
    folded = {name: x for name, x in evaluate(captured).items() if x.numel() * x.element_size() <= LIMIT or name in captured.constants}
    result = _replace(captured, folded)
    return rewrite(result, AND_RULES)


def evaluate(captured: Captured) -> dict[str, Tensor]:
    """The contents of every constant value that can be evaluated within WORK, each with size 1 along the dims on which it repeats."""
    graph = captured.graph
    known = {name: compress(tensor) for name, tensor in captured.constants.items()}
    for op in graph.ops:
        if all(name in known for name in op.inputs) and is_pure(op):
            known.update(_evaluate(graph, op, known))
    return known


def is_pure(op: Op) -> bool:
    return not op.target.startswith(("autoshard.dropout_mask", "autoshard.opaque")) and not is_random(op.target)


def _evaluate(graph: Graph, op: Op, known: dict[str, Tensor]) -> dict[str, Tensor]:
    small = is_pointwise(op.target)
    if op.target == "aten.expand.default":
        return {op.name: _lead_ones(known[op.args[0].name], len(op.args[1]))}
    if op.target == "aten.full.default":
        return {op.name: torch.full((1,) * len(op.args[0]), op.args[1], dtype=getattr(torch, graph.values[op.name].tensor.dtype))}
    shapes = [graph.values[name].tensor.shape for name in op.inputs]
    sizes = [known[name].shape if small else shape for name, shape in zip(op.inputs, shapes, strict=True)]
    outs = [graph.values[name].tensor for name in op.outs]
    bound = _broadcast_bytes(sizes, outs[0].bytes // max(outs[0].numel, 1)) if small else max(out.bytes for out in outs)
    if bound > WORK:
        return {}
    args, kwargs = map_refs(
        (op.args, op.kwargs), lambda ref: known[ref.name] if small else known[ref.name].expand(graph.values[ref.name].tensor.shape)
    )
    found = call(op.target, args, kwargs, "cpu")
    results = found if isinstance(found, tuple) else (found,)
    return {name: compress(_lead_ones(result, len(out.shape))) for name, out, result in zip(op.outs, outs, results, strict=True)}


def _lead_ones(x: Tensor, ndim: int) -> Tensor:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _broadcast_bytes(shapes: list[tuple[int, ...]], itemsize: int) -> int:
    n = itemsize
    for size in torch.broadcast_shapes(*shapes):
        n *= size
    return n


def compress(x: Tensor) -> Tensor:
    """
    >>> compress(torch.tensor([[1, 2], [1, 2]]))
    tensor([[1, 2]])
    """
    for dim, size in enumerate(x.shape):
        if size > 1 and bool((x == x.narrow(dim, 0, 1)).all()):
            x = x.narrow(dim, 0, 1)
    return x.contiguous()


def _replace(captured: Captured, known: dict[str, Tensor]) -> Captured:
    b = Builder(captured)
    graph = captured.graph
    new: dict[str, Ref] = {v.name: Ref(v.name) for v in graph.sources("param", "buffer", "constant", "input")}

    def ref(name: str) -> Ref:
        if name not in new:
            new[name] = b.expand(b.constant(known[name]), graph.values[name].tensor.shape)
        return new[name]

    for op in graph.ops:
        if all(out in known for out in op.outs):
            continue
        b.at = op
        args, kwargs = map_refs((op.args, op.kwargs), lambda r: ref(r.name))
        result = b.copy(op, args, kwargs)
        new.update(zip(op.outs, result if isinstance(result, tuple) else (result,), strict=True))
    b.at = None
    outputs = {k: ref(v).name for k, v in graph.outputs.items()}
    updates = {k: ref(v).name for k, v in graph.updates.items()}
    return b.finish(ref(graph.loss).name, outputs, updates)


def _and(b: Builder, x: Any, y: Any) -> Any:
    for kept, other in ((x, y), (y, x)):
        if isinstance(other, Ref) and isinstance(kept, Ref) and _always_true(b, other):
            shape = torch.broadcast_shapes(b.shape(kept), b.shape(other))
            return b.expand(kept, tuple(shape))
    return NotImplemented


def _always_true(b: Builder, x: Ref) -> bool:
    while (wide := b.made_by(x, "aten.expand.default")) is not None:
        x = wide.args[0]
    return x.name in b.constants and b.dtype(x) == "bool" and bool(b.constants[x.name].all())


AND_RULES: dict[str, Rule] = {"aten.bitwise_and.Tensor": _and, "aten.logical_and.default": _and}
