"""Any op on anything: random ops over a pool of values, of whatever shapes come about."""

from __future__ import annotations

import random

from autoshard.trace.graph import Ref

from .maker import Maker

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15)

SOUP = "smooth binary param permute reshape slice split cat reduce linear matmul expand softmax".split()


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
    kind = rng.choice(SOUP)
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
        fits = [y for y in pool_ if len(m.shape(y)) == rank and all(m.shape(y)[d] == n for d, n in enumerate(shape) if d != dim)]
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
