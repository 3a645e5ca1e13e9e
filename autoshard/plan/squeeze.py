"""Squeeze: the fastest choice that fits, where the fastest doesn't. A price on bytes, and a walk over it.

In: `solve(price)`, the exact minimum of seconds + price · bytes, and `fit`, which says whether a choice really fits. Out: a `Walk`.
Choices that some price prefers lie on the lower convex hull of (bytes, seconds). From its two ends, the fastest (too large) and the
smallest, each step tries the price at which the two nearest known choices cost the same, which finds the choice of the hull between them if
there is one, and keeps the pair between which fitting begins (Handler and Zang, "A dual algorithm for the constrained shortest path
problem", 1980). What fits and is faster than the one found can only lie above the hull, between that pair: so the gap is at most their
difference in seconds. (Bytes are those of `footprint`, an estimate that is additive; whether a choice fits is judged by the whole model.)

>>> from collections import namedtuple
>>> Placed = namedtuple("Placed", "name seconds")
>>> hull = {"fast": (1.0, 9e9), "middle": (2.0, 4e9), "small": (5.0, 3e9), "above": (4.5, 8e9)}
>>> def solve(price):
...     name = min(hull, key=lambda n: hull[n][0] + price * hull[n][1])
...     return Placed(name, hull[name][0]), hull[name][1]
>>> found = walk(solve, lambda placed: placed.name if hull[placed.name][1] <= 5e9 else None)
>>> found.value, round(found.gap, 3)
('middle', 1.0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

SMALLEST = 1e-3
"""Seconds a byte at which nothing but bytes counts (and seconds still decide between equals)."""
STEPS = 12
CLOSE = 0.002
"""A gap that isn't worth another step."""


class Chosen(Protocol):
    @property
    def seconds(self) -> float: ...


C = TypeVar("C", bound=Chosen)
V = TypeVar("V")


@dataclass
class Walk(Generic[V]):
    """What fits: `value` as `fit` gave it, its seconds and bytes, the price that prefers it, and `gap`: by what part the fastest that fits
    may be faster."""

    value: V
    seconds: float
    bytes: float
    price: float
    gap: float = 0.0


def walk(solve: Callable[[float], tuple[C, float]], fit: Callable[[C], V | None]) -> Walk[V] | None:
    """None if even the smallest doesn't fit."""
    placed, size = solve(SMALLEST)
    value = fit(placed)
    if value is None:
        return None
    best = Walk(value, placed.seconds, size, SMALLEST)
    placed, size = solve(0.0)
    low = (placed.seconds, size)
    for _ in range(STEPS):
        best.gap = max(0.0, best.seconds / low[0] - 1.0) if low[0] > 0 else 0.0
        if best.gap < CLOSE or low[1] <= best.bytes:
            break
        price = (best.seconds - low[0]) / (low[1] - best.bytes)
        placed, size = solve(price)
        line = low[0] + price * low[1]
        if placed.seconds + price * size >= line * (1 - 1e-9):
            break  # nothing of the hull lies between
        value = fit(placed)
        if value is None:
            low = (placed.seconds, size)
        else:
            best = Walk(value, placed.seconds, size, price)
    best.gap = max(0.0, best.seconds / low[0] - 1.0) if low[0] > 0 else 0.0
    return best
