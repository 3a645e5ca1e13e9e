"""Triton of `dropout_attention`: forward a block of queries; backward once a block of queries (dq) and once a block of keys (dk, dv).

Scores are in units of ln 2, so that exp2 does. Blocks that lie inside of what is attended to are told apart from those at its edges, which
alone compare positions.
"""

# shapes: M queries by N keys, or turned N by M; E elements of a head, WIDE their power of two. Pointers are moved to batch and head first.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(bits, query, inside, word, queries, N: tl.constexpr, TURNED: tl.constexpr):
    """Which of M by N elements are kept: one word of 32 keys a query, N / 32 times."""
    key = tl.arange(0, N)
    key = key[:, None] if TURNED else key[None, :]
    found = tl.load(bits + word * queries + query, mask=inside, other=0)
    found = found[None, :] if TURNED else found[:, None]
    for more in tl.static_range(1, N // 32):
        last = tl.load(bits + (word + more) * queries + query, mask=inside, other=0)
        last = last[None, :] if TURNED else last[:, None]
        found = tl.where(key >= 32 * more, last, found)
    return (found & (1 << (key % 32))) != 0


@triton.jit
def masked(s, mask, query, key, inside, q_step, k_step, scale, CAUSAL: tl.constexpr, EDGE: tl.constexpr, MASK: tl.constexpr):
    """Scores with the mask, before they are scaled, or after that where the mask is added. `query`, `key`: as one row and one column,
    whichever; `inside`: of the keys."""
    if MASK == "keys" or MASK == "keys, added":
        m = tl.load(mask + key * k_step, mask=inside, other=0)
    elif MASK != "":
        m = tl.load(mask + query * q_step + key * k_step, mask=inside & (query >= 0), other=0)
    if MASK == "keys" or MASK == "both":
        s = tl.where(m != 0, s, float("-inf"))
    elif MASK != "":
        m = m.to(tl.float32)
        s = s * scale + tl.where(m == float("-inf"), m, tl.maximum(m * 1.4426950408889634, -1e38))
    if CAUSAL and EDGE:
        s = tl.where(query >= key, s, float("-inf"))
    if EDGE:
        s = tl.where(inside, s, float("-inf"))
    return s


@triton.jit
def units(scale, MASK: tl.constexpr):
    """What scores are still to be multiplied by."""
    if MASK == "keys, added" or MASK == "both, added":
        return 1.0
    else:
        return scale


@triton.jit
def rows_of(x, row, count, stride, E: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """[rows WIDE], 0 beyond."""
    e = tl.arange(0, WIDE)
    at = x + row[:, None] * stride + e[None, :]
    if EVEN and E == WIDE:
        return tl.load(at)
    elif E == WIDE:
        return tl.load(at, mask=(row < count)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(row < count)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def columns_of(x, row, count, stride, E: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """The same, [WIDE rows]."""
    e = tl.arange(0, WIDE)
    at = x + row[None, :] * stride + e[:, None]
    if EVEN and E == WIDE:
        return tl.load(at)
    elif E == WIDE:
        return tl.load(at, mask=(row < count)[None, :], other=0.0)
    else:
        return tl.load(at, mask=(row < count)[None, :] & (e < E)[:, None], other=0.0)


@triton.jit
def store_rows(x, value, row, count, stride, E: tl.constexpr, WIDE: tl.constexpr):
    e = tl.arange(0, WIDE)
    at = x + row[:, None] * stride + e[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(row < count)[:, None] & (e < E)[None, :])


@triton.jit
def ends(first, queries, keys, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr):
    """Of M queries from `first` on: where the keys end that all of them see, in whole blocks; where the last key is."""
    whole = keys // N * N
    last = keys
    if CAUSAL:
        whole = tl.minimum(whole, (first + 1) // N * N)
        last = tl.minimum(last, first + M)
    return whole, last


@triton.jit
def look(
    acc, total, top, q, k, v, mask, bits, query, begin, end, queries, keys, k_row, v_row, q_step, k_step, scale,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, MASK: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The softmax's running maximum, sum and product with v over keys from `begin` to `end`."""
    for start in range(begin, end, N):
        key = start + tl.arange(0, N)
        s = tl.dot(q, columns_of(k, key, keys, k_row, E, WIDE, not EDGE), input_precision="ieee")
        s = masked(s, mask, query[:, None], key[None, :], (key < keys)[None, :], q_step, k_step, scale, CAUSAL, EDGE, MASK)
        unit = units(scale, MASK)
        new = tl.maximum(top, tl.max(s, 1) * unit)
        base = new if MASK == "" else tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s * unit - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        p = tl.where(kept(bits, query, query < queries, start // 32, queries, N, False), p, 0.0)
        x = rows_of(v, key, keys, v_row, E, WIDE, not EDGE)
        acc = tl.dot(p.to(x.dtype), x, acc * fade[:, None], input_precision="ieee")
        top = new
    return acc, total, top


@triton.jit
def forward(
    q, k, v, mask, bits, out, lse, queries, keys, words, heads, group, scale, gain,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, m_b, m_h, m_s, m_t,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(1)
    b, h = (at // heads).to(tl.int64), (at % heads).to(tl.int64)
    # the longest first
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    query = first + tl.arange(0, M)
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    if MASK != "":
        mask += b * m_b + h * m_h
    bits += at.to(tl.int64) * words * queries
    x = rows_of(q + b * q_b + h * q_h, query, queries, q_s, E, WIDE, False)
    whole, last = ends(first, queries, keys, M, N, CAUSAL)
    acc = tl.zeros((M, WIDE), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    # rows past the end read what lies at the last
    there = tl.minimum(query, queries - 1)
    acc, total, top = look(
        acc, total, top, x, k, v, mask, bits, there, 0, whole, queries, keys, k_s, v_s, m_s, m_t, scale,
        CAUSAL, False, MASK, E, WIDE, N,
    )  # fmt: skip
    acc, total, top = look(
        acc, total, top, x, k, v, mask, bits, there, whole, last, queries, keys, k_s, v_s, m_s, m_t, scale,
        CAUSAL, True, MASK, E, WIDE, N,
    )  # fmt: skip
    dead = total == 0.0
    acc = acc * (gain / tl.where(dead, 1.0, total))[:, None]
    store_rows(out + b * o_b + h * o_h, acc, query, queries, o_s, E, WIDE)
    size = top * 0.6931471805599453 + tl.log(tl.where(dead, 1.0, total))
    tl.store(lse + at.to(tl.int64) * queries + query, tl.where(dead, float("-inf"), size), mask=query < queries)


@triton.jit
def gather_dq(
    acc, x, g, size, delta, k, v, mask, bits, query, begin, end, queries, keys, k_row, v_row, q_step, k_step, scale, gain,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, MASK: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, N):
        key = start + tl.arange(0, N)
        y = rows_of(k, key, keys, k_row, E, WIDE, not EDGE)
        s = tl.dot(x, tl.trans(y), input_precision="ieee")
        s = masked(s, mask, query[:, None], key[None, :], (key < keys)[None, :], q_step, k_step, scale, CAUSAL, EDGE, MASK)
        p = tl.exp2(s * units(scale, MASK) - size[:, None])
        dp = tl.dot(g, columns_of(v, key, keys, v_row, E, WIDE, not EDGE), input_precision="ieee")
        keep = kept(bits, query, query < queries, start // 32, queries, N, False)
        ds = p * (tl.where(keep, dp * gain, 0.0) - delta[:, None])
        acc = tl.dot(ds.to(y.dtype), y, acc, input_precision="ieee")
    return acc


@triton.jit
def backward_queries(
    grad, q, k, v, mask, bits, out, lse, delta, dq, queries, keys, words, heads, group, scale, gain, factor,
    g_b, g_h, g_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, d_b, d_h, d_s, m_b, m_h, m_s, m_t,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq, and delta = Σ dO · O of each row for the keys' pass."""
    at = tl.program_id(1)
    b, h = (at // heads).to(tl.int64), (at % heads).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    query = first + tl.arange(0, M)
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    if MASK != "":
        mask += b * m_b + h * m_h
    bits += at.to(tl.int64) * words * queries
    line = at.to(tl.int64) * queries + query
    g = rows_of(grad + b * g_b + h * g_h, query, queries, g_s, E, WIDE, False)
    o = rows_of(out + b * o_b + h * o_h, query, queries, o_s, E, WIDE, False)
    both = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + line, both, mask=query < queries)
    size = tl.load(lse + line, mask=query < queries, other=float("inf"))
    size = tl.where(size == float("-inf"), float("inf"), size * 1.4426950408889634)
    x = rows_of(q + b * q_b + h * q_h, query, queries, q_s, E, WIDE, False)
    whole, last = ends(first, queries, keys, M, N, CAUSAL)
    acc = tl.zeros((M, WIDE), tl.float32)
    there = tl.minimum(query, queries - 1)
    acc = gather_dq(
        acc, x, g, size, both, k, v, mask, bits, there, 0, whole, queries, keys, k_s, v_s, m_s, m_t, scale, gain,
        CAUSAL, False, MASK, E, WIDE, N,
    )  # fmt: skip
    acc = gather_dq(
        acc, x, g, size, both, k, v, mask, bits, there, whole, last, queries, keys, k_s, v_s, m_s, m_t, scale, gain,
        CAUSAL, True, MASK, E, WIDE, N,
    )  # fmt: skip
    store_rows(dq + b * d_b + h * d_h, acc * factor, query, queries, d_s, E, WIDE)


@triton.jit
def gather_dkv(
    dk, dv, k, v, key, grad, q, mask, bits, lse, delta, begin, end, queries, keys, word, g_row, q_row, q_step, k_step, scale, gain,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr,
    E: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, M):
        query = start + tl.arange(0, M)
        inside = query < queries
        there = tl.minimum(query, queries - 1)
        x = rows_of(q, query, queries, q_row, E, WIDE, EVEN)
        size = tl.load(lse + query, mask=inside, other=float("inf"))
        size = tl.where(size == float("-inf"), float("inf"), size * 1.4426950408889634)
        s = tl.dot(k, tl.trans(x), input_precision="ieee")
        s = masked(s, mask, there[None, :], key[:, None], (key < keys)[:, None], q_step, k_step, scale, CAUSAL, EDGE, MASK)
        p = tl.exp2(s * units(scale, MASK) - size[None, :])
        keep = kept(bits, query, inside, word, queries, N, True)
        g = rows_of(grad, query, queries, g_row, E, WIDE, EVEN)
        dv = tl.dot(tl.where(keep, p, 0.0).to(g.dtype), g, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(g), input_precision="ieee")
        both = tl.load(delta + query, mask=inside, other=0.0)
        ds = p * (tl.where(keep, dp * gain, 0.0) - both[None, :])
        dk = tl.dot(ds.to(x.dtype), x, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def backward_keys(
    grad, q, k, v, mask, bits, lse, delta, dk, dv, queries, keys, words, heads, group, scale, gain, factor,
    g_b, g_h, g_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, m_b, m_h, m_s, m_t,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr,
    E: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over all queries of all query heads that read it."""
    at = tl.program_id(1)
    b, h = (at // heads).to(tl.int64), (at % heads).to(tl.int64)
    first = tl.program_id(0) * N
    key = first + tl.arange(0, N)
    x = rows_of(k + b * k_b + h * k_h, key, keys, k_s, E, WIDE, False)
    y = rows_of(v + b * v_b + h * v_h, key, keys, v_s, E, WIDE, False)
    total_k = tl.zeros((N, WIDE), tl.float32)
    total_v = tl.zeros((N, WIDE), tl.float32)
    begin, seen = 0, 0
    if CAUSAL:
        begin = tl.minimum(first // M * M, queries)
        seen = tl.minimum((first + N + M - 2) // M * M, (queries + M - 1) // M * M)
    for each in range(group):
        head = h * group + each
        line = (b * heads * group + head) * queries
        own = mask
        if MASK != "":
            own += b * m_b + head * m_h
        if CAUSAL:
            total_k, total_v = gather_dkv(
                total_k, total_v, x, y, key, grad + b * g_b + head * g_h, q + b * q_b + head * q_h, own, bits + line * words,
                lse + line, delta + line, begin, seen, queries, keys, first // 32, g_s, q_s, m_s, m_t, scale, gain,
                True, True, MASK, EVEN, E, WIDE, M, N,
            )  # fmt: skip
        total_k, total_v = gather_dkv(
            total_k, total_v, x, y, key, grad + b * g_b + head * g_h, q + b * q_b + head * q_h, own, bits + line * words,
            lse + line, delta + line, seen, queries, queries, keys, first // 32, g_s, q_s, m_s, m_t, scale, gain,
            False, False, MASK, EVEN, E, WIDE, M, N,
        )  # fmt: skip
    store_rows(dk + b * dk_b + h * dk_h, total_k * factor, key, keys, dk_s, E, WIDE)
    store_rows(dv + b * dv_b + h * dv_h, total_v * gain, key, keys, dv_s, E, WIDE)
