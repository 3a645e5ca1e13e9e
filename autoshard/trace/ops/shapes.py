"""Computed rules: ops that move elements without changing them (reshape, permute, expand, slice, cat, split).

Each takes the op and its values and returns its Rule. Window factors (slice, cat, split) carry concatenated dims: cutting
`q ‖ k ‖ v` by heads cuts each part by heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..graph import Op, Value
from .rule import Factor, Place, Rule

LINEAR = (frozenset({0}),)


def reshape(op: Op, values: Mapping[str, Value]) -> Rule:
    """Walk both shapes together; each step takes the largest part that both agree on, major first.

    >>> from ..graph import Ref, Tensor
    >>> v = {"x": Value("x", Tensor((4, 6, 8), "float32")), "y": Value("y", Tensor((24, 2, 4), "float32"))}
    >>> for f in reshape(Op("y", "", (Ref("x"), (24, 2, 4)), {}, ("y",)), v).factors: print(f)
    0=4: 0 -> 0[1·x·6]
    1=6: 1 -> 0[4·x·1]
    2=2: 2[1·x·4] -> 1
    3=4: 2[2·x·1] -> 2
    """
    a, b = values[op.inputs[0]].tensor.shape, values[op.outs[0]].tensor.shape
    return Rule(tuple(_common_factors(a, b)), LINEAR)


def _common_factors(a: tuple[int, ...], b: tuple[int, ...]) -> list[Factor]:
    found: list[Factor] = []
    i = j = 0
    done_a = done_b = 1  # elements of the current dim already split off, major side
    while i < len(a) and j < len(b):
        left_a, left_b = a[i] // done_a, b[j] // done_b
        if left_a == 1:
            i, done_a = i + 1, 1
            continue
        if left_b == 1:
            j, done_b = j + 1, 1
            continue
        g = math.gcd(left_a, left_b)
        if g == 1:
            # nothing more agrees until both shapes have passed the same number of elements
            end_a, end_b = math.prod(a[i + 1 :]), math.prod(b[j + 1 :])
            while end_a != end_b:
                if end_a > end_b:
                    i += 1
                    end_a = math.prod(a[i + 1 :])
                else:
                    j += 1
                    end_b = math.prod(b[j + 1 :])
            i, j, done_a, done_b = i + 1, j + 1, 1, 1
            continue
        places = Place(i, done_a, left_a // g), Place(j, done_b, left_b // g)
        found.append(Factor(str(len(found)), g, (places[0],), (places[1],)))
        done_a, done_b = done_a * g, done_b * g
    return found


def permute(op: Op, values: Mapping[str, Value]) -> Rule:
    shape = values[op.inputs[0]].tensor.shape
    return Rule(tuple(Factor(str(d), shape[d], (Place(d),), (Place(i),)) for i, d in enumerate(op.args[1]) if shape[d] > 1), LINEAR)


def expand(op: Op, values: Mapping[str, Value]) -> Rule:
    a, b = values[op.inputs[0]].tensor.shape, values[op.outs[0]].tensor.shape
    lead = len(b) - len(a)
    factors = []
    for d, n in enumerate(b):
        if n > 1:
            same = d >= lead and a[d - lead] == n
            factors.append(Factor(str(d), n, (Place(d - lead) if same else None,), (Place(d),)))
    return Rule(tuple(factors), LINEAR)


def slice_(op: Op, values: Mapping[str, Value]) -> Rule:
    shape, dim = values[op.inputs[0]].tensor.shape, op.args[1]
    start, end, step = op.args[2], op.args[3], op.args[4] if len(op.args) > 4 else 1
    factors = [Factor(str(d), n, (Place(d),), (Place(d),)) for d, n in enumerate(shape) if d != dim and n > 1]
    if step == 1 and end > start:
        seeds = () if end - start < shape[dim] else ((),)
        window = None if end - start == shape[dim] else (start, end - start)
        factors.append(Factor(str(dim), shape[dim], (Place(dim),), (Place(dim, window=window),), seeds))
    return Rule(tuple(factors), LINEAR)


def cat(op: Op, values: Mapping[str, Value]) -> Rule:
    ins, out = [values[n].tensor.shape for n in op.inputs], values[op.outs[0]].tensor.shape
    dim = op.args[1] if len(op.args) > 1 else 0
    factors = [Factor(str(d), n, tuple(Place(d) for _ in ins), (Place(d),)) for d, n in enumerate(out) if d != dim and n > 1]
    if all(len(s) == len(out) and s[dim] > 0 for s in ins):
        seeds = (tuple((1, s[dim], 1) for s in ins),)
        factors.append(
            Factor(str(dim), out[dim], tuple(Place(dim, window=w) for w in _windows([s[dim] for s in ins])), (Place(dim),), seeds)
        )
    return Rule(tuple(factors), (frozenset(range(len(ins))),))


def split(op: Op, values: Mapping[str, Value]) -> Rule:
    shape, sizes = values[op.inputs[0]].tensor.shape, op.args[1]
    dim = op.args[2] if len(op.args) > 2 else 0
    outs = len(op.outs)
    factors = [Factor(str(d), n, (Place(d),), (Place(d),) * outs) for d, n in enumerate(shape) if d != dim and n > 1]
    if all(sizes):
        seeds = (tuple((1, n, 1) for n in sizes),)
        factors.append(Factor(str(dim), shape[dim], (Place(dim),), tuple(Place(dim, window=w) for w in _windows(sizes)), seeds))
    return Rule(tuple(factors), LINEAR)


def _windows(sizes: list[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:i]), n) for i, n in enumerate(sizes)]
