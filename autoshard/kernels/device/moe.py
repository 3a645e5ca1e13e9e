"""Triton of `moe`: routing, a stable counting sort of slots by expert, and moving rows there and back."""

# shapes: logits [t e]; weights, experts, position [t k]; x, out [t h]; moved [t·k h]. A slot is a (token, choice) pair.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores(logits, count, e, first, SIGMOID: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    row = (first + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, EXPERTS)[None, :]
    inside = (row < count) & (col < e)
    x = tl.load(logits + row.to(tl.int64) * e + col, mask=inside, other=0.0).to(ACC)
    if SIGMOID:
        s = 1.0 / (1.0 + tl.exp(-x))
    else:
        x = tl.where(col < e, x, float("-inf"))
        x = tl.exp(x - tl.max(x, 1)[:, None])
        s = x / tl.sum(x, 1)[:, None]
    return tl.where(inside, s, 0.0), row, col, inside


@triton.jit
def route(
    logits, bias, weights, experts, count, e, factor, K: tl.constexpr, NORMALISE: tl.constexpr, SIGMOID: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    s, row, col, _ = scores(logits, count, e, tl.program_id(0) * ROWS, SIGMOID, ACC, ROWS, EXPERTS)
    by = s
    if bias is not None:
        by += tl.load(bias + col, mask=col < e, other=0.0).to(ACC)
    by = tl.where(col < e, by, float("-inf"))
    choice = tl.arange(0, CHOICES)[None, :]
    found = tl.zeros((ROWS, CHOICES), ACC)
    which = tl.zeros((ROWS, CHOICES), tl.int64)
    for i in tl.static_range(K):
        best = tl.argmax(by, 1)[:, None]
        found = tl.where(choice == i, tl.sum(tl.where(col == best, s, 0.0), 1)[:, None], found)
        which = tl.where(choice == i, best.to(tl.int64), which)
        by = tl.where(col == best, float("-inf"), by)
    if NORMALISE:
        found = found / (tl.sum(found, 1)[:, None] + 1e-20)
    at = row.to(tl.int64) * K + choice
    known = (row < count) & (choice < K)
    tl.store(weights + at, found * factor, mask=known)
    tl.store(experts + at, which, mask=known)


@triton.jit
def route_backward(
    grad, logits, experts, dlogits, count, e, factor, K: tl.constexpr, NORMALISE: tl.constexpr, SIGMOID: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    s, row, col, inside = scores(logits, count, e, tl.program_id(0) * ROWS, SIGMOID, ACC, ROWS, EXPERTS)
    ds = tl.zeros((ROWS, EXPERTS), ACC)
    chosen = tl.zeros((ROWS, EXPERTS), ACC)
    for i in tl.static_range(K):
        here = col == tl.load(experts + row.to(tl.int64) * K + i, mask=row < count, other=-1)
        ds += tl.where(here, factor * tl.load(grad + row.to(tl.int64) * K + i, mask=row < count, other=0.0).to(ACC), 0.0)
        chosen += tl.where(here, 1.0, 0.0)
    if NORMALISE:
        whole = tl.sum(chosen * s, 1)[:, None] + 1e-20
        ds = chosen * (ds - tl.sum(ds * s, 1)[:, None] / whole) / whole
    if SIGMOID:
        dx = ds * s * (1.0 - s)
    else:
        dx = s * (ds - tl.sum(ds * s, 1)[:, None])
    tl.store(dlogits + row.to(tl.int64) * e + col, dx.to(dlogits.dtype.element_ty), mask=inside)


@triton.jit
def chosen(experts, at, slots, e, REST: tl.constexpr):
    """The experts of slots; REST: what is none of the others counts as the last."""
    which = tl.load(experts + at, mask=at < slots, other=0)
    if REST:
        which = tl.where((which < 0) | (which >= e), e - 1, which)
    return tl.where(at < slots, which, -1)


@triton.jit
def count(experts, counts, slots, e, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, REST: tl.constexpr):
    """How many slots of this block each expert has; counts [e blocks]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = chosen(experts, at, slots, e, REST)
    col = tl.arange(0, EXPERTS)
    found = tl.sum((which[:, None] == col[None, :]).to(tl.int32), 0)
    tl.store(counts + col * tl.num_programs(0) + tl.program_id(0), found, mask=col < e)


@triton.jit
def place(experts, starts, position, order, slots, e, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, REST: tl.constexpr):
    """Where each slot goes: behind those of its expert in earlier blocks (starts [e blocks]), and before it in this one; and what came
    to each place."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = chosen(experts, at, slots, e, REST)
    col = tl.arange(0, EXPERTS)
    mine = (which[:, None] == col[None, :]).to(tl.int32)
    before = tl.cumsum(mine, 0) - mine
    first = tl.load(starts + col * tl.num_programs(0) + tl.program_id(0), mask=col < e, other=0)
    to = tl.sum(mine * (before + first[None, :]), 1).to(tl.int32)
    tl.store(position + at, to, mask=at < slots)
    if order is not None:
        tl.store(order + to, at.to(tl.int32), mask=at < slots)


@triton.jit
def spread(x, weights, moved, position, out, dweights, h, x_row, moved_row, K: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out[position[t, j]] = (weights[t, j] ·) x[t]; and dweights[t, j] = x[t] · moved[position[t, j]]."""
    t = tl.program_id(0).to(tl.int64)
    for j in tl.static_range(K):
        to = tl.load(position + t * K + j).to(tl.int64)
        dot = tl.zeros((BLOCK,), ACC)
        w = 1.0
        if weights is not None:
            w = tl.load(weights + t * K + j).to(ACC)
        for first in range(0, h, BLOCK):
            col = first + tl.arange(0, BLOCK)
            value = tl.load(x + t * x_row + col, mask=col < h, other=0.0)
            if weights is not None:
                tl.store(out + to * h + col, (value.to(ACC) * w).to(out.dtype.element_ty), mask=col < h)
                dot += value.to(ACC) * tl.load(moved + to * moved_row + col, mask=col < h, other=0.0).to(ACC)
            else:
                tl.store(out + to * h + col, value, mask=col < h)
        if weights is not None:
            tl.store(dweights + t * K + j, tl.sum(dot, 0).to(dweights.dtype.element_ty))


@triton.jit
def gather(moved, weights, position, out, h, moved_row, K: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = Σ_j (weights[t, j] ·) moved[position[t, j]], in the order of j."""
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for j in tl.static_range(K):
        at = tl.load(position + t * K + j).to(tl.int64)
        value = tl.load(moved + at * moved_row + col, mask=col < h, other=0.0).to(ACC)
        if weights is not None:
            value *= tl.load(weights + t * K + j).to(ACC)
        total += value
    tl.store(out + t * h + col, total.to(out.dtype.element_ty), mask=col < h)
