"""Triton of `quantise`: the largest magnitude, and casts to fp8, with the transpose from the same reading."""

# shapes: x, q [r c], transposed [c r]; scale: one number; partial: one number a program

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def largest(x, partial, r, c, x_row, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    value = tl.load(x + row * x_row + col, mask=(row < r) & (col < c), other=0.0).to(tl.float32)
    store_largest(value, partial)


@triton.jit
def store_largest(value, partial):
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    # a nan wins, as in torch's amax
    broken = tl.sum(tl.sum((value != value).to(tl.int32), 1), 0)
    top = tl.max(tl.max(tl.where(value != value, 0.0, tl.abs(value)), 1), 0)
    tl.store(partial + at, tl.where(broken > 0, float("nan"), top))


@triton.jit
def on_grid(x, BITS: tl.constexpr, LOWEST: tl.constexpr):
    """x rounded to nearest even with so many bits after the first; below 2^LOWEST, the last of them keeps its place."""
    bits = x.to(tl.int32, bitcast=True)
    cut: tl.constexpr = 23 - BITS
    bits = (bits + ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)) & (-(1 << cut))
    magic: tl.constexpr = 1.5 * 2.0 ** (23 + LOWEST - BITS)
    return tl.where(tl.abs(x) < 2.0**LOWEST, (x + magic) - magic, tl.where(x != x, x, bits.to(tl.float32, bitcast=True)))


@triton.jit
def cast(
    x, scale, q, transposed, partial, r, c, x_row, top, BITS: tl.constexpr, LOWEST: tl.constexpr, BY_HAND: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CLAMP: tl.constexpr = True,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)[None, :]
    inside = (row < r) & (col < c)
    value = tl.load(x + row * x_row + col, mask=inside, other=0.0).to(tl.float32)
    if partial is not None:
        store_largest(value, partial)
    y = value * tl.load(scale)
    if CLAMP:
        y = tl.where(y != y, y, tl.minimum(tl.maximum(y, -top), top))
    if BY_HAND:  # the interpreter's own cast to fp8 loses carries; what lies on the grid it keeps
        y = on_grid(y, BITS, LOWEST)
    y = y.to(q.dtype.element_ty)
    tl.store(q + row * c + col, y, mask=inside)
    if transposed is not None:
        tl.store(transposed + tl.trans(col) * r + tl.trans(row), tl.trans(y), mask=tl.trans(inside))
