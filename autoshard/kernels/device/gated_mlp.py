"""Triton of `gated_mlp`: one pass over gate and up, forward and backward."""

# shapes: gate, up, and their gradients [rows n], rows apart by their stride; y, dy [rows n]

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def clamped(x):
    """Where a gelu is still a curve: beyond, its parts would be 0 · inf."""
    return tl.where(x != x, x, tl.minimum(tl.maximum(x, -40.0), 40.0))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """act(x) and act'(x)."""
    if KIND == "silu":
        s = sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu_tanh":  # (1 + tanh u) / 2 is sigmoid(2u), without the digits that 1 + tanh loses
        z = clamped(x)
        s = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return x * s, s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif KIND == "gelu":
        z = clamped(x)
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return x * cdf, cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif KIND == "relu2":
        r = tl.where(x != x, x, tl.maximum(x, 0.0))
        return r * r, 2.0 * r
    elif KIND == "relu":
        return tl.where(x != x, x, tl.maximum(x, 0.0)), tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(KIND == "sigmoid")
        s = sigmoid(x)
        return s, s * (1.0 - s)


@triton.jit
def forward(
    gate, up, y, count, n, gate_row, up_row, KIND: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < count) & (col < n)
    g = tl.load(gate + row * gate_row + col, mask=inside, other=0.0).to(ACC)
    u = tl.load(up + row * up_row + col, mask=inside, other=0.0).to(ACC)
    a, _ = activate(g, KIND)
    tl.store(y + row * n + col, (a * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    grad, gate, up, dgate, dup, count, n, grad_row, gate_row, up_row, out_row,
    KIND: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < count) & (col < n)
    g = tl.load(gate + row * gate_row + col, mask=inside, other=0.0).to(ACC)
    u = tl.load(up + row * up_row + col, mask=inside, other=0.0).to(ACC)
    dy = tl.load(grad + row * grad_row + col, mask=inside, other=0.0).to(ACC)
    a, slope = activate(g, KIND)
    tl.store(dgate + row * out_row + col, (dy * u * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * out_row + col, (dy * a).to(dup.dtype.element_ty), mask=inside)
