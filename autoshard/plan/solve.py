"""Exact minimisation of a sum of small cost tables: min-plus variable elimination.

A problem is a set of variables with finite domains and tables of costs over a few of them each. Eliminating a variable adds
the tables that mention it and minimises it out; the order follows the smallest table next (min-fill by size). The result is
exact whatever the order; the tables that arise are as large as the graph's treewidth makes them. (Dechter, "Bucket
elimination", 1999.) Blocks that repeat are eliminated once: `Problem.fold`.

>>> p = Problem({"a": 2, "b": 2, "c": 2})
>>> p.add(("a",), np.array([0.0, 1.0]))
>>> p.add(("a", "b"), np.array([[5.0, 0.0], [0.0, 5.0]]))
>>> p.add(("b", "c"), np.array([[0.0, 5.0], [5.0, 0.0]]))
>>> p.minimum()
(0.0, {'a': 0, 'b': 1, 'c': 1})
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Scope = tuple[str, ...]
LARGEST = 60_000_000
"""Entries of the largest table that elimination may build."""


class TooWide(Exception):
    """Elimination would need a table of more than LARGEST entries."""


@dataclass
class _Step:
    """How to recover an eliminated variable: its best choice, as a table over the scope left."""

    variable: str
    scope: Scope
    best: np.ndarray


@dataclass
class Problem:
    """Variables (name → size of domain) and cost tables (scope → array with one axis per variable)."""

    sizes: dict[str, int]
    tables: dict[Scope, np.ndarray] = field(default_factory=dict)
    _folded: dict[object, tuple[list[str], list[_Step], dict[Scope, np.ndarray]]] = field(default_factory=dict)
    _steps: list[_Step] = field(default_factory=list)

    def add(self, scope: Scope, table: np.ndarray) -> None:
        """Add a table; tables of one scope are summed. Axes follow the scope's order."""
        order = tuple(sorted(range(len(scope)), key=scope.__getitem__))
        scope, table = tuple(scope[i] for i in order), table.transpose(order)
        assert table.shape == tuple(self.sizes[v] for v in scope), (scope, table.shape)
        self.tables[scope] = self.tables[scope] + table if scope in self.tables else table

    def minimum(self) -> tuple[float, dict[str, int]]:
        """The least total cost and a choice that has it; infinite if nothing is feasible. Raises TooWide."""
        steps = self._steps + _eliminate(self.tables, self.sizes, list(_variables(self.tables)))
        total = sum(float(t) for scope, t in self.tables.items() if not scope)
        choice = {v: 0 for v, n in self.sizes.items()}
        for step in reversed(steps):
            choice[step.variable] = int(step.best[tuple(choice[v] for v in step.scope)])
        return total, choice

    def cost(self, choice: Mapping[str, int]) -> float:
        """What a choice costs by the tables as they were added (before any `fold`)."""
        return sum(float(table[tuple(choice[v] for v in scope)]) for scope, table in self.tables.items())

    def fold(self, inner: Sequence[str], outer: Sequence[str], key: object) -> None:
        """Eliminate a block's inner variables now; `outer` are the others that its tables mention. A later block with the same
        `key` reuses the result, its variables matched by position: the caller vouches that its tables are equal."""
        own = set(inner)
        mine = {s: t for s, t in self.tables.items() if own.intersection(s)}
        names = [*inner, *outer]
        assert {v for s in mine for v in s} <= set(names), "a block's table mentions a variable that is neither inner nor outer"
        if key in self._folded:
            old, steps, result = self._folded[key]
            name = dict(zip(old, names, strict=True))
        else:
            result = dict(mine)
            steps = _eliminate(result, self.sizes, list(inner))
            name = {v: v for v in names}
            self._folded[key] = (names, steps, dict(result))
        for scope in mine:
            del self.tables[scope]
        for step in steps:
            self._steps.append(_Step(name[step.variable], tuple(name[v] for v in step.scope), step.best))
        for scope, table in result.items():
            self.add(tuple(name[v] for v in scope), table)


def _variables(tables: dict[Scope, np.ndarray]) -> dict[str, None]:
    return {v: None for scope in tables for v in scope}


def _eliminate(tables: dict[Scope, np.ndarray], sizes: dict[str, int], names: list[str]) -> list[_Step]:
    """Minimise the named variables out of the tables, in place."""
    by_variable: dict[str, set[Scope]] = {v: set() for v in _variables(tables)}
    for scope in tables:
        for v in scope:
            by_variable[v].add(scope)
    left = [v for v in names if v in by_variable]
    steps = []
    cost = {v: _width(v, by_variable, sizes) for v in left}
    while cost:
        v = min(cost, key=cost.__getitem__)
        del cost[v]
        scopes = by_variable.pop(v)
        rest = tuple(sorted({u for s in scopes for u in s} - {v}))
        if math.prod(sizes[u] for u in rest) * sizes[v] > LARGEST:
            raise TooWide(f"{math.prod(sizes[u] for u in rest) * sizes[v]} entries over {len(rest) + 1} variables")
        full = (*rest, v)
        total = np.zeros((1,) * len(full))
        for scope in sorted(scopes, key=lambda s: (len(s), s)):
            total = total + _spread(tables.pop(scope), scope, full)
            for u in scope:
                if u != v:
                    by_variable[u].discard(scope)
        total = np.broadcast_to(total, tuple(sizes[u] for u in full))
        best = total.argmin(axis=-1)
        steps.append(_Step(v, rest, best.astype(np.int16)))
        least = np.take_along_axis(total, best[..., None], axis=-1)[..., 0]
        tables[rest] = tables[rest] + least if rest in tables else least
        for u in rest:
            by_variable[u].add(rest)
        for u in rest:
            if u in cost:
                cost[u] = _width(u, by_variable, sizes)
    return steps


def _width(v: str, by_variable: dict[str, set[Scope]], sizes: dict[str, int]) -> float:
    return math.prod(sizes[u] for u in {u for s in by_variable[v] for u in s})


def _spread(table: np.ndarray, scope: Scope, full: Scope) -> np.ndarray:
    """The table with its axes placed where `full` has them, and length 1 elsewhere."""
    order = sorted(range(len(scope)), key=lambda i: full.index(scope[i]))
    shape = [1] * len(full)
    for i in order:
        shape[full.index(scope[i])] = table.shape[i]
    return table.transpose(order).reshape(shape)
