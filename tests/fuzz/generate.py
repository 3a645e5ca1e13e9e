"""Random graphs in the normal form that capture guarantees: 5 to 40 ops, dims that nothing divides, forward and backward.

`generate(seed)` gives a Case. A graph has a start (tokens or floats), a few layers of random pieces on a stream (a layer may repeat, with
the same structure, so that blocks have kinds), sometimes a soup of arbitrary ops on all that is there, and a loss. Functions are
smooth and values stay near 1, so that 1e-9 tells a bug from rounding.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Collection, Sequence

from autoshard.plan.microbatch import NotSplittable, split_time
from autoshard.trace.blocks import Block, find_blocks, kind_of
from autoshard.trace.graph import Graph

from .case import Case
from .maker import Maker
from .pieces import PIECES, SMALL, Piece, norm
from .soup import soup

MESHES = [(p, d, t) for p in range(1, 5) for d in range(1, 17) for t in range(1, 17) if p * d * t <= 16]
OFTEN = [(p * d * t) ** -0.7 * (1 if t == 1 else 3) * (0.1 if p * d * t == 1 else 1) for p, d, t in MESHES]
"""How often each mesh: small ones more (they are cheap), tp most (its plans differ most)."""
OPS = range(5, 41)


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
    """Pieces on the stream: different ones, or one small layer several times over with the same structure."""
    deep = m.rng.random() < 0.35
    budget = max(budget, 22) if deep else budget
    while len(m.case.graph.ops) < budget:
        table = [(p, w) for p, w in PIECES if not deep or p in SMALL]
        pieces = m.rng.choices([p for p, _ in table], [w for _, w in table], k=1 if deep else m.rng.choice((1, 1, 2, 2, 3)))
        if pieces[0] is not norm and m.rng.random() < 0.4:
            pieces = [norm, *pieces]
        h = repeated(m, h, pieces, m.rng.choice((2, 3, 4)) if deep else m.rng.choice((1, 1, 2)), budget, made)
    return h


def repeated(m: Maker, h: str, pieces: Sequence[Piece], times: int, budget: int, made: list[str]) -> str:
    same, now, before = m.rng.randrange(1 << 30), m.rng, len(m.case.graph.ops)
    for layer in range(times):
        m.layer = layer
        m.rng = random.Random(same)
        for piece in pieces:
            h = piece(m, h)
            made.append(h)
        if 2 * len(m.case.graph.ops) - before > budget + 8:
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
    case.dropout, case.blocks = rng.choice(("philox", "exact")), rng.choice(("found", "fold", "any"))
    pp, dp, tp = rng.choices(MESHES, OFTEN)[0]
    case.mesh = f"pp={min(pp, stages(case))} dp={dp} tp={tp}"
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
            decayed = m.rng.choice([v.name for v in m.case.graph.sources("param")])
            terms.append(m.op("mul.Tensor", m.op("pow.Tensor_Scalar", decayed, 2), 0.01))
        if m.rng.random() < 0.2:
            soup(m, made, 4)
    else:
        h = layers(m, h, size // 3, made)
        soup(m, made, size * 2 // 3)
        terms = []
    used = {n for op in m.case.graph.ops for n in op.inputs}
    loose = [y for y in m.values if y not in used and m.values[y].grad and m.values[y].role == "value" and y not in terms]
    m.case.graph.loss = total(m, terms + loose[:6])


def stages(case: Case) -> int:
    """How many the graph can be cut into."""
    try:
        split = split_time(case.graph, case.microbatches)
    except NotSplittable:
        split = split_time(case.graph, 1)
    find = functools.partial(any_blocks, case.plan) if case.blocks == "any" else find_blocks
    return max(1, len(find(split.graph, split.once | split.data)))


def any_blocks(seed: int, graph: Graph, apart: Collection[str]) -> list[Block]:
    """In place of `find_blocks`: cuts anywhere, which is just as legal."""
    rng = random.Random(f"blocks {seed}")
    ops = [op for op in graph.ops if op.name not in apart]
    found = []
    while ops:
        n = rng.randint(1, 8)
        found.append(Block(tuple(op.name for op in ops[:n]), kind_of(ops[:n], graph, set(graph.roots))))
        ops = ops[n:]
    return found


def settle(case: Case) -> Case:
    """Without what the roots don't need, as capture leaves it."""
    needed, ops = set(case.graph.roots), []
    for op in reversed(case.graph.ops):
        if needed.intersection(op.outs):
            needed.update(op.inputs)
            ops.append(op)
    case.graph.ops = ops[::-1]
    outs = {o for op in ops for o in op.outs}
    needed.update(case.graph.updates)
    case.graph.values = {n: v for n, v in case.graph.values.items() if n in (outs if v.role == "value" else needed)}
    return case
