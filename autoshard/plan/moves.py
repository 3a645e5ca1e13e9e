"""Moves: the way from one layout of a value to another, axis by axis.

In: a shape, two layouts, the axes' sizes. Out: the steps, if there are.
"""

from __future__ import annotations

import functools
import math

from ..layout import Layout, Type, legal, local_shape, transition
from ..trace.graph import ITEMSIZE, Tensor, Value

_ORDER = {"slice": 0, "reduce_scatter": 1, "mask": 2, "nothing": 2, "all_to_all": 3, "all_reduce": 4, "embed": 5, "all_gather": 6}


@functools.lru_cache(maxsize=1 << 17)
def path(v_shape: tuple[int, ...], a: Layout, b: Layout, sizes: tuple[int, ...]) -> tuple[tuple[int, Type, Type], ...] | None:
    """The order in which the axes go from a to b, so that every layout on the way is legal: (axis, from, to), those that
    shrink the value first. None if there is no way."""
    steps = [(i, s, t) for i, (s, t) in enumerate(zip(a, b, strict=True)) if s != t and sizes[i] > 1]
    try:
        ordered = sorted(steps, key=lambda s: _ORDER[transition(s[1], s[2])])
    except KeyError:
        return None
    for order in (ordered, ordered[::-1]):
        layout = list(a)
        for axis, _, to in order:
            layout[axis] = to
            if not legal(v_shape, tuple(layout), sizes):
                break
        else:
            return tuple(order)
    return None


def reachable(v: Value, a: Layout, b: Layout, sizes: tuple[int, ...]) -> bool:
    """Whether a value may go from a to b: every step exists, forward and for the gradient."""
    if v.grad and any(t.kind == "P" and t.reduce == "max" for t in (*a, *b)):
        return False
    return path(v.tensor.shape, a, b, sizes) is not None


def numel(tensor: Tensor, layout: Layout, sizes: tuple[int, ...]) -> int:
    return math.prod(local_shape(tensor.shape, layout, sizes, (0,) * len(sizes)))


def local_bytes(tensor: Tensor, layout: Layout, sizes: tuple[int, ...]) -> int:
    """What the rank that holds most holds."""
    return numel(tensor, layout, sizes) * ITEMSIZE[tensor.dtype]
