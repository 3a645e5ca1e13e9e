"""Triton of `draws`: random words by rows and blocks of columns."""

# shapes: rows [rows]; keep's found by three strides; random's found [rows columns]

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(a, b, c, d, seed, ROUNDS: tl.constexpr):
    """Four words per counter, all uint32 of one shape; `seed`: an int64."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        one, two = a, c
        a = tl.umulhi(two, 0xCD9E8D57) ^ b ^ low
        c = tl.umulhi(one, 0xD2511F53) ^ d ^ high
        b = two * 0xCD9E8D57
        d = one * 0xD2511F53
        low += 0x9E3779B9
        high += 0xBB67AE85
    return a, b, c, d


@triton.jit
def keep(
    seed, rows, found, count, words, group, outer, inner, step,
    THRESHOLD: tl.constexpr, DIGITS: tl.constexpr, ROUNDS: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * WORDS
    if CAUSAL:
        needed = tl.max(tl.where(at < count, at % group, 0), 0) >= first * 32
    else:
        needed = True
    if needed:
        row = tl.load(rows + at, mask=at < count, other=0)
        word = first + tl.arange(0, WORDS)
        zero = tl.zeros((ROWS, WORDS), tl.uint32)
        b = zero + row.to(tl.uint32)[:, None]
        c = zero + (row >> 32).to(tl.uint32)[:, None]
        n = zero + (word * (DIGITS // 4)).to(tl.uint32)[None, :]
        key = tl.load(seed)
        kept = zero - 1
        for call in tl.static_range(DIGITS // 4):
            if (THRESHOLD & ((16 << (4 * call)) - 1)) != 0:  # below the lowest 1 of p's digits nothing is decided
                w0, w1, w2, w3 = philox(n + call, b, c, zero, key, ROUNDS)
                kept = (w0 & kept) if (THRESHOLD >> (4 * call)) & 1 else (w0 | kept)
                kept = (w1 & kept) if (THRESHOLD >> (4 * call + 1)) & 1 else (w1 | kept)
                kept = (w2 & kept) if (THRESHOLD >> (4 * call + 2)) & 1 else (w2 | kept)
                kept = (w3 & kept) if (THRESHOLD >> (4 * call + 3)) & 1 else (w3 | kept)
        to = (at // group * outer + at % group * inner)[:, None] + (word.to(tl.int64) * step)[None, :]
        tl.store(found + to, kept.to(tl.int32, bitcast=True), mask=(at < count)[:, None] & (word < words)[None, :])


@triton.jit
def random(seed, rows, found, count, columns, stream, ROUNDS: tl.constexpr, ROWS: tl.constexpr, CALLS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    call = tl.program_id(1) * CALLS + tl.arange(0, CALLS)
    row = tl.load(rows + at, mask=at < count, other=0)
    zero = tl.zeros((ROWS, CALLS), tl.uint32)
    a = zero + call.to(tl.uint32)[None, :]
    b = zero + row.to(tl.uint32)[:, None]
    c = zero + (row >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = philox(a, b, c, zero + stream.to(tl.uint32), tl.load(seed), ROUNDS)
    to = found + at[:, None] * columns + call[None, :] * 4
    here = (at < count)[:, None]
    for i in tl.static_range(4):
        word = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
        tl.store(to + i, word.to(tl.int32, bitcast=True), mask=here & (call * 4 + i < columns)[None, :])
