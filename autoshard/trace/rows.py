"""Which ops work row by row: row i of each result follows from row i of those operands that have rows, and from operands without rows.

In: an op, the shapes of its values. Out: the operands that have rows. Whatever permutes rows commutes with such an op, so that a chain of
them may run in any order of rows; `normalise/sorted.py` takes rows out of a sorted order so, the lowering puts them into one.

>>> add = Op("y", "aten.add.Tensor", (Ref("x"), Ref("bias")), {}, ("y",))
>>> row_operands(add, {"x": (6, 4), "bias": (4,), "y": (6, 4)})
('x',)
>>> row_operands(Op("y", "aten.sum.dim_IntList", (Ref("x"), (0,), True), {}, ("y",)), {"x": (6, 4), "y": (1, 4)})
()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .graph import Op, Ref
from .interpret import is_pointwise

Shape = tuple[int, ...]


def row_operands(op: Op, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """The names of the operands whose dim 0 is that of every result, row by row; () if the op isn't like that."""
    outs = [shapes[name] for name in op.outs]
    if not all(outs) or len({out[0] for out in outs}) != 1:
        return ()
    n, first = outs[0][0], op.args[0] if op.args else None
    if op.target == "autoshard.experts.default":
        return _once([op.inputs[0], op.inputs[2]])
    if op.target in ("aten.index.Tensor", "aten.embedding.default"):  # rows of a table
        chosen = op.inputs[1:]
        alone = op.target == "aten.embedding.default" or len(op.args[1]) == 1
        return tuple(chosen) if len(chosen) == 1 and alone and shapes[chosen[0]] and chosen[0] != op.inputs[0] else ()
    if op.target == "aten.cat.default":
        return _once(op.inputs) if op.args[1] != 0 else ()
    if is_pointwise(op.target):
        rank = len(outs[0])
        rows = [name for name in op.inputs if len(shapes[name]) == rank and shapes[name][0] == n]
        others = [shapes[name] for name in op.inputs if name not in rows]
        return _once(rows) if all(len(s) < rank or s[0] == 1 for s in others) else ()
    if not isinstance(first, Ref) or not shapes[first.name] or shapes[first.name][0] != n or op.inputs.count(first.name) != 1:
        return ()
    return (first.name,) if _keeps_rows(op, len(shapes[first.name])) else ()


def _keeps_rows(op: Op, rank: int) -> bool:
    """Of ops whose first operand has as many rows as the result."""
    name, rest = op.target.split(".")[1], op.args[1:]
    if name in ("reshape", "detach"):
        return True
    if name == "permute":
        return bool(rest[0][0] == 0)
    if name == "expand":
        return len(rest[0]) == rank
    if name == "slice":
        return bool(rest[0] != 0)
    if name == "split_with_sizes":
        return bool(rest[1] != 0)
    if name in ("softmax", "log_softmax"):
        return bool(rest[0] % rank != 0)
    if name in ("sum", "mean", "amax", "amin"):
        return 0 not in _dims(rest, rank)
    if name == "layer_norm":
        return len(rest[0]) < rank
    return name == "linear" and rank > 1


def _dims(rest: tuple[Any, ...], rank: int) -> set[int]:
    """Those of a reduction; all, where none is named."""
    return {d % rank for d in rest[0]} if rest and isinstance(rest[0], tuple) and rest[0] else set(range(rank))


def _once(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
