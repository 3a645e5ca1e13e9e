"""Rows that a model sorts before a grouped product, and puts back behind it, stay where they are.

In: a graph in which rows are sorted by an index (`ids.sort()`), multiplied group by group (`_grouped_mm`), and brought back into their old
order or summed over their sources. Out: `autoshard.experts(x, w, ids)` on rows as they came, without the sort: a sort is a
whole-batch op that no mesh axis and no microbatch could cut, while products whose rows choose their matrix can be. Which
order is good for a device is the lowering's choice.

A permutation of rows commutes with all that works row by row (`trace/rows.py`): f(x[order])[inverse] = f(x).
"""

from __future__ import annotations

from typing import Any

from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..graph import Op, Ref, map_refs
from ..rows import row_operands

CAST = "aten._to_copy.default"


def grouped(captured: Captured) -> Captured:
    """Undo sorts around grouped products."""
    if not any(op.target == "aten._grouped_mm.default" for op in captured.graph.ops):
        return captured
    rules: dict[str, Rule] = {
        "aten._grouped_mm.default": product,
        "aten.index.Tensor": put_back,
        "aten.index_put.default": put,
        "aten.index_add.default": add,
    }
    return rewrite(captured, rules)


def product(b: Builder, x: Ref, w: Ref, ends: Ref | None = None, bias: Any = None, dtype: Any = None) -> Any:
    """Rows of a group lie together, groups in the order of a sorted index."""
    if ends is None or bias is not None or (b.ndim(x), b.ndim(w)) != (2, 3) or (dtype or b.dtype(x)).removeprefix("torch.") != b.dtype(x):
        return NotImplemented
    index = _sorted_by(b, ends, b.shape(w)[0])
    if index is None or b.shape(index) != b.shape(x)[:1]:
        return NotImplemented
    return b.op("autoshard.experts.default", x, b.permute(w, (0, 2, 1)), index)


def put_back(b: Builder, x: Ref, indices: tuple[Ref | None, ...]) -> Any:
    """x[inverse], where x was made in sorted order."""
    order = _inverted(b, indices[0]) if len(indices) == 1 and isinstance(indices[0], Ref) else None
    return NotImplemented if order is None else _or_keep(unsorted(b, x, order))


def put(b: Builder, base: Ref, indices: tuple[Ref | None, ...], x: Ref, accumulate: bool = False) -> Any:
    """base[order] = x, every row of base."""
    if accumulate or len(indices) != 1 or not isinstance(indices[0], Ref) or b.shape(base) != b.shape(x) or not _order(b, indices[0]):
        return NotImplemented
    return _or_keep(unsorted(b, x, indices[0]))


def add(b: Builder, base: Ref, dim: int, index: Ref, x: Ref, alpha: float = 1) -> Any:
    """base[order // k] += x: each row of base has k rows of x."""
    order, k = _source(b, index)
    if dim != 0 or alpha != 1 or order is None or b.shape(base)[0] * k != b.shape(x)[0] or b.dtype(base) != b.dtype(x):
        return NotImplemented
    rows = unsorted(b, x, order)
    if rows is None:
        return NotImplemented
    each = b.reshape(rows, (b.shape(base)[0], k, *b.shape(x)[1:]))
    return b.op("aten.add.Tensor", base, b.op("aten.sum.dim_IntList", each, (1,), False))


def _or_keep(found: Ref | None) -> Any:
    return NotImplemented if found is None else found


def unsorted(b: Builder, x: Ref, order: Ref) -> Ref | None:
    """The value of which x is the rows in `order`, if x comes of products with chosen matrices; what it takes is emitted."""
    made: dict[str, Ref | None] = {}
    stack, products = [x.name], 0
    while stack:  # in post-order, without recursion: chains may be long
        name = stack[-1]
        if name in made:
            stack.pop()
            continue
        leaf = _leaf(b, name, order)
        op = b.producer.get(name)
        rows = row_operands(op, {n: b.graph.values[n].tensor.shape for n in (*op.inputs, *op.outs)}) if op and leaf is None else ()
        waiting = [n for n in rows if n not in made]
        if waiting and not any(made.get(n, x) is None for n in rows):
            stack += waiting
            continue
        stack.pop()
        if leaf is not None or op is None or not rows or any(made[n] is None for n in rows):
            made[name] = leaf
            continue
        products += op.target == "autoshard.experts.default"
        made |= zip(op.outs, _again(b, op, made, rows), strict=True)
    return made[x.name] if products else None


def _again(b: Builder, op: Op, made: dict[str, Ref | None], rows: tuple[str, ...]) -> tuple[Ref, ...]:
    args, kwargs = map_refs((op.args, op.kwargs), lambda ref: made[ref.name] if ref.name in rows else ref)
    b.at, at = op, b.at  # it stands for the user's line of the old one
    found = b.op(op.target, *args, **kwargs)
    b.at = at
    return found if isinstance(found, tuple) else (found,)


def _leaf(b: Builder, name: str, order: Ref) -> Ref | None:
    """Where rows enter the order: the sorted index itself, or x[order // k]."""
    op, n = b.producer.get(name), b.shape(order)[0]
    if op is None:
        return None
    if op.target == "aten.sort.default":
        return op.args[0] if name == op.outs[0] and order.name == op.outs[1] else None
    if op.target != "aten.index.Tensor" or len(op.args[1]) != 1 or not isinstance(op.args[1][0], Ref):
        return None
    x: Ref = op.args[0]
    found, k = _source(b, op.args[1][0])
    if found != order or not b.ndim(x) or b.shape(x)[0] * k != n:
        return None
    if k == 1:
        return x
    first, *rest = b.shape(x)
    return b.reshape(b.expand(b.reshape(x, (first, 1, *rest)), (first, k, *rest)), (n, *rest))


def _source(b: Builder, index: Ref) -> tuple[Ref | None, int]:
    """(order, k) of an index order // k."""
    divided = b.made_by(index, "aten.floor_divide.default")
    if divided is not None and isinstance(divided.args[1], int) and divided.args[1] > 0:
        return (divided.args[0] if _order(b, divided.args[0]) else None), divided.args[1]
    return (index if _order(b, index) else None), 1


def _order(b: Builder, ref: Ref) -> Op | None:
    """The ascending sort of a list whose places these are."""
    op = b.made_by(ref, "aten.sort.default")
    rising = op is not None and ref.name == op.outs[1] and b.ndim(ref) == 1 and not any(op.args[2:]) and not op.kwargs.get("descending")
    return op if rising else None


def _inverted(b: Builder, ref: Ref) -> Ref | None:
    """The order of which this is the inverse: places sorted again, or 0, 1, 2, … written to them."""
    if (again := _order(b, ref)) is not None:
        return again.args[0] if _order(b, again.args[0]) else None
    written = b.made_by(ref, "aten.index_put.default")
    if written is None or len(written.args[1]) != 1 or any(written.args[3:]) or not isinstance(written.args[1][0], Ref):
        return None
    order, value = written.args[1][0], b.constants.get(written.args[2].name)
    counting = value is not None and value.shape == b.shape(order) and bool((value == value.new_ones(len(value)).cumsum(0) - 1).all())
    return order if counting and b.shape(ref) == b.shape(order) and _order(b, order) else None


def _sorted_by(b: Builder, ends: Ref, count: int) -> Ref | None:
    """The sorted index of which these are the ends of 0, 1, …, count - 1: running sums of a histogram."""
    total = b.made_by(_uncast(b, ends), "aten.cumsum.default")
    bars = b.made_by(_uncast(b, total.args[0]), "aten.histc.default") if total is not None else None
    if bars is None or count < 2 or tuple(bars.args[1:]) != (count, 0, count - 1):
        return None
    index = _uncast(b, bars.args[0])
    for op in b.producer.values():
        if op.target == "aten.sort.default" and _order(b, Ref(op.outs[1])) and index in (op.args[0], Ref(op.outs[0])):
            return Ref(op.outs[0])
    return None


def _uncast(b: Builder, ref: Ref) -> Ref:
    while (cast := b.made_by(ref, CAST)) is not None:
        ref = cast.args[0]
    return ref
