"""Token ids and labels that the model doesn't know, found before a step instead of inside of it.

In: a captured graph, and a global batch. Where plain torch stops at an index out of range, a table or a row of logits that is cut over
ranks has no rank that would: each takes it for another's. So what a batch alone decides of these indices is computed here, whole, as the
model computes it. (On the host: indices that are on a device already are left to it.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BatchError
from ..trace.captured import Captured
from ..trace.graph import Graph, Op, map_refs
from ..trace.interpret import call, resolve

COUNTED = {"aten.embedding.default": (0, 0, 1), "autoshard.pick.default": (0, -1, 1)}
"""Op → (the argument that is looked up in, its dim that is indexed, the argument that holds the indices)."""

COMPARED = ("aten.ne.Scalar", "aten.eq.Scalar")


@dataclass
class Lookup:
    """An op that looks up what a batch says. `path`: the ops that lead to its indices; `ignored`: indices that the model leaves out."""

    op: Op
    count: int
    index: str
    source: str
    """The argument that it comes from."""
    path: list[Op]
    ignored: set[int]


def lookups(graph: Graph) -> list[Lookup]:
    producer, found = graph.producer(), []
    for op in graph.ops:
        if op.target not in COUNTED:
            continue
        table, dim, operand = COUNTED[op.target]
        index = op.args[operand].name
        path, inputs = _ancestry(graph, producer, index)
        if path is None or len(inputs) != 1:
            continue
        # whatever the model compares the same labels with: a loss says so what it leaves out
        compared = [o for o in graph.ops if o.target in COMPARED and _ancestry(graph, producer, o.inputs[0])[1] == inputs]
        compared = compared if op.target == "autoshard.pick.default" else []
        ignored = {int(o.args[1]) for o in compared if isinstance(o.args[1], (int, float))}
        found.append(Lookup(op, graph.values[op.args[table].name].tensor.shape[dim], index, inputs.pop(), path, ignored))
    return found


def _ancestry(graph: Graph, producer: Mapping[str, Op], name: str) -> tuple[list[Op] | None, set[str]]:
    """(the ops that make a value, in order; the inputs that they begin with). None where it depends on anything but inputs."""
    needed, inputs = {name}, set[str]()
    for op in reversed(graph.ops):
        if needed.intersection(op.outs):
            if not op.target.startswith("aten.") or torch.Tag.nondeterministic_seeded in resolve(op.target).tags:  # type: ignore[attr-defined]
                return None, set()
            needed.update(op.inputs)
    for each in needed:
        if each not in producer:
            if graph.values[each].role != "input":
                return None, set()
            inputs.add(each)
    return [op for op in graph.ops if needed.intersection(op.outs)], inputs


class Limits:
    """Of one captured graph."""

    def __init__(self, captured: Captured) -> None:
        self.graph, self.lookups = captured.graph, lookups(captured.graph)

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Raises BatchError."""
        for lookup in self.lookups:
            if batch[lookup.source].device.type != "cpu":
                continue
            indices = self._indices(lookup, batch)
            good = (indices >= 0) & (indices < lookup.count)
            for value in lookup.ignored:
                good |= indices == value
            if not bool(good.all()):
                self._refuse(lookup, int(indices[~good].reshape(-1)[0]))

    def _indices(self, lookup: Lookup, batch: Mapping[str, Tensor]) -> Tensor:
        values: dict[str, Any] = {lookup.source: batch[lookup.source]}
        with torch.no_grad():
            for op in lookup.path:
                args, kwargs = map_refs((op.args, op.kwargs), lambda ref: values[ref.name])
                outs = call(op.target, args, kwargs, "cpu")
                values.update(zip(op.outs, outs if isinstance(outs, tuple) else (outs,), strict=True))
        found: Tensor = values[lookup.index]
        return found

    def _refuse(self, lookup: Lookup, value: int) -> None:
        values, source = self.graph.values, self.graph.values[lookup.source].path
        table = values[lookup.op.inputs[0]]
        what = f"the table {table.path} has {lookup.count} rows" if table.path else f"there are {lookup.count} classes"
        besides = f", or {', '.join(map(str, sorted(lookup.ignored)))} for what is left out" if lookup.ignored else ""
        raise BatchError(
            f"{source} leads to index {value}, but {what}", where=lookup.op.source, hint=f"expected 0 to {lookup.count - 1}{besides}"
        )
