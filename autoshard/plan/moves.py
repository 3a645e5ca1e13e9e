"""Moves: the way from one layout of a value to another, axis by axis.

In: a shape, two layouts, the axes' sizes. Out: the steps, if there are.
"""

from __future__ import annotations

import functools
import math

from ..layout import Layout, Type, legal, local_shape, segments, transition
from ..trace.graph import ITEMSIZE, Tensor

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


def reachable(tensor: Tensor, grad: bool, a: Layout, b: Layout, sizes: tuple[int, ...]) -> bool:
    """Whether a value may go from a to b: every step exists, forward and for the gradient."""
    if grad and any(t.kind == "P" and t.reduce == "max" for t in (*a, *b)):
        return False
    return path(tensor.shape, a, b, sizes) is not None


def numel(tensor: Tensor, layout: Layout, sizes: tuple[int, ...]) -> int:
    """Elements of the rank at the origin, which holds most."""
    return _numel(tensor.shape, layout, sizes)


@functools.lru_cache(maxsize=1 << 18)
def _numel(shape: tuple[int, ...], layout: Layout, sizes: tuple[int, ...]) -> int:
    cut = [(t, k) for t, k in zip(layout, sizes, strict=True) if t.kind == "S" and k > 1]
    dims = [t.dim for t, _ in cut]
    if len(set(dims)) < len(dims):  # two axes on one dim
        return math.prod(local_shape(shape, layout, sizes, (0,) * len(sizes)))
    total = math.prod(n for d, n in enumerate(shape) if d not in dims)
    for t, k in cut:
        total *= sum(outer * -(-size // k) * inner for outer, size, inner in segments(t.cut, shape[t.dim]))
    return total


def local_bytes(tensor: Tensor, layout: Layout, sizes: tuple[int, ...]) -> int:
    """What the rank that holds most holds."""
    return numel(tensor, layout, sizes) * ITEMSIZE[tensor.dtype]
