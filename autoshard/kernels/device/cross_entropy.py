"""Triton of `cross_entropy`: what a row of logits comes to, in one reading, and its gradient in place."""

# shapes: logits [rows v], rows apart by their stride; labels, top, total, target, plain and their gradients [rows]; start: one number

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shaped(x, scale, cap, CAP: tl.constexpr):
    """The logit that counts, and its slope by the raw one."""
    z = x * scale
    if CAP:
        t = 2.0 / (1.0 + tl.exp(-2.0 * z / cap)) - 1.0
        return cap * t, scale * (1.0 - t * t)
    else:
        return z, scale


@triton.jit
def statistics(
    logits, labels, start, top, total, target, plain, v, stride, scale, cap, CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    most = tl.full((1,), float("-inf"), ACC)
    sum_exp = tl.zeros((1,), ACC)
    sum_all = tl.zeros((1,), ACC)
    for first in range(0, v, BLOCK):
        col = first + tl.arange(0, BLOCK)
        z, _ = shaped(tl.load(logits + col, mask=col < v, other=0.0).to(ACC), scale, cap, CAP)
        sum_all += tl.sum(tl.where(col < v, z, 0.0), 0)
        z = tl.where(col < v, z, float("-inf"))
        now = tl.maximum(most, tl.max(z, 0))
        base = tl.where(now == float("-inf"), 0.0, now)
        sum_exp = sum_exp * tl.exp(most - base) + tl.sum(tl.exp(z - base), 0)
        most = now
    here = tl.load(labels + row) - tl.load(start)
    inside = (here >= 0) & (here < v)
    z, _ = shaped(tl.load(logits + here, mask=inside, other=0.0).to(ACC), scale, cap, CAP)
    at = row + tl.arange(0, 1)
    tl.store(top + at, most)
    tl.store(total + at, sum_exp)
    tl.store(plain + at, sum_all)
    tl.store(target + row, tl.where(inside, z, 0.0))


@triton.jit
def gradient(
    logits, labels, start, top, g_total, g_target, g_plain, v, stride, scale, cap,
    CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z, slope = shaped(tl.load(logits + col, mask=col < v, other=0.0).to(ACC), scale, cap, CAP)
    here = tl.load(labels + row) - tl.load(start)
    g = tl.load(g_total + row) * tl.exp(z - tl.load(top + row)) + tl.load(g_plain + row)
    g += tl.where(col == here, tl.load(g_target + row), 0.0)
    tl.store(logits + col, (g * slope).to(logits.dtype.element_ty), mask=col < v)
