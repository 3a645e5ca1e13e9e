"""Random graphs in the normal form that capture guarantees: 5 to 40 ops, dims that nothing divides, forward and backward.

`generate(seed)` gives a Case. A graph has a start (tokens or floats), a few layers of random pieces on a stream (a layer may repeat, with
the same structure, so that blocks have kinds), sometimes a soup of arbitrary ops on all that is there, and a loss. Functions are
smooth and values stay near 1, so that 1e-9 tells a bug from rounding.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

from autoshard.plan.microbatch import NotSplittable, split_time
from autoshard.trace.blocks import find_blocks
from autoshard.trace.graph import Ref

from .case import Case, opaque_key

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15)
MESHES = [(p, d, t) for p in range(1, 5) for d in range(1, 9) for t in range(1, 9) if p * d * t <= 16]
OFTEN = [1 / (p * d * t) for p, d, t in MESHES]
OPS = range(5, 41)
SMOOTH = ("tanh", "sigmoid", "silu", "gelu", "sin", "softplus", "erf")


class Maker:
    """A graph in the making: `pool` holds the floating values to go on with; `rng` decides."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.case = Case(plan=seed % 1000, data=seed % 1000)
        self.values = self.case.graph.values
        self.count: dict[str, int] = {}
        self.batch, self.seq = self.rng.choice((2, 3, 4, 4, 6, 8, 8, 12, 16)), self.rng.choice((2, 3, 4, 5, 6, 7))
        self.heads, self.head = self.rng.choice((1, 2, 3, 4, 6)), self.rng.choice((1, 2, 3, 4, 5))
        self.width = self.heads * self.head
        self.vocab = self.rng.choice((7, 11, 12, 16, 61))
        self.orders = 0

    # ---- building ---------------------------------------------------------------------------------------------------

    def name(self, stem: str) -> str:
        self.count[stem] = self.count.get(stem, 0) + 1
        return f"{stem}{self.count[stem]}"

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].tensor.shape

    def param(self, *shape: int) -> str:
        fill = self.rng.choice(("normal", "positive")) if len(shape) < 2 else "normal"
        return self.case.source(self.name("w"), "frozen" if self.rng.random() < 0.05 else "param", shape, fill=fill)

    def input(self, *shape: int, dtype: str = "float64", fill: str = "normal", batch: int | None = 0) -> str:
        return self.case.source(self.name("x"), "input", shape, dtype, fill, batch)

    def op(self, op: str, *args: Any, **kwargs: Any) -> str:
        return self.many(op, *args, **kwargs)[0]

    def many(self, op: str, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        return self.case.op(op if op.startswith("autoshard") else f"aten.{op}", refs(args, self.values), kwargs)

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("reshape.default", x, shape) if self.shape(x) != shape else x

    def permute(self, x: str, *dims: int) -> str:
        return self.op("permute.default", x, dims)

    def slice(self, x: str, dim: int, start: int, end: int) -> str:
        return self.op("slice.Tensor", x, dim, start, end, 1)

    def linear(self, x: str, n: int, bias: bool | None = None) -> str:
        """A linear in one of its spellings."""
        *lead, k = self.shape(x)
        how = self.rng.choice(("linear", "linear", "matmul", "einsum"))
        if how == "linear":
            y = self.op("linear.default", x, self.param(n, k))
        elif how == "matmul":
            y = self.op("matmul.default", x, self.param(k, n))
        else:
            letters = "abcdefg"[: len(lead)]
            y = self.op("einsum.default", f"{letters}k,kn->{letters}n", (Ref(x), Ref(self.param(k, n))))
        if bias if bias is not None else self.rng.random() < 0.4:
            y = self.op("add.Tensor", y, self.param(n))
        return y

    def smooth(self, x: str) -> str:
        return self.op(f"{self.rng.choice(SMOOTH)}.default", x)

    def residual(self, x: str, y: str) -> str:
        return self.op("add.Tensor", x, y) if self.rng.random() < 0.8 else self.op("add.Tensor", self.op("mul.Tensor", x, 0.5), y)

    def dropout(self, x: str) -> str:
        shape = self.shape(x)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        mask = self.op("autoshard.dropout_mask.default", shape, self.rng.choice((0.1, 0.5)), "torch.float64", self.orders, strides)
        self.orders += 1
        return self.op("mul.Tensor", x, mask)

    def expand(self, x: str, *shape: int) -> str:
        return self.op("expand.default", x, shape) if self.shape(x) != shape else x

    def key_mask(self, batch: int, seq: int) -> str:
        return self.input(batch, seq, dtype="bool", fill="mask")


def refs(tree: Any, values: dict[str, Any]) -> Any:
    """Names of values become Refs."""
    if isinstance(tree, str):
        return Ref(tree) if tree in values else tree
    return tuple(refs(t, values) for t in tree) if isinstance(tree, tuple) else tree


# ---- pieces: stream [b, s, d] → stream of the same shape ------------------------------------------------------------


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
        parts = m.many("split_with_sizes.default", fused, (heads * e, kv * e, kv * e), 2)
    else:
        parts = (m.linear(h, heads * e), m.linear(h, kv * e), m.linear(h, kv * e))
    q, k, v = (m.permute(m.reshape(x, b, s, n, e), 0, 2, 1, 3) for x, n in zip(parts, (heads, kv, kv), strict=True))
    kind = m.rng.choice(("causal", "causal", "none", "keys", "bias", "full"))
    if kind == "keys":
        mask = m.expand(m.reshape(m.key_mask(b, s), b, 1, 1, s), b, 1, s, s) if m.rng.random() < 0.5 else m.reshape(m.key_mask(b, s), b, 1, 1, s)
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
    kind = m.rng.randrange(4)
    if kind == 0:
        mean = m.op("mean.dim", h, (1,), True)
        return m.residual(h, m.expand(mean, b, s, d) if m.rng.random() < 0.5 else mean)
    if kind == 1:
        w = m.op("_to_copy.default", m.key_mask(b, s), dtype="torch.float64")
        total = m.op("sum.dim_IntList", m.op("mul.Tensor", h, m.reshape(w, b, s, 1)), (1,), True)
        count = m.op("sum.dim_IntList", w, (1,), True)
        return m.residual(h, m.op("div.Tensor", total, m.reshape(count, b, 1, 1)))
    if kind == 2:
        gate = m.op("sigmoid.default", m.op("sum.dim_IntList", h, (2,), True))
        return m.op("mul.Tensor", h, gate)
    peak = m.op("amax.default", m.op("detach.default", h), (m.rng.choice((1, 2)),), True)
    return m.op("sub.Tensor", h, m.op("mul.Tensor", peak, 0.1))


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


PIECES: list[tuple[Callable[[Maker, str], str], int]] = [
    (norm, 8), (mlp, 9), (gated, 6), (attention, 8), (eager_attention, 3), (mix_tokens, 3), (rotary, 3), (shift, 3), (masked, 4), (pool, 4),
    (experts, 3), (heads, 5), (flatten, 2), (picked, 3), (conv, 1), (misc, 6), (batch_statistics, 1),
]  # fmt: skip


# ---- soup: any op on anything ---------------------------------------------------------------------------------------


def soup(m: Maker, pool_: list[str], ops: int) -> None:
    """Random ops on values of the pool, the newest preferred; results join the pool."""
    while ops > 0:
        x = pool_[-1 - min(int(m.rng.expovariate(0.7)), len(pool_) - 1)]
        before = len(m.case.graph.ops)
        found = _one(m, x, pool_)
        pool_ += [y for y in found if m.values[y].tensor.numel <= 6000 and y not in pool_]
        ops -= max(1, len(m.case.graph.ops) - before)


def _one(m: Maker, x: str, pool_: list[str]) -> tuple[str, ...]:
    shape, rng = m.shape(x), m.rng
    rank = len(shape)
    kind = rng.choice(("smooth", "binary", "param", "permute", "reshape", "slice", "split", "cat", "reduce", "linear", "matmul", "expand", "softmax"))
    if rank == 0 or kind == "smooth":
        return (m.smooth(x),)
    dim = rng.randrange(rank)
    if kind == "binary":
        y = rng.choice(pool_)
        if all(a == b or 1 in (a, b) for a, b in zip(reversed(shape), reversed(m.shape(y)), strict=False)):
            return (m.op(rng.choice(("add.Tensor", "sub.Tensor", "mul.Tensor")), x, y),)
        kind = "param"
    if kind == "param":
        keep = tuple(n if rng.random() < 0.6 else 1 for n in shape[rng.randrange(rank) :])
        return (m.op(rng.choice(("add.Tensor", "mul.Tensor", "sub.Tensor")), x, m.param(*keep)),)
    if kind == "permute" and rank > 1:
        return (m.permute(x, *rng.sample(range(rank), rank)),)
    if kind == "reshape":
        return (m.reshape(x, *_refactor(rng, shape)),)
    if kind == "slice" and shape[dim] > 1:
        start = rng.randrange(shape[dim] - 1)
        return (m.slice(x, dim, start, rng.randrange(start + 1, shape[dim]) + (start == 0 and rng.random() < 0.3)),)
    if kind == "split" and shape[dim] > 1:
        at = rng.randrange(1, shape[dim])
        return m.many("split_with_sizes.default", x, (at, shape[dim] - at), dim)
    if kind == "cat":
        fits = [y for y in pool_ if len(m.shape(y)) == rank and all(a == b for d, (a, b) in enumerate(zip(shape, m.shape(y), strict=True)) if d != dim)]
        return (m.op("cat.default", tuple(Ref(y) for y in (x, rng.choice(fits))), dim),)
    if kind == "reduce":
        dims = tuple(sorted(rng.sample(range(rank), rng.choice((1, 1, min(2, rank))))))
        return (m.op(rng.choice(("sum.dim_IntList", "mean.dim", "mean.dim")), x, dims, rng.random() < 0.5),)
    if kind == "softmax":
        return (m.op(rng.choice(("softmax.int", "log_softmax.int")), x, dim),)
    if kind == "matmul" and rank > 1:
        fits = [y for y in pool_ if len(m.shape(y)) == rank and m.shape(y)[:-2] == shape[:-2] and m.shape(y)[-2] == shape[-1]]
        return (m.op("matmul.default", x, rng.choice(fits)),) if fits else (m.linear(x, rng.choice(SIZES)),)
    if kind == "expand" and 1 in shape:
        return (m.expand(x, *(n if n > 1 else rng.choice((2, 3)) for n in shape)),)
    return (m.linear(x, rng.choice(SIZES)),)


def _refactor(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape of as many elements: two neighbours merged, or one dim split."""
    dim = rng.randrange(len(shape))
    if dim + 1 < len(shape) and rng.random() < 0.5:
        return (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])
    by = rng.choice([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0])
    return (*shape[:dim], by, shape[dim] // by, *shape[dim + 1 :])


# ---- start and loss -------------------------------------------------------------------------------------------------


def start(m: Maker) -> tuple[str, str | None]:
    """The first stream, and the embedding if there is one."""
    b, s, d = m.batch, m.seq, m.width
    if m.rng.random() < 0.6:
        table = m.param(m.vocab, d)
        if m.rng.random() < 0.1:
            h = m.permute(m.op("embedding.default", table, m.input(s, b, dtype="int64", fill=f"ids:{m.vocab}", batch=1)), 1, 0, 2)
        else:
            h = m.op("embedding.default", table, m.input(b, s, dtype="int64", fill=f"ids:{m.vocab}"))
        if m.rng.random() < 0.4:
            h = m.op("add.Tensor", h, m.param(s, d) if m.rng.random() < 0.5 else m.expand(m.param(1, s, d), b, s, d))
        return h, table
    if m.rng.random() < 0.2:
        return m.linear(m.permute(m.input(s, b, 5, batch=1), 1, 0, 2), d), None
    return m.linear(m.input(b, s, m.rng.choice((3, 4, 7))), d), None


def loss(m: Maker, h: str, table: str | None) -> str:
    b, s, d = m.shape(h)
    kind = m.rng.choice(("entropy", "entropy", "square", "sum", "masked", "last"))
    if kind == "entropy":
        tied = table and m.shape(table)[1] == d and m.rng.random() < 0.6
        logits = m.op("linear.default", h, table) if tied else m.linear(h, m.vocab)
        return entropy(m, logits)
    if kind == "square":
        error = m.op("sub.Tensor", h, m.input(b, s, d))
        return m.op("mean.dim", m.op("pow.Tensor_Scalar", error, 2), (0, 1, 2), False)
    if kind == "sum":
        return m.op("sum.dim_IntList", m.op("mul.Tensor", h, m.input(b, s, d)), (0, 1, 2), False)
    if kind == "last":
        row = m.reshape(m.slice(h, 1, s - 1, s), b, d)
        return m.op("mean.dim", m.op("mul.Tensor", m.smooth(row), m.input(b, d)), (0, 1), False)
    w = m.op("_to_copy.default", m.key_mask(b, s), dtype="torch.float64")
    per = m.op("mean.dim", m.op("mul.Tensor", h, m.param(d)), (2,), False)
    total = m.op("sum.dim_IntList", m.op("mul.Tensor", m.op("mul.Tensor", per, per), w), (0, 1), False)
    return m.op("div.Tensor", total, m.op("sum.dim_IntList", w, (0, 1), False))


def entropy(m: Maker, logits: str) -> str:
    """Cross entropy with ignored labels, in the primitives that capture makes of it."""
    b, s, v = m.shape(logits)
    labels = m.input(b, s, dtype="int64", fill=f"labels:{v}")
    z = m.op("sub.Tensor", logits, m.op("amax.default", m.op("detach.default", logits), (2,), True))
    lse = m.op("log.default", m.op("sum.dim_IntList", m.op("exp.default", z), (2,), False))
    each = m.op("sub.Tensor", lse, m.op("autoshard.pick.default", z, labels))
    valid = m.op("ne.Scalar", labels, -100)
    zero = m.case.source(m.name("c"), "constant", ())
    each = m.op("where.self", valid, each, m.op("mul.Tensor", zero, 0.0))
    total = m.op("sum.dim_IntList", each, (0, 1), False)
    if m.rng.random() < 0.2:
        return m.op("div.Tensor", total, float(b * s))
    count = m.op("sum.dim_IntList", m.op("_to_copy.default", valid, dtype="torch.float64"), (0, 1), False)
    return m.op("div.Tensor", total, m.op("add.Tensor", count, 0.1))


def total(m: Maker, terms: list[str]) -> str:
    """The sum of scalars made of each term."""
    result = ""
    for x in terms:
        if dims := tuple(range(len(m.shape(x)))):
            x = m.op(m.rng.choice(("mean.dim", "mean.dim", "sum.dim_IntList")), x, dims, False)
        result = m.op("add.Tensor", result, x) if result else x
    return result


def layers(m: Maker, h: str, budget: int, made: list[str]) -> str:
    """Pieces on the stream, some groups of them several times over with the same structure."""
    while len(m.case.graph.ops) < budget:
        pieces = m.rng.choices([p for p, _ in PIECES], [w for _, w in PIECES], k=m.rng.choice((1, 1, 2, 2, 3)))
        if m.rng.random() < 0.5:
            pieces = [norm, *pieces] if pieces[0] is not norm else pieces
        same, now = m.rng.randrange(1 << 30), m.rng
        before = len(m.case.graph.ops)
        for _ in range(m.rng.choice((1, 1, 2, 3))):
            m.rng = random.Random(same)
            for piece in pieces:
                h = piece(m, h)
                made.append(h)
            if 2 * len(m.case.graph.ops) - before > budget + 6:
                break
        m.rng = now
    return h


def generate(seed: int) -> Case:
    """A random case: graph, mesh, microbatches, plan."""
    for again in itertools.count():
        m = Maker(seed + again * 1_000_003)
        fill(m)
        case = settle(m.case)
        if len(case.graph.ops) in OPS and case.graph.values[case.graph.loss].grad:
            break
    rng = random.Random(f"run {seed}")
    case.plan = case.data = seed % 1000
    case.microbatches = rng.choice([n for n in (1, 1, 2, 2, 3, 4) if m.batch % n == 0])
    case.dropout = rng.choice(("philox", "exact"))
    pp, dp, tp = rng.choices(MESHES, OFTEN)[0]
    case.mesh = f"pp={min(pp, blocks(case))} dp={dp} tp={tp}"
    return case


def fill(m: Maker) -> None:
    """Ops up to a loss, which takes up some of what nothing else uses."""
    size = m.rng.randint(5, 30)
    h, table = start(m)
    made = [h]
    if m.rng.random() < 0.75:
        h = layers(m, h, size - 8, made)
        terms = [loss(m, h, table)]
        if m.rng.random() < 0.15:
            terms.append(m.op("mul.Tensor", m.op("pow.Tensor_Scalar", m.rng.choice([v.name for v in m.case.graph.sources("param")]), 2), 0.01))
        if m.rng.random() < 0.2:
            soup(m, made, 4)
    else:
        h = layers(m, h, size // 3, made)
        soup(m, made, size * 2 // 3)
        terms = []
    used = {n for op in m.case.graph.ops for n in op.inputs}
    loose = [y for y in m.values if y not in used and m.values[y].grad and m.values[y].role == "value" and y not in terms]
    m.case.graph.loss = total(m, terms + loose[:6])


def blocks(case: Case) -> int:
    """How many stages the graph can be cut into."""
    try:
        split = split_time(case.graph, case.microbatches)
    except NotSplittable:
        split = split_time(case.graph, 1)
    return max(1, len(find_blocks(split.graph, split.once | split.data)))


def settle(case: Case) -> Case:
    """Without what the roots don't need, as capture leaves it."""
    needed, ops = set(case.graph.roots), []
    for op in reversed(case.graph.ops):
        if needed.intersection(op.outs):
            needed.update(op.inputs)
            ops.append(op)
    case.graph.ops = ops[::-1]
    outs = {o for op in ops for o in op.outs}
    case.graph.values = {n: v for n, v in case.graph.values.items() if n in (outs if v.role == "value" else needed | set(case.graph.updates))}
    return case
