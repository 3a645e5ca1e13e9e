"""Triton of `rotary`. A program holds one token of some heads of q or of k; those of v, if there is one, are copied."""

# shapes: q, k, v and the results [b h s e] of any strides but that of e, which is 1; cos, sin [b s w]

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(
    source, target, cos, sin, heads, first, source_head, target_head,
    R: tl.constexpr, E: tl.constexpr, WHOLE: tl.constexpr, INTERLEAVED: tl.constexpr, ADJOINT: tl.constexpr, ACC: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    head = (first + tl.arange(0, HEADS))[:, None]
    col = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (col < R // 2)
    one = 2 * col if INTERLEAVED else col
    two = 2 * col + 1 if INTERLEAVED else col + R // 2
    known = col < R // 2
    c1 = tl.load(cos + (one if WHOLE else col), mask=known, other=0.0).to(ACC)
    s1 = tl.load(sin + (one if WHOLE else col), mask=known, other=0.0).to(ACC)
    c2 = c1
    s2 = s1
    if WHOLE:
        c2 = tl.load(cos + two, mask=known, other=0.0).to(ACC)
        s2 = tl.load(sin + two, mask=known, other=0.0).to(ACC)
    x1 = tl.load(source + head * source_head + one, mask=inside, other=0.0).to(ACC)
    x2 = tl.load(source + head * source_head + two, mask=inside, other=0.0).to(ACC)
    if ADJOINT:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    tl.store(target + head * target_head + one, y1.to(target.dtype.element_ty), mask=inside)
    tl.store(target + head * target_head + two, y2.to(target.dtype.element_ty), mask=inside)
    if R < E:
        copy(source + R, target + R, heads, first, source_head, target_head, E - R, HEADS, REST)


@triton.jit
def copy(source, target, heads, first, source_head, target_head, E: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr):
    head = (first + tl.arange(0, HEADS))[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (head < heads) & (col < E)
    x = tl.load(source + head * source_head + col, mask=inside, other=0.0)
    tl.store(target + head * target_head + col, x.to(target.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    q, k, v, q_out, k_out, v_out, cos, sin, seq, heads, kv_heads,
    q_batch, q_head, q_seq, k_batch, k_head, k_seq, v_batch, v_head, v_seq,
    qo_batch, qo_head, qo_seq, ko_batch, ko_head, ko_seq, vo_batch, vo_head, vo_seq, table_batch, table_seq,
    R: tl.constexpr, E: tl.constexpr, WHOLE: tl.constexpr, INTERLEAVED: tl.constexpr, ADJOINT: tl.constexpr, ACC: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // seq).to(tl.int64)
    s = (tl.program_id(0) % seq).to(tl.int64)
    block = tl.program_id(1)
    of_q = (heads + HEADS - 1) // HEADS
    of_k = (kv_heads + HEADS - 1) // HEADS
    c = cos + b * table_batch + s * table_seq
    d = sin + b * table_batch + s * table_seq
    if block < of_q:
        turn(q + b * q_batch + s * q_seq, q_out + b * qo_batch + s * qo_seq, c, d, heads, block * HEADS, q_head, qo_head,
             R, E, WHOLE, INTERLEAVED, ADJOINT, ACC, HEADS, HALF, REST)  # fmt: skip
    elif block < of_q + of_k:
        turn(k + b * k_batch + s * k_seq, k_out + b * ko_batch + s * ko_seq, c, d, kv_heads, (block - of_q) * HEADS, k_head, ko_head,
             R, E, WHOLE, INTERLEAVED, ADJOINT, ACC, HEADS, HALF, REST)  # fmt: skip
    else:
        if v is not None:
            copy(v + b * v_batch + s * v_seq, v_out + b * vo_batch + s * vo_seq, kv_heads, (block - of_q - of_k) * HEADS, v_head, vo_head,
                 E, HEADS, COLS)  # fmt: skip
