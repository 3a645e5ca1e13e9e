"""Keep batch and sequence dims visible: undo the flattening of leading dims around ops that don't need it.

    reshape([b, s, k] → [b·s, k]) → mm → reshape([b, s, n])      becomes      matmul([b, s, k], [k, n])

In: a graph in normal form. Out: the same, with each flattening reshape moved below the ops that treat the flattened dims row by row, where
it meets its inverse and both vanish. A layout can cut a dim only as long as it is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..graph import Ref, map_refs
from ..interpret import is_pointwise

Lead = tuple[int, ...]


def flatten(captured: Captured) -> Captured:
    """Move flattening reshapes down through row-wise ops."""
    rules: dict[str, Rule] = {op.target: _pointwise(op.target) for op in captured.graph.ops if is_pointwise(op.target)}
    return rewrite(captured, {**rules, **RULES})


def leads(b: Builder, x: Any) -> list[Lead]:
    """If x is a reshape whose dim 0 merges the first k ≥ 2 dims of its source: those dims, for each such k."""
    made = b.made_by(x, "aten.reshape.default")
    if made is None or not b.shape(x):
        return []
    source, rows = b.shape(made.args[0]), b.shape(x)[0]
    return [source[:k] for k in range(2, len(source) + 1) if math.prod(source[:k]) == rows and 0 not in source]


def common_lead(b: Builder, tensors: Sequence[Ref]) -> Lead | None:
    """The lead that every one of `tensors` can be unmerged to; dropout masks and constants follow the others."""
    merged = [leads(b, x) for x in tensors if not _follows(b, x)]
    if not merged:
        return None
    return next((lead for lead in merged[0] if all(lead in other for other in merged)), None)


def _follows(b: Builder, x: Ref) -> bool:
    return b.made_by(x, "autoshard.dropout_mask.default") is not None or b.value(x).role == "constant"


def unmerge(b: Builder, x: Ref, lead: Lead) -> Ref:
    return b.reshape(x, (*lead, *b.shape(x)[1:]))


def merge(b: Builder, x: Ref, lead: Lead) -> Ref:
    return b.reshape(x, (math.prod(lead), *b.shape(x)[len(lead) :]))


def _pointwise(target: str) -> Rule:
    def rule(b: Builder, *args: Any, **kwargs: Any) -> Any:
        tensors: list[Ref] = []
        map_refs((args, kwargs), tensors.append)
        n = max((b.ndim(x) for x in tensors), default=0)
        if n == 0:
            return NotImplemented
        rows = max(b.shape(x)[0] for x in tensors if b.ndim(x) == n)
        full = [x for x in tensors if b.ndim(x) == n and b.shape(x)[0] == rows]
        lead = common_lead(b, full) if rows > 1 else None
        if lead is None:
            return NotImplemented

        def wide(x: Ref) -> Ref:
            if b.ndim(x) < n:
                return x
            return unmerge(b, x, lead if b.shape(x)[0] == rows else (1,) * len(lead))

        args, kwargs = map_refs((args, kwargs), wide)
        return merge(b, b.op(target, *args, **kwargs), lead)

    return rule


def _rows(target: str, emitted: str = "") -> Rule:
    """Ops of x [rows, …] and further operands, the same for every row: linear, layer_norm."""

    def rule(b: Builder, x: Ref, *args: Any, **kwargs: Any) -> Any:
        lead = common_lead(b, [x]) if b.ndim(x) > 1 else None
        if lead is None or (args and isinstance(args[0], tuple) and len(args[0]) >= b.ndim(x)):
            return NotImplemented
        return merge(b, b.op(emitted or target, unmerge(b, x, lead), *args, **kwargs), lead)

    return rule


def matmul(b: Builder, x: Ref, w: Ref) -> Any:
    return _rows("aten.matmul.default")(b, x, w) if b.ndim(x) == b.ndim(w) == 2 else NotImplemented


def bmm(b: Builder, x: Ref, y: Ref) -> Any:
    lead = common_lead(b, [x, y])
    return NotImplemented if lead is None else merge(b, b.op("aten.matmul.default", unmerge(b, x, lead), unmerge(b, y, lead)), lead)


def embedding(b: Builder, w: Ref, ids: Ref) -> Any:
    lead = common_lead(b, [ids])
    return NotImplemented if lead is None else merge(b, b.op("aten.embedding.default", w, unmerge(b, ids, lead)), lead)


def pick(b: Builder, x: Ref, labels: Ref) -> Any:
    lead = common_lead(b, [x, labels])
    if lead is None:
        return NotImplemented
    return merge(b, b.op("autoshard.pick.default", unmerge(b, x, lead), unmerge(b, labels, lead)), lead)


def _reduction(target: str) -> Rule:
    def rule(b: Builder, x: Ref, dims: tuple[int, ...], keepdim: bool) -> Any:
        lead = common_lead(b, [x])
        if lead is None:
            return NotImplemented
        wide = tuple(range(len(lead))) if 0 in dims else ()
        wide += tuple(d + len(lead) - 1 for d in dims if d)
        y = b.op(target, unmerge(b, x, lead), wide, keepdim)
        if 0 not in dims:
            return merge(b, y, lead)
        return b.reshape(y, (1, *b.shape(y)[len(lead) :])) if keepdim else y

    return rule


def _along(target: str) -> Rule:
    """Ops along one dim other than the rows."""

    def rule(b: Builder, x: Ref, dim: int, *rest: Any, **kwargs: Any) -> Any:
        lead = common_lead(b, [x]) if dim else None
        if lead is None:
            return NotImplemented
        return merge(b, b.op(target, unmerge(b, x, lead), dim + len(lead) - 1, *rest, **kwargs), lead)

    return rule


def split(b: Builder, x: Ref, sizes: tuple[int, ...], dim: int) -> Any:
    lead = common_lead(b, [x]) if dim else None
    if lead is None:
        return NotImplemented
    parts = b.op("aten.split_with_sizes.default", unmerge(b, x, lead), sizes, dim + len(lead) - 1)
    return tuple(merge(b, part, lead) for part in parts)


def cat(b: Builder, tensors: tuple[Ref, ...], dim: int) -> Any:
    lead = common_lead(b, tensors) if dim else None
    if lead is None:
        return NotImplemented
    return merge(b, b.op("aten.cat.default", tuple(unmerge(b, x, lead) for x in tensors), dim + len(lead) - 1), lead)


RULES: dict[str, Rule] = {
    "aten.linear.default": _rows("aten.linear.default"),
    "aten.mm.default": matmul,
    "aten.matmul.default": matmul,
    "aten.bmm.default": bmm,
    "aten.layer_norm.default": _rows("aten.layer_norm.default"),
    "aten.embedding.default": embedding,
    "autoshard.pick.default": pick,
    "aten.detach.default": _pointwise("aten.detach.default"),
    "aten._to_copy.default": _pointwise("aten._to_copy.default"),
    **{f"aten.{name}": _reduction(f"aten.{name}") for name in ("sum.dim_IntList", "mean.dim", "amax.default", "amin.default")},
    **{f"aten.{name}": _along(f"aten.{name}") for name in ("softmax.int", "log_softmax.int", "cumsum.default", "slice.Tensor")},
    "aten.split_with_sizes.default": split,
    "aten.cat.default": cat,
}
