"""Recognise causal attention masks by what they contain, so that attention can use kernels that take none.

In: a folded graph. Out: the same, where attention whose mask admits exactly the keys up to the query has `causal=True` and no mask, a mask
that is `causal & rest` leaves only `rest`, and a mask that admits everything is gone. Expands of masks are dropped (attention broadcasts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..build import Builder, rewrite
from ..captured import Captured
from ..graph import Op, Ref, map_refs
from ..interpret import call
from .fold import is_pure

LIMIT = 2**28  # bytes of any value evaluated only to look at it
ANDS = ("aten.bitwise_and.Tensor", "aten.logical_and.default")
# how `a ? b` reads with the key's number on the left: key ? query
COMPARISONS = {"aten.le.Tensor": "le", "aten.lt.Tensor": "lt", "aten.ge.Tensor": "ge", "aten.gt.Tensor": "gt"}
MIRROR = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt"}


def masks(captured: Captured) -> Captured:
    """Turn causal masks into attention's own flag."""
    seen: dict[str, str] = {}

    def rule(b: Builder, q: Ref, k: Ref, v: Ref, mask: Ref | None, causal: bool, scale: float, *noise: Ref) -> Any:
        if mask is None:
            return NotImplemented
        s, t = b.shape(q)[2], b.shape(k)[2]
        kept: list[Ref] = []
        for part in _conjuncts(b, mask):
            kind = seen.setdefault(part.name, _kind(b, part, s, t))
            causal |= kind == "causal"
            if kind == "":
                kept.append(b.reshape(part, (1,) * (4 - b.ndim(part)) + b.shape(part)))
        mask = kept[0] if kept else None
        for part in kept[1:]:
            mask = b.op("aten.bitwise_and.Tensor", mask, part)
        return b.op("autoshard.attention.default", q, k, v, mask, causal, scale, *noise)

    return rewrite(captured, {"autoshard.attention.default": rule})


def _conjuncts(b: Builder, mask: Ref) -> list[Ref]:
    """The parts whose conjunction the mask is; expands are looked through."""
    mask = _unexpanded(b, mask)
    for target in ANDS:
        made = b.made_by(mask, target)
        if made is not None and all(isinstance(a, Ref) and b.dtype(a) == "bool" for a in made.args):
            return [part for a in made.args for part in _conjuncts(b, a)]
    return [mask]


def _kind(b: Builder, mask: Ref, s: int, t: int) -> str:
    """ "causal", "all" (admits everything), or "" for any other."""
    compared = _comparison(b, mask)
    if compared is not None and (len(compared[1]), len(compared[2])) == (t, s):
        return _kind_of_comparison(*compared)
    found = _contents(b, mask)
    if found is None or any(size != 1 for size in found.shape[:-2]):
        return ""
    if found.dtype != torch.bool:
        if not bool(((found == 0) | (found <= torch.finfo(found.dtype).min)).all()):
            return ""
        found = found == 0
    if bool(found.all()):
        return "all"
    if found.numel() == s * t and torch.equal(found.reshape(s, t), torch.ones(s, t, dtype=torch.bool).tril()):
        return "causal"
    return ""


def _comparison(b: Builder, mask: Ref) -> tuple[str, Tensor, Tensor] | None:
    """`key ? query` where the mask compares a constant per key with one per query, the same for the whole batch: the relation (le or lt),
    keys, queries."""
    op = b.producer.get(mask.name)
    if op is None or op.target not in COMPARISONS or not all(isinstance(a, Ref) for a in op.args):
        return None
    relation = COMPARISONS[op.target]
    tensors = [b.constants.get(_unexpanded(b, a).name) for a in op.args]
    if any(x is None or x.ndim < 2 or x.numel() != max(x.shape[-2:]) or 1 not in x.shape[-2:] for x in tensors):
        return None
    left, right = (x.reshape(x.shape[-2:]) for x in tensors if x is not None)
    if left.shape[0] > 1 or right.shape[1] > 1:
        left, right, relation = right, left, MIRROR[relation]
    if left.shape[0] != 1 or right.shape[1] != 1:
        return None
    keys, queries = left[0], right[:, 0]
    if relation in ("ge", "gt"):  # key ≥ query is -key ≤ -query
        keys, queries, relation = -keys, -queries, MIRROR[relation]
    return relation, keys, queries


def _unexpanded(b: Builder, value: Ref) -> Ref:
    while (wide := b.made_by(value, "aten.expand.default")) is not None:
        value = wide.args[0]
    return value


def _kind_of_comparison(relation: str, keys: Tensor, queries: Tensor) -> str:
    """As `_kind`, in linear time."""
    if bool((keys.max() <= queries.min()) if relation == "le" else (keys.max() < queries.min())):
        return "all"
    if bool((keys[1:] < keys[:-1]).any()):
        return ""
    admitted = torch.searchsorted(keys, queries, right=relation == "le")  # of ascending keys, how many are admitted
    return "causal" if torch.equal(admitted, torch.arange(1, len(queries) + 1).clamp(max=len(keys))) else ""


def _contents(b: Builder, value: Ref) -> Tensor | None:
    """The contents of a constant value, evaluated without being kept; None if it isn't constant or too large."""
    if value.name in b.constants:
        return b.constants[value.name]
    op: Op | None = b.producer.get(value.name)
    if op is None or not is_pure(op) or b.value(value).tensor.bytes > LIMIT or len(op.outs) > 1:
        return None
    if any(_depends_on_data(b, name) for name in op.inputs):
        return None
    found = [_contents(b, Ref(name)) for name in op.inputs]
    if any(f is None for f in found):
        return None
    by_name = dict(zip(op.inputs, found, strict=True))
    args, kwargs = map_refs((op.args, op.kwargs), lambda ref: by_name[ref.name])
    return call(op.target, args, kwargs, "cpu")


def _depends_on_data(b: Builder, name: str) -> bool:
    """Whether a source other than a constant is among what `name` is made of."""
    pending, seen = [name], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in b.producer:
            pending += b.producer[name].inputs
        elif name not in b.constants:
            return True
    return False
