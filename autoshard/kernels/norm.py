"""What `rms_norm` and `layer_norm` share: meaning, gradient and launch of a normalisation over the last dim. `centre` tells them apart.

forward:   t = x (+ residual),  c = t - mean(t) if centre else t,  r = 1 / sqrt(mean(c²) + eps),  ĉ = c · r
           y = ĉ · (offset + w) + b     computed wide (float32 or float64) and cast once, or, with cast_first, ĉ cast before the product
backward:  g = dy · (offset + w)
           dt = r · (g - [mean(g)] - ĉ · mean(g · ĉ)) (+ dtotal),   dw = Σ_rows dy · ĉ,   db = Σ_rows dy          ([ ] if centre)

Nothing is saved but t: a row is in registers when its gradient is made, and its mean square costs no further reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend

LONGEST = 32768  # elements of a row that a program can hold
TILE = 4096  # elements that a program holds at least, if there are so many
WAVES = 2  # programs of the backward for each multiprocessor: more hide latency, and leave more partial sums


@dataclass(frozen=True)
class How:
    """The numbers of one normalisation."""

    eps: float
    offset: float = 0.0
    cast_first: bool = False
    centre: bool = False


def result_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None, how: How) -> torch.dtype:
    dtype = x.dtype
    if how.cast_first:
        for p in (weight, bias):
            dtype = dtype if p is None else torch.promote_types(dtype, p.dtype)
    return dtype


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, how: How) -> Tensor:
    hat, _ = _normalised(x, how)
    dtype = x.dtype
    if how.cast_first:
        y = hat.to(dtype)
        y = y if weight is None else y * (weight + how.offset if how.offset else weight)
        return y if bias is None else y + bias
    y = hat if weight is None else hat * (weight.to(hat.dtype) + how.offset)
    return (y if bias is None else y + bias.to(hat.dtype)).to(dtype)


def _normalised(x: Tensor, how: How) -> tuple[Tensor, Tensor]:
    c = x.to(backend.work(x.dtype))
    if how.centre:
        c = c - c.mean(-1, keepdim=True)
    r = torch.rsqrt(c.square().mean(-1, keepdim=True) + how.eps)
    return c * r, r


def reference_backward(grad: Tensor, total: Tensor | None, x: Tensor, weight: Tensor | None, how: How) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw and db, these two of the dtype computed in; `total`: the gradient of x + residual itself."""
    hat, r = _normalised(x, how)
    dy = grad.to(hat.dtype)
    g = dy if weight is None else dy * (weight.to(hat.dtype) + how.offset)
    dx = g - hat * (g * hat).mean(-1, keepdim=True)
    if how.centre:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * r
    dx = dx if total is None else dx + total
    n = x.shape[-1]
    return dx.to(x.dtype), (dy * hat).reshape(-1, n).sum(0), dy.reshape(-1, n).sum(0)


def applies(x: Tensor, *others: Tensor | None) -> bool:
    return 0 < x.shape[-1] <= LONGEST and x.numel() > 0 and all(t is None or t.dtype in backend.FLOATING for t in (x, *others))


def forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, how: How) -> tuple[Tensor, Tensor]:
    """y, and x + residual (an empty tensor without residual)."""
    same = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
    if not (backend.fused(x) and same and applies(x, weight, bias)):
        total = x if residual is None else x + residual
        return reference(total, weight, bias, how).contiguous(), x.new_empty(0) if residual is None else total.contiguous()
    from .device import norm

    flat, n = backend.rows(x), x.shape[-1]
    extra = None if residual is None else backend.rows(residual)
    y = x.new_empty(x.shape, dtype=result_dtype(x, weight, bias, how))
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    cols = backend.power(n)
    block = max(1, min(backend.power(flat.shape[0]), TILE // cols))
    count, x_row, extra_row = flat.shape[0], flat.stride(0), 0 if extra is None else extra.stride(0)
    norm.forward[(backend.blocks(count, block),)](
        flat, extra, _dense(weight), _dense(bias), y, total, count, n, how.eps, x_row, extra_row,
        OFFSET=how.offset, CENTRE=how.centre, CAST_FIRST=how.cast_first, ACC=backend.accumulator(x.dtype), ROWS=block, COLS=cols,
        num_warps=backend.warps(block * cols),
    )  # fmt: skip
    return y, total


def backward(
    grad: Tensor, total: Tensor | None, x: Tensor, weight: Tensor | None, dw_needed: bool, db_needed: bool, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw and db, the latter as wide as they are summed, and empty where they aren't needed."""
    wide = backend.work(x.dtype)
    if not (backend.fused(x) and applies(x, grad, total, weight)):
        dx, dw, db = reference_backward(grad, total, x, weight, how)
        return dx.contiguous(), dw if dw_needed else dw.new_empty(0), db if db_needed else db.new_empty(0)
    from .device import norm

    flat, n = backend.rows(x), x.shape[-1]
    dy, dt = backend.rows(grad), None if total is None else backend.rows(total)
    cols = backend.power(n)
    block = max(1, min(backend.power(flat.shape[0]), TILE // cols))
    programs = min(WAVES * backend.multiprocessors(x), backend.blocks(flat.shape[0], block))
    dx = x.new_empty(x.shape)
    sums = [x.new_empty((programs, n), dtype=wide) if needed else None for needed in (dw_needed, db_needed)]
    dt_row = 0 if dt is None else dt.stride(0)
    norm.backward[(programs,)](
        dy, dt, flat, _dense(weight), dx, *sums, flat.shape[0], n, how.eps, dy.stride(0), dt_row, flat.stride(0), programs,
        OFFSET=how.offset, CENTRE=how.centre, ACC=backend.accumulator(x.dtype), ROWS=block, COLS=cols,
        num_warps=backend.warps(block * cols),
    )  # fmt: skip
    dw, db = (x.new_empty(0, dtype=wide) if s is None else s.sum(0) for s in sums)
    return dx, dw, db


def _dense(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.contiguous()


def cost(shape: backend.Shape, itemsize: int, streams: int) -> tuple[float, float]:
    """Forward reads x and writes y, backward reads x and dy and writes dx: five streams; with a residual eight."""
    elements = math.prod(shape)
    return 20.0 * elements, float(streams * elements * itemsize)
