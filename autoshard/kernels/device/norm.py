"""Triton of `rms_norm` and `layer_norm`. A program holds some whole rows; weights' gradients are summed in two stages, in a fixed order."""

# shapes: x, y, residual, total [rows n], rows apart by their stride; weight, bias [n]; dw, db [programs n]

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalised(x, inside, n, eps, CENTRE: tl.constexpr):
    """(x - mean) / sqrt(mean square + eps), and the factor."""
    if CENTRE:
        x = tl.where(inside, x - (tl.sum(x, 1) / n)[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / n + eps)
    return x * r[:, None], r[:, None]


@triton.jit
def forward(
    x, residual, weight, bias, y, total, count, n, eps, x_row, residual_row,
    OFFSET: tl.constexpr, CENTRE: tl.constexpr, CAST_FIRST: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (row < count) & (col < n)
    value = tl.load(x + row * x_row + col, mask=inside, other=0.0)
    if residual is not None:
        value = (value.to(ACC) + tl.load(residual + row * residual_row + col, mask=inside, other=0.0).to(ACC)).to(value.dtype)
        tl.store(total + row * n + col, value, mask=inside)
    out, _ = normalised(value.to(ACC), inside, n, eps, CENTRE)
    if CAST_FIRST:
        out = out.to(value.dtype).to(ACC)
    if weight is not None:
        w = tl.load(weight + col, mask=col < n, other=0.0).to(ACC)
        if OFFSET != 0:
            w += OFFSET
        out *= w
    if bias is not None:
        out += tl.load(bias + col, mask=col < n, other=0.0).to(ACC)
    tl.store(y + row * n + col, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    grad, grad_total, x, weight, dx, dw, db, count, n, eps, grad_row, total_row, x_row, programs,
    OFFSET: tl.constexpr, CENTRE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, COLS)[None, :]
    w = tl.full((1, COLS), 1.0, ACC)
    if weight is not None:
        w = tl.load(weight + col, mask=col < n, other=0.0).to(ACC)
        if OFFSET != 0:
            w += OFFSET
    sum_w = tl.zeros((COLS,), ACC)
    sum_b = tl.zeros((COLS,), ACC)
    for block in range(tl.program_id(0), (count + ROWS - 1) // ROWS, programs):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < count) & (col < n)
        value = tl.load(x + row * x_row + col, mask=inside, other=0.0).to(ACC)
        dy = tl.load(grad + row * grad_row + col, mask=inside, other=0.0).to(ACC)
        hat, r = normalised(value, inside, n, eps, CENTRE)
        g = dy * w
        out = g - hat * (tl.sum(g * hat, 1) / n)[:, None]
        if CENTRE:
            out -= (tl.sum(g, 1) / n)[:, None]
        out *= r
        if grad_total is not None:
            out += tl.load(grad_total + row * total_row + col, mask=inside, other=0.0).to(ACC)
        tl.store(dx + row * n + col, out.to(dx.dtype.element_ty), mask=inside)
        if dw is not None:
            sum_w += tl.sum(dy * hat, 0)
        if db is not None:
            sum_b += tl.sum(dy, 0)
    at = tl.program_id(0) * n + tl.arange(0, COLS)
    if dw is not None:
        tl.store(dw + at, sum_w, mask=tl.arange(0, COLS) < n)
    if db is not None:
        tl.store(db + at, sum_b, mask=tl.arange(0, COLS) < n)
