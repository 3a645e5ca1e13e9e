"""Indexing by constant ranges is a view: `x[rows[:, None], columns]` with rows 0…m-1 and columns 0…n-1 is x itself.

In: a folded graph (so that such index tensors are constants). Out: the same with those `index.Tensor` ops as slice, permute, reshape and
expand, which keeps the batch size out of the constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..build import Builder, rewrite
from ..captured import Captured
from ..graph import Ref


def indexing(captured: Captured) -> Captured:
    """Replace indexing by constant ranges."""
    return rewrite(captured, {"aten.index.Tensor": index})


def index(b: Builder, x: Ref, indices: tuple[Ref | None, ...]) -> Any:
    if not all(isinstance(i, Ref) for i in indices):
        return NotImplemented
    ranges = [_range(b, i) for i in indices if isinstance(i, Ref)]
    varying = [r[0] for r in ranges if r is not None and r[0] is not None]
    if None in ranges or len(set(varying)) < len(varying):
        return NotImplemented
    shapes = [b.shape(i) for i in indices if isinstance(i, Ref)]
    out = tuple(torch.broadcast_shapes(*shapes))
    rest = b.shape(x)[len(indices) :]
    place: dict[int, int] = {}  # dim of the result (among `out`) → dim of x
    for dim, found in enumerate(ranges):
        assert found is not None
        where, start, length = found
        x = b.slice(x, dim, start, start + length)
        if where is not None:
            place[where - len(shapes[dim]) + len(out)] = dim
    order = [place[d] for d in sorted(place)]
    single = [d for d in range(len(indices)) if d not in order]
    x = b.permute(x, (*single, *order, *range(len(indices), b.ndim(x))))
    thin = [b.shape(x)[len(single) + sorted(place).index(d)] if d in place else 1 for d in range(len(out))]
    return b.expand(b.reshape(x, (*thin, *rest)), (*out, *rest))


def _range(b: Builder, i: Ref) -> tuple[int | None, int, int] | None:
    """(dim along which it counts up by 1, start, length) of a constant index; the dim is None for a single number."""
    ndim = b.ndim(i)
    while (wide := b.made_by(i, "aten.expand.default")) is not None:
        i = wide.args[0]
    found: Tensor | None = b.constants.get(i.name)
    if found is None or found.dtype == torch.bool or found.numel() == 0:
        return None
    long = [d for d, size in enumerate(found.shape) if size > 1]
    values = found.reshape(-1)
    start = int(values[0])
    if len(long) > 1 or start < 0 or not torch.equal(values, torch.arange(start, start + len(values), dtype=values.dtype)):
        return None
    return (long[0] + ndim - found.ndim if long else None), start, len(values)
