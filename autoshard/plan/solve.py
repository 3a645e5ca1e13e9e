"""Exact minimisation of a sum of small cost tables: min-plus variable elimination.

A problem is a set of variables with finite domains and tables of costs over a few of them each. Eliminating a variable adds
the tables that mention it and minimises it out; the order follows the smallest table next (min-fill by size). The result is
exact whatever the order; the tables that arise are as large as the graph's treewidth makes them. (Dechter, "Bucket
elimination", 1999.) Blocks that repeat are eliminated once: `Problem.fold`.

Where the treewidth is too large (one layer's weights used again and again tie all its uses together), the variables that most tables
mention are set one at a time, and each is then set anew, exactly, given the others, while that improves: a choice, if not the best one.

>>> p = Problem({"a": 2, "b": 2, "c": 2})
>>> p.add(("a",), np.array([0.0, 1.0]))
>>> p.add(("a", "b"), np.array([[5.0, 0.0], [0.0, 5.0]]))
>>> p.add(("b", "c"), np.array([[0.0, 5.0], [5.0, 0.0]]))
>>> p.minimum()
(0.0, {'a': 0, 'b': 1, 'c': 1})
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

log = logging.getLogger("autoshard")
Scope = tuple[str, ...]
LARGEST = 60_000_000
"""Entries of the largest table that elimination may build."""


class TooWide(Exception):
    """Elimination would need a table of more than LARGEST entries, over `scope`."""

    def __init__(self, scope: Scope, entries: int) -> None:
        super().__init__(f"{entries} entries over {len(scope)} variables")
        self.scope = scope


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
        """The least total cost and a choice that has it; infinite if nothing is feasible. Exact unless a table were to grow past LARGEST
        entries. Raises TooWide where setting variables doesn't help."""
        found, hubs = self._given({}), dict[str, int]()
        while isinstance(found, TooWide):
            if len(hubs) == len(self.sizes):
                raise found
            hub = self._hub(found.scope, hubs)
            hubs[hub] = self._guess(hub, hubs)
            found = self._given(hubs)
        for _ in range(3):
            before = found[0]
            for hub in hubs:
                again = self._given({v: found[1][v] for v in hubs if v != hub})
                if not isinstance(again, TooWide) and again[0] < found[0]:
                    found = again
            if not found[0] < before:
                break
        if hubs:
            log.info("%d placements that too many others depend on were chosen one at a time", len(hubs))
        return found

    def _given(self, known: Mapping[str, int]) -> tuple[float, dict[str, int]] | TooWide:
        """`minimum` with some variables known, or what stops elimination."""
        tables: dict[Scope, np.ndarray] = {}
        for scope, table in self.tables.items():
            rest = tuple(v for v in scope if v not in known)
            part = table[tuple(known.get(v, slice(None)) for v in scope)] if len(rest) < len(scope) else table
            tables[rest] = tables[rest] + part if rest in tables else part
        try:
            largest = LARGEST // 32 if known else LARGEST  # what is solved again and again had better be quick
            steps = self._steps + _eliminate(tables, self.sizes, list(_variables(tables)), largest)
        except TooWide as error:
            return error
        total = sum(float(t) for scope, t in tables.items() if not scope)
        choice = dict.fromkeys(self.sizes, 0) | dict(known)
        for step in reversed(steps):
            choice[step.variable] = int(step.best[tuple(choice[v] for v in step.scope)])
        return total, choice

    def cost(self, choice: Mapping[str, int]) -> float:
        """What a choice costs by the tables as they were added (before any `fold`)."""
        return sum(float(table[tuple(choice[v] for v in scope)]) for scope, table in self.tables.items())

    def _hub(self, scope: Scope, known: Mapping[str, int]) -> str:
        """Of a scope that is too wide, the variable that ties most others."""
        uses = dict.fromkeys(scope, 0)
        for each in self.tables:
            for v in each:
                if v in uses and v not in known:
                    uses[v] += 1
        return max(uses, key=lambda v: (uses[v], v))

    def _guess(self, hub: str, known: Mapping[str, int]) -> int:
        """The hub's value that its neighbours, each by itself, would like best."""
        total = np.zeros(self.sizes[hub])
        for scope, table in self.tables.items():
            if hub not in scope:
                continue
            part = table[tuple(known.get(v, slice(None)) for v in scope)]
            rest = [v for v in scope if v not in known]
            for i, v in enumerate(rest):
                if v != hub and (v,) in self.tables:
                    part = part + self.tables[v,].reshape([-1 if j == i else 1 for j in range(len(rest))])
            total = total + part.min(axis=tuple(i for i, v in enumerate(rest) if v != hub))
        return int(total.argmin())

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
            try:
                steps = _eliminate(result, self.sizes, list(inner), LARGEST)
            except TooWide:
                return  # as it is, `minimum` may set variables first
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


def _eliminate(tables: dict[Scope, np.ndarray], sizes: dict[str, int], names: list[str], largest: int) -> list[_Step]:
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
        if math.prod(sizes[u] for u in rest) * sizes[v] > largest:
            raise TooWide((*rest, v), math.prod(sizes[u] for u in rest) * sizes[v])
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
