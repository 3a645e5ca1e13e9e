"""Pieces of a transformer, and of what people make of one: each takes a stream [b, s, d] and returns one of the same shape."""

from __future__ import annotations

from collections.abc import Callable

from autoshard.trace.graph import Ref

from .case import opaque_key
from .maker import Maker


def norm(m: Maker, h: str) -> str:
    d = m.shape(h)[-1]
    kind = m.rng.randrange(4)
    if kind == 0:
        return m.op("layer_norm.default", h, (d,), m.param(d), m.param(d) if m.rng.random() < 0.7 else None, 1e-2)
    if kind == 1:
        return m.op("layer_norm.default", h, (d,), None, None, 1e-2)
    square = m.op("pow.Tensor_Scalar", h, 2) if m.rng.random() < 0.5 else m.op("mul.Tensor", h, h)
    scale = m.op("rsqrt.default", m.op("add.Tensor", m.op("mean.dim", square, (len(m.shape(h)) - 1,), True), 0.1))
    y = m.op("mul.Tensor", h, scale)
    return m.op("mul.Tensor", y, m.param(d)) if kind == 2 else y


def mlp(m: Maker, h: str) -> str:
    d, f = m.shape(h)[-1], m.rng.choice((3, 4, 5, 6, 7, 8, 12))
    y = m.smooth(m.linear(h, f))
    y = m.dropout(y) if m.rng.random() < 0.15 else y
    return m.residual(h, m.linear(y, d))


def gated(m: Maker, h: str) -> str:
    d, f = m.shape(h)[-1], m.rng.choice((2, 3, 4, 6, 8))
    if m.rng.random() < 0.7:
        both = m.linear(h, 2 * f)
        last = len(m.shape(h)) - 1
        if m.rng.random() < 0.5:
            a, b = m.many("split_with_sizes.default", both, (f, f), last)
        else:
            a, b = m.slice(both, last, 0, f), m.slice(both, last, f, 2 * f)
    else:
        a, b = m.linear(h, f), m.linear(h, f)
    return m.residual(h, m.linear(m.op("mul.Tensor", m.op("silu.default", a), b), d))


def attention(m: Maker, h: str) -> str:
    b, s, d = m.shape(h)
    heads, e = (m.heads, m.head) if d == m.width else (m.rng.choice((1, 2, 4)), 3)
    kv = m.rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    if m.rng.random() < 0.5:
        fused = m.linear(h, (heads + 2 * kv) * e)
        ends = (heads * e, (heads + kv) * e, (heads + 2 * kv) * e)
        if m.rng.random() < 0.5:
            parts = m.many("split_with_sizes.default", fused, (heads * e, kv * e, kv * e), 2)
        else:
            parts = tuple(m.slice(fused, 2, start, end) for start, end in zip((0, *ends), ends, strict=False))
    else:
        parts = (m.linear(h, heads * e), m.linear(h, kv * e), m.linear(h, kv * e))
    q, k, v = (m.permute(m.reshape(x, b, s, n, e), 0, 2, 1, 3) for x, n in zip(parts, (heads, kv, kv), strict=True))
    kind = m.rng.choice(("causal", "causal", "none", "keys", "bias", "full"))
    mask: str | None
    if kind == "keys":
        mask = m.reshape(m.key_mask(b, s), b, 1, 1, s)
        mask = m.expand(mask, b, 1, s, s) if m.rng.random() < 0.5 else mask
    elif kind == "bias":
        mask = m.case.source(m.name("c"), m.rng.choice(("constant", "buffer")), (1, m.rng.choice((1, heads)), s, s))
    else:
        mask = m.input(b, m.rng.choice((1, heads)), s, s) if kind == "full" else None
    out = m.op("autoshard.attention.default", q, k, v, mask, kind == "causal", round(e**-0.5, 3))
    out = m.reshape(m.permute(out, 0, 2, 1, 3), b, s, heads * e)
    return m.residual(h, m.linear(out, d))


def eager_attention(m: Maker, h: str) -> str:
    b, s, d = m.shape(h)
    q, k, v = (m.linear(h, d, False) for _ in range(3))
    scores = m.op("matmul.default" if m.rng.random() < 0.5 else "bmm.default", q, m.permute(k, 0, 2, 1))
    scores = m.op("mul.Tensor", scores, 0.5)
    if m.rng.random() < 0.6:
        mask = m.expand(m.reshape(m.key_mask(b, s), b, 1, s), b, s, s)
        low = m.case.source(m.name("c"), "constant", (), fill="normal")
        scores = m.op("where.self", mask, scores, m.op("sub.Tensor", low, 9.0))
    weights = m.op("softmax.int", scores, 2)
    weights = m.dropout(weights) if m.rng.random() < 0.3 else weights
    return m.residual(h, m.op("matmul.default", weights, v))


def mix_tokens(m: Maker, h: str) -> str:
    _, s, _ = m.shape(h)
    turned = m.permute(h, 0, 2, 1)
    return m.residual(h, m.permute(m.linear(m.smooth(m.linear(turned, m.rng.choice((2, 3, 5)))), s), 0, 2, 1))


def rotary(m: Maker, h: str) -> str:
    b, s, d = m.shape(h)
    half = d // 2
    if half == 0:
        return norm(m, h)
    a, c = m.slice(h, 2, 0, half), m.slice(h, 2, half, d)
    turned = m.op("cat.default", (Ref(m.op("neg.default", c)), Ref(a)), 2)
    table = m.case.source(m.name("c"), m.rng.choice(("constant", "buffer")), (1, s, d))
    return m.op("add.Tensor", m.op("mul.Tensor", h, m.expand(table, b, s, d)), m.op("mul.Tensor", turned, m.param(d)))


def shift(m: Maker, h: str) -> str:
    b, s, d = m.shape(h)
    if m.rng.random() < 0.5:
        moved = m.slice(m.op("constant_pad_nd.default", h, (0, 0, 1, 0), 0.0), 1, 0, s)
    else:
        start = m.expand(m.param(1, 1, d), b, 1, d)
        moved = m.slice(m.op("cat.default", (Ref(start), Ref(h)), 1), 1, 0, s)
    return m.residual(h, m.op("mul.Tensor", moved, m.param(d)))


def masked(m: Maker, h: str) -> str:
    b, s, d = m.shape(h)
    keep = m.expand(m.reshape(m.key_mask(b, s), b, s, 1), b, s, d)
    if m.rng.random() < 0.4:
        return m.op("where.self", keep, h, m.param(d))
    if m.rng.random() < 0.5:
        return m.op("mul.Tensor", h, m.op("_to_copy.default", keep, dtype="torch.float64"))
    return m.op("masked_fill.Scalar", h, m.op("logical_not.default", keep), 0.0)


def pool(m: Maker, h: str) -> str:
    b, s, d = m.shape(h)
    kind = m.rng.randrange(3)
    if kind == 0:
        mean = m.op("mean.dim", h, (1,), True)
        return m.residual(h, m.expand(mean, b, s, d) if m.rng.random() < 0.5 else mean)
    if kind == 1:
        w = m.op("_to_copy.default", m.key_mask(b, s), dtype="torch.float64")
        total = m.op("sum.dim_IntList", m.op("mul.Tensor", h, m.reshape(w, b, s, 1)), (1,), True)
        count = m.op("sum.dim_IntList", w, (1,), True)
        return m.residual(h, m.op("div.Tensor", total, m.reshape(count, b, 1, 1)))
    gate = m.op("sigmoid.default", m.op("sum.dim_IntList", h, (2,), True))
    return m.op("mul.Tensor", h, gate)


def scaled(m: Maker, h: str) -> str:
    """Divided by its largest square along some dims, as scaling for a low precision does."""
    dims = m.rng.choice(((2,), (1,), (1, 2), (2,), (0, 1, 2)))
    still = m.op("detach.default", h)
    peak = m.op("amax.default", m.op("mul.Tensor", still, still), dims, True)
    return m.op("div.Tensor", h, m.op("add.Tensor", peak, 1.0))


def experts(m: Maker, h: str) -> str:
    d, n, f = m.shape(h)[-1], m.rng.choice((2, 3, 4)), m.rng.choice((2, 3, 4))
    gates = m.op("softmax.int", m.linear(h, n, False), 2)
    up = m.smooth(m.op("einsum.default", "bsd,edf->bsef", (Ref(h), Ref(m.param(n, d, f)))))
    down = m.op("einsum.default", "bsef,efd,bse->bsd", (Ref(up), Ref(m.param(n, f, d)), Ref(gates)))
    return m.residual(h, down)


def heads(m: Maker, h: str) -> str:
    """Split into heads, do something there, merge."""
    b, s, d = m.shape(h)
    n = m.rng.choice([n for n in range(1, d + 1) if d % n == 0])
    y = m.reshape(h, b, s, n, d // n)
    kind = m.rng.randrange(3)
    if kind == 0:
        y = m.op("mul.Tensor", y, m.param(n, 1))
    elif kind == 1:
        y = m.op("einsum.default", "bsne,nef->bsnf", (Ref(y), Ref(m.param(n, d // n, d // n))))
    else:
        y = m.permute(m.linear(m.permute(y, 0, 1, 3, 2), n), 0, 1, 3, 2)
    return m.reshape(y, b, s, d)


def flatten(m: Maker, h: str) -> str:
    b, s, d = m.shape(h)
    if m.rng.random() < 0.5:
        return m.reshape(m.op("mm.default", m.reshape(h, b * s, d), m.param(d, d)), b, s, d)
    return m.residual(h, m.reshape(m.linear(m.reshape(h, b, s * d), s * d), b, s, d))


def picked(m: Maker, h: str) -> str:
    b, s, d = m.shape(h)
    kind = m.rng.randrange(3)
    if kind == 0:
        ids = m.case.source(m.name("x"), m.rng.choice(("input", "constant")), (s,), "int64", f"ids:{s}")
        y = m.op("index.Tensor", h, (None, Ref(ids)))
    elif kind == 1:
        y = m.op("gather.default", h, m.rng.choice((1, 2)), m.input(b, s, d, dtype="int64", fill=f"ids:{min(s, d)}"))
    else:
        ids = m.case.source(m.name("c"), "constant", (d,), "int64", f"ids:{d}")
        y = m.op("index_select.default", h, 2, ids)
    return m.residual(h, y)


def conv(m: Maker, h: str) -> str:
    d = m.shape(h)[-1]
    bias = m.param(d) if m.rng.random() < 0.5 else None
    y = m.op("conv1d.default", m.permute(h, 0, 2, 1), m.param(d, d, 3), bias, (1,), (1,), (1,), 1)
    return m.residual(h, m.permute(y, 0, 2, 1))


def misc(m: Maker, h: str) -> str:
    kind = m.rng.randrange(7)
    if kind == 0:
        return m.dropout(h)
    if kind == 1:
        return m.op("add.Tensor", h, m.op("mul.Tensor", m.op("detach.default", m.smooth(h)), 0.3))
    if kind == 2:
        return m.op("mul.Tensor", h, m.param())
    if kind == 3:
        return m.op("div.Tensor", h, m.op("add.Tensor", m.op("sigmoid.default", m.param(m.shape(h)[-1])), 1.0))
    if kind == 4:
        return m.op("cumsum.default", m.op("mul.Tensor", h, 0.3), m.rng.choice((1, 2)))
    if kind == 5:
        return m.op("flip.default", h, (m.rng.choice((1, 2)),))
    shape = m.shape(h)
    if m.rng.random() < 0.5:
        return m.op("autoshard.opaque.default", opaque_key(m.rng.choice(("wave", "whiten")), shape), (Ref(h),))
    a, b = m.many("autoshard.opaque.default", opaque_key("mix", shape), (Ref(h), Ref(m.smooth(h))))
    return m.op("add.Tensor", a, b)


def batch_statistics(m: Maker, h: str) -> str:
    d = m.shape(h)[-1]
    mean = m.op("mean.dim", h, (0, 1), False)
    running = m.case.source(m.name("r"), "buffer", (d,))
    new = m.op("add.Tensor", m.op("mul.Tensor", running, 0.9), m.op("mul.Tensor", m.op("detach.default", mean), 0.1))
    m.case.graph.updates[running] = new
    return m.op("sub.Tensor", h, mean)


Piece = Callable[[Maker, str], str]
SMALL: list[Piece] = [mlp, gated, mix_tokens, heads, flatten, norm]
"""Pieces of few ops, for layers that repeat."""
PIECES: list[tuple[Piece, int]] = [
    (norm, 8), (mlp, 9), (gated, 6), (attention, 14), (eager_attention, 3), (mix_tokens, 3), (rotary, 3), (shift, 3), (masked, 4),
    (pool, 4), (scaled, 4), (experts, 3), (heads, 5), (flatten, 2), (picked, 3), (conv, 1), (misc, 6), (batch_statistics, 1),
]  # fmt: skip
