"""Products with a matrix that each row chooses become one op, `autoshard.experts`, which never copies a matrix for a row.

In: a graph in which `bmm(w[index], x)` or `bmm(x, w[index])` gathers the matrices of every row first (mixtures of experts written as
batched products). Out: the same as `experts(x, w, index)`; where w's dims are the other way round, of its transpose.
"""

from __future__ import annotations

from typing import Any

from ..build import Builder, rewrite
from ..captured import Captured
from ..graph import Ref

CHOICES = ("aten.topk.default", "aten.sort.default")
"""Their second result is a place in a dim, never negative."""
KEEP = ("aten.reshape.default", "aten.permute.default", "aten.expand.default", "aten.slice.Tensor")


def experts(captured: Captured) -> Captured:
    """Recognise products with gathered matrices."""
    wrapped: dict[tuple[str, int], Ref] = {}

    def rule(b: Builder, x: Ref, y: Ref) -> Any:
        return bmm(b, x, y, wrapped)

    return rewrite(captured, {"aten.bmm.default": rule, "aten.matmul.default": rule})


def bmm(b: Builder, x: Ref, y: Ref, wrapped: dict[tuple[str, int], Ref]) -> Any:
    """`wrapped`: index and count of matrices → the index without negative numbers, one value for all products that take it."""
    rows = b.shape(x)[0] if b.ndim(x) else 1
    if b.ndim(x) != 3 or b.ndim(y) != 3 or b.shape(y)[0] != rows:
        return NotImplemented
    if b.shape(y)[2] == 1 and (chosen := _chosen(b, x)) is not None:  # [t n k] [t k 1]
        w, index = chosen
        return b.reshape(_op(b, b.reshape(y, (rows, b.shape(y)[1])), w, index, wrapped), (rows, b.shape(x)[1], 1))
    if b.shape(x)[1] == 1 and (chosen := _chosen(b, y)) is not None:  # [t 1 k] [t k n]
        w, index = chosen
        out = _op(b, b.reshape(x, (rows, b.shape(x)[2])), b.permute(w, (0, 2, 1)), index, wrapped)
        return b.reshape(out, (rows, 1, b.shape(y)[2]))
    return NotImplemented


def _op(b: Builder, x: Ref, w: Ref, index: Ref, wrapped: dict[tuple[str, int], Ref]) -> Ref:
    if not _never_negative(b, index):  # a negative index counts from the end
        count = b.shape(w)[0]
        if (index.name, count) not in wrapped:
            from_end = b.op("aten.add.Tensor", index, count)
            wrapped[index.name, count] = b.op("aten.where.self", b.op("aten.lt.Scalar", index, 0), from_end, index)
        index = wrapped[index.name, count]
    return b.op("autoshard.experts.default", x, w, index)  # type: ignore[no-any-return]


def _chosen(b: Builder, gathered: Ref) -> tuple[Ref, Ref] | None:
    """(matrices, index) if a value is matrices[index], possibly with its last two dims swapped."""
    swapped = b.made_by(gathered, "aten.permute.default")
    if swapped is not None and tuple(swapped.args[1]) == (0, 2, 1):
        found = _chosen(b, swapped.args[0])
        return None if found is None else (b.permute(found[0], (0, 2, 1)), found[1])
    made = b.made_by(gathered, "aten.index.Tensor")
    if made is None or len(made.args[1]) != 1 or not isinstance(made.args[1][0], Ref):
        return None
    w, index = made.args[0], made.args[1][0]
    one = b.ndim(w) == 3 and b.ndim(index) == 1 and b.dtype(index) in ("int64", "int32")
    return (w, index) if one else None


def _never_negative(b: Builder, index: Ref) -> bool:
    while (made := b.producer.get(index.name)) is not None and made.target in KEEP:
        index = made.args[0]
    return made is not None and (made.target == "aten.argmax.default" or (made.target in CHOICES and index.name == made.outs[1]))
