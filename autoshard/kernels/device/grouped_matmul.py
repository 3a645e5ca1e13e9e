"""Triton of `grouped_matmul`: each program finds its expert from offsets on the device, so that the host needn't know them."""

# shapes: x [n k], w [e k m], out [n m], dw [e k m]; ends [e]: where each expert's rows end

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(
    x, w, out, ends, k, m, e, x_row, x_col, w_expert, w_row, w_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXPERTS: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    which = tl.arange(0, EXPERTS)
    end = tl.load(ends + which, mask=which < e, other=0)
    start = tl.load(ends + which - 1, mask=(which > 0) & (which < e), other=0)
    tiles = tl.where(which < e, (end - start + BM - 1) // BM, 0)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum(((upto <= tile) & (which < e)).to(tl.int32), 0)
    if expert >= e:
        return
    here = which == expert
    last = tl.sum(tl.where(here, end, 0), 0)
    first = tl.sum(tl.where(here, start + (tile - upto + tiles) * BM, 0), 0)
    row = (first + tl.arange(0, BM)).to(tl.int64)[:, None]
    col = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    base = w + expert.to(tl.int64) * w_expert
    acc = tl.zeros((BM, BN), ACC)
    for inner in range(0, k, BK):
        a_col = inner + tl.arange(0, BK)[None, :]
        b_row = inner + tl.arange(0, BK)[:, None]
        a = tl.load(x + row * x_row + a_col * x_col, mask=(row < last) & (a_col < k), other=0.0)
        b = tl.load(base + b_row.to(tl.int64) * w_row + col * w_col, mask=(b_row < k) & (col < m), other=0.0)
        if WIDEN:  # the interpreter can't multiply bf16
            a, b = a.to(ACC), b.to(ACC)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
    tl.store(out + row * m + col, acc.to(out.dtype.element_ty), mask=(row < last) & (col < m))


@triton.jit
def weights(
    x, g, dw, ends, k, m, x_row, x_col, g_row, g_col, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """dw[e] = x_eᵀ g_e; an expert without rows gets 0."""
    expert = tl.program_id(2)
    last = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    row = (tl.program_id(1) * BM + tl.arange(0, BM))[:, None]
    col = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :]
    acc = tl.zeros((BM, BN), ACC)
    for inner in range(first, last, BK):
        a_token = (inner + tl.arange(0, BK)).to(tl.int64)[None, :]
        b_token = (inner + tl.arange(0, BK)).to(tl.int64)[:, None]
        a = tl.load(x + a_token * x_row + row * x_col, mask=(a_token < last) & (row < k), other=0.0)
        b = tl.load(g + b_token * g_row + col * g_col, mask=(b_token < last) & (col < m), other=0.0)
        if WIDEN:  # the interpreter can't multiply bf16
            a, b = a.to(ACC), b.to(ACC)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
    at = dw + (expert.to(tl.int64) * k + row) * m + col
    tl.store(at, acc.to(dw.dtype.element_ty), mask=(row < k) & (col < m))


@triton.jit
def clear(out, ends, n, m, out_row, e, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in the rows behind the last end."""
    last = tl.load(ends + e - 1)
    first = tl.program_id(0) * ROWS
    if first + ROWS <= last:
        return
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    for start in range(0, m, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        inside = (row >= last) & (row < n) & (col < m)
        tl.store(out + row * out_row + col, tl.zeros((ROWS, BLOCK), out.dtype.element_ty), mask=inside)
