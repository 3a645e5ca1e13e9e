"""Triton of `many`: programs that look up in a table which chunk of which tensor is theirs."""

# shapes: rows [tensors, WIDTH] (elements, then addresses), where [programs, 2] (row, chunk); skip, lr, coefficient, found: one number each
# begin, left: the chunk's first element, and how many it has

from __future__ import annotations

import triton
import triton.language as tl

from .adamw import correction


@triton.jit
def chunk(rows, where, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's row of the table, and its part of the tensor."""
    i = tl.program_id(0)
    row = rows + tl.load(where + 2 * i).to(tl.int64) * WIDTH
    begin = tl.load(where + 2 * i + 1).to(tl.int64) * CHUNK
    left = tl.minimum(tl.load(row) - begin, CHUNK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    return row, begin, left


@triton.jit
def tensor(row, COLUMN: tl.constexpr, begin, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(row + 1 + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + begin


@triton.jit
def many_not_finite(
    rows, where, found, COLUMN: tl.constexpr, DTYPE: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, left = chunk(rows, where, WIDTH, CHUNK, ALIGNED)
    x = tensor(row, COLUMN, begin, DTYPE, ALIGNED)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, left, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < left, other=0.0).to(tl.float32) * 0.0  # nan of what isn't finite
    bad = tl.sum(total)
    if bad != bad:
        tl.store(found, 1.0)  # all who write write the same


@triton.jit
def many_squares(
    rows, where, partials, COLUMN: tl.constexpr, DTYPE: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, left = chunk(rows, where, WIDTH, CHUNK, ALIGNED)
    x = tensor(row, COLUMN, begin, DTYPE, ALIGNED)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, left, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < left, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partials + tl.program_id(0), tl.sum(total))


@triton.jit
def many_scale(
    rows, where, coefficient, COLUMN: tl.constexpr, DTYPE: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    by = tl.load(coefficient).to(tl.float32)
    if by == 1.0:
        return
    row, begin, left = chunk(rows, where, WIDTH, CHUNK, ALIGNED)
    x = tensor(row, COLUMN, begin, DTYPE, ALIGNED)
    for start in range(0, left, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < left, other=0.0).to(tl.float32) * by
        tl.store(x + at, value.to(DTYPE), mask=at < left)


@triton.jit
def many_adam(
    rows, where, skip, lr, beta1, beta2, rest1, rest2, log1, log2, eps, decay, PARAM: tl.constexpr, GRAD: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, MASTER: tl.constexpr, DECOUPLED: tl.constexpr, RATE_AT: tl.constexpr, WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RATE_AT: whether `lr` is where the rate lies. Columns: param, grad, exp_avg, exp_avg_sq, step, master. MASTER None: there is none."""
    if tl.load(skip) != 0:
        return
    row, begin, left = chunk(rows, where, WIDTH, CHUNK, ALIGNED)
    count = tl.load(tensor(row, 4, 0, tl.float32, False))
    if RATE_AT:
        rate = tl.load(lr).to(tl.float32)
    else:
        rate = lr
    size, widen = rate / correction(count * log1), 1.0 / correction(count * log2)
    param = tensor(row, 0, begin, PARAM, ALIGNED)
    grad = tensor(row, 1, begin, GRAD, ALIGNED)
    m = tensor(row, 2, begin, FIRST, ALIGNED)
    v = tensor(row, 3, begin, SECOND, ALIGNED)
    if MASTER is not None:
        master = tensor(row, 5, begin, MASTER, ALIGNED)
    for start in range(0, left, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < left
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if MASTER is not None:
            p = tl.load(master + at, mask=inside, other=0.0)
        else:
            p = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
        if DECOUPLED:
            p -= rate * decay * p
        else:
            g += decay * p
        first = beta1 * tl.load(m + at, mask=inside, other=0.0).to(tl.float32) + rest1 * g
        second = beta2 * tl.load(v + at, mask=inside, other=0.0).to(tl.float32) + rest2 * g * g
        p -= size * first / (tl.sqrt(second * widen) + eps)
        tl.store(m + at, first.to(FIRST), mask=inside)
        tl.store(v + at, second.to(SECOND), mask=inside)
        if MASTER is not None:
            tl.store(master + at, p, mask=inside)
        tl.store(param + at, p.to(PARAM), mask=inside)
