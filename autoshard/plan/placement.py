"""Placements within a stage: the cost tables, and the exact choice.

In: a `Space` and prices. Out: for every op one `Strategy` per axis, for every parameter where it is stored. A variable is an op (or a
parameter); its domain is the product over the axes of the op's strategies; a table between two ops prices the transitions from what one
produces to what the other takes, there and back; `solve.Problem` finds the minimum. Axes are chosen together: one at a time, data
parallelism would always win.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..layout import Layout
from ..trace.blocks import Block
from ..trace.graph import Graph, Op, Tensor, Value
from ..trace.ops.rule import Rule
from .footprint import Footprint, param_bytes
from .moves import local_bytes
from .solve import Problem
from .space import Pair, Placements, Space


class Prices(Protocol):
    """What the planner pays, in seconds; see `plan.prices`."""

    def op(self, op: Op, rule: Rule, graph: Graph, choices: Sequence[Pair], sizes: tuple[int, ...]) -> np.ndarray: ...
    def move(self, tensor: Tensor, a: Layout, b: Layout, sizes: tuple[int, ...], grad: bool) -> float: ...
    def hidden(self, op: Op, graph: Graph, pair: Pair, want: Layout, sizes: tuple[int, ...]) -> float: ...
    def stored(self, tensor: Tensor, choices: Sequence[Layout], sizes: tuple[int, ...], trainable: bool) -> np.ndarray: ...

    share: bool
    """Whether matmuls that take one value should take it in one layout, so that it moves once."""
    per_step: float
    """What a transition outside the microbatch loop weighs, against one inside."""


def choose(space: Space, prices: Prices, blocks: Sequence[Block], roots: Mapping[str, Layout], fold: bool = True) -> Placements:
    """The cheapest placements. `roots`: layouts that some values must end in; `fold`: blocks of one kind cost the same.
    Raises solve.TooWide."""
    return Chooser(space, prices, blocks, roots, fold).choose()


class Chooser:
    """The tables of one space under one set of prices, to be minimised as they are or with a price on bytes."""

    def __init__(
        self, space: Space, prices: Prices, blocks: Sequence[Block], roots: Mapping[str, Layout], fold: bool = True
    ) -> None:  # fmt: skip
        self.space, self.prices, self.blocks, self.fold = space, prices, blocks, fold
        self.shared = _siblings(space, blocks) if prices.share else {}
        self.tables = _Tables(space, prices)
        self.weight = _weights(space)
        self.charged: dict[str, str] = {}
        self.seconds = Problem({n: len(d) for n, d in space.domains.items()} | {n: len(d) for n, d in space.storage.items()})
        self._fill(roots)

    def _fill(self, roots: Mapping[str, Layout]) -> None:
        space, problem, tables, graph = self.space, self.seconds, self.tables, self.space.split.graph
        producer = graph.producer()
        for v in graph.sources("param"):
            problem.add((v.name,), tables.stored(v) * self.weight(v.name))
        for op in graph.ops:
            if op.name in space.fixed:
                continue
            often = self.weight(op.name)
            problem.add((op.name,), tables.unary(op) * often)
            for name, positions in _operand_positions(op).items():
                source = producer[name].name if name in producer else name
                fixed = source in space.fixed or graph.values[name].role in ("input", "constant", "buffer")
                use = self.shared.get((op.name, name))
                if use is not None:
                    if use.name not in problem.sizes:
                        problem.sizes[use.name] = len(use.layouts)
                        if fixed:
                            problem.add((use.name,), tables.moves([space.held[name]], use.layouts, name)[0] * often)
                        else:
                            problem.add((source, use.name), tables.moves(tables.made(producer[name], name), use.layouts, name) * often)
                    problem.add((use.name, op.name), tables.same(use.layouts, op, positions))
                elif fixed:
                    problem.add((op.name,), tables.from_fixed(op, name, positions) * often)
                else:
                    problem.add((source, op.name), tables.edge(producer.get(name), op, name, positions) * often)
        for name, layout in roots.items():
            if name in producer and producer[name].name in space.domains:
                problem.add((producer[name].name,), tables.root(producer[name], name, layout))
        for a, b in space.alike:
            problem.add((a, b), np.array([[0.0 if p == q else np.inf for q in space.domains[b]] for p in space.domains[a]]))

    def choose(self, held: Problem | None = None, price: float = 0.0) -> Placements:
        """The placements with the least seconds + price · bytes (`held`: from `footprint`). Raises solve.TooWide."""
        space = self.space
        problem = Problem(dict(self.seconds.sizes), dict(self.seconds.tables))
        if held is not None and price:
            for scope, table in held.tables.items():
                problem.add(scope, table * price)
        if self.fold:
            _fold(problem, space, self.blocks, self.shared, self.charged if held is not None else {})
        seconds, chosen = problem.minimum()
        found = Placements(
            {**space.fixed, **{n: d[chosen[n]] for n, d in space.domains.items()}},
            {n: d[chosen[n]] for n, d in space.storage.items()},
            space.inputs,
            seconds,
        )
        if held is not None:
            found.seconds, found.bytes = self.seconds.cost(chosen), held.cost(chosen)
        return found

    def footprint(self, footprint: Footprint, in_flight: float) -> Problem:
        """The bytes of every choice, as tables over the same variables; what is saved counts for `in_flight` microbatches."""
        space, tables, graph = self.space, self.tables, self.space.split.graph
        ops, producer = {op.name: op for op in graph.ops}, graph.producer()
        held = Problem(self.seconds.sizes)
        self.charged = footprint.charged
        for name, first in footprint.charged.items():
            positions = _operand_positions(ops[first])[name]
            held.add((name, first), tables.parameter(graph.values[name], ops[first], positions, footprint) * self.weight(name))
        for block, kept in zip(self.blocks, footprint.kept, strict=True):
            often = self.weight(block.ops[0]) * in_flight
            for value in kept:
                sides: dict[str, tuple[str, np.ndarray]] = {}
                for reader in value.readers:
                    use = self.shared.get((reader, value.name))
                    if use is not None:
                        sides[use.name] = (use.name, tables.sizes(use.layouts, value.name))
                    elif reader in space.domains:
                        sides[reader] = (reader, tables.taken(ops[reader], value.name, _operand_positions(ops[reader])[value.name]))
                source = producer.get(value.name)
                if not sides and source is not None and source.name in space.domains:
                    sides[source.name] = (source.name, tables.sizes(tables.made(source, value.name), value.name))
                for variable, sizes in sides.values():
                    held.add((variable,), sizes * (often / len(sides)))
        return held


def _weights(space: Space) -> Callable[[str], int]:
    """How often an op happens; a parameter counts as its users do, one that several repetitions share once."""
    users = space.split.graph.consumers()

    def weight(name: str) -> int:
        if not space.weight:
            return 1
        if name in space.storage:
            return min((space.weight.get(op.name, 1) for op in users[name]), default=1)
        return space.weight.get(name, 1)

    return weight


def _operand_positions(op: Op) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, name in enumerate(op.inputs):
        found.setdefault(name, []).append(i)
    return found


@dataclass(frozen=True)
class _Use:
    """The one layout in which several matmuls of a block take a value: a variable of its own, so that the move counts once."""

    name: str
    layouts: tuple[Layout, ...]


def _siblings(space: Space, blocks: Sequence[Block]) -> dict[tuple[str, str], _Use]:
    """(op, operand) → the use that it shares with others of its block."""
    graph = space.split.graph
    by_name = {op.name: op for op in graph.ops}
    found: dict[tuple[str, str], _Use] = {}
    for i, block in enumerate(blocks):
        takers: dict[str, list[Op]] = {}
        for name in block.ops:
            op = by_name[name]
            if op.name in space.domains and op.target in ("aten.linear.default", "aten.mm.default", "aten.matmul.default"):
                operand = op.inputs[0]
                if graph.values[operand].role != "param" and op.inputs.count(operand) == 1:
                    takers.setdefault(operand, []).append(op)
        for operand, ops in takers.items():
            if len(ops) > 1:
                layouts = tuple(dict.fromkeys(tuple(s.ins[0] for s in pair) for op in ops for pair in space.domains[op.name]))
                use = _Use(f"{operand}@use{i}", layouts)
                found |= {(op.name, operand): use for op in ops}
    return found


def _fold(
    problem: Problem, space: Space, blocks: Sequence[Block], shared: Mapping[tuple[str, str], _Use], charged: Mapping[str, str]
) -> None:
    """Eliminate each block's inside; blocks that are alike, once."""
    graph = space.split.graph
    producer = graph.producer()
    home = {op: i for i, b in enumerate(blocks) for op in b.ops}
    consumers = graph.consumers()
    by_name = {op.name: op for op in graph.ops}
    uses = {u.name for u in shared.values()}
    for i, block in enumerate(blocks):
        names: dict[str, None] = {}
        for op_name in block.ops:
            for n in by_name[op_name].inputs:
                source = producer[n].name if n in producer else n
                if source in problem.sizes:
                    names[source] = None
                if (op_name, n) in shared:
                    names[shared[op_name, n].name] = None
            names[op_name] = None
        inner: list[str] = []
        outer: list[str] = []
        for n in names:
            if n in uses:
                inner.append(n)
                continue
            users = consumers[n] if n in space.storage else [c for out in by_name[n].outs for c in consumers[out]]
            outside = any(home.get(u.name) != i for u in users) or (n in by_name and home[n] != i)
            (outer if outside else inner).append(n)
        inside, here = set(inner), set(block.ops)
        key = (block.kind, space.weight.get(block.ops[0], 1), tuple(_signature(space, n) for n in names), tuple(n in inside for n in names),
               tuple(space.held.get(n) for op in block.ops for n in by_name[op].inputs),
               tuple(charged.get(n) in here for n in names))  # fmt: skip
        problem.fold(inner, outer, key)


def _signature(space: Space, name: str) -> object:
    """Ops that are alike share their domain, as an object."""
    return id(space.domains[name]) if name in space.domains else tuple(space.storage.get(name, ()))


Side = tuple[tuple[Layout, ...], list[tuple[int, ...]]]
"""Distinct layouts, and for each strategy of a domain which of them it makes or takes."""


class _Tables:
    """Cost arrays, each computed once for arguments that are alike."""

    def __init__(self, space: Space, prices: Prices) -> None:
        self.space, self.prices, self.graph = space, prices, space.split.graph
        self.memo: dict[tuple[Tensor, bool], dict[tuple[Layout, Layout], float]] = {}
        self.edges: dict[object, np.ndarray] = {}
        self.sides: dict[object, Side] = {}

    def unary(self, op: Op) -> np.ndarray:
        return self.prices.op(op, self.space.rules[op.name], self.graph, self.space.domains[op.name], self.space.sizes)

    def stored(self, v: Value) -> np.ndarray:
        return self.prices.stored(v.tensor, self.space.storage[v.name], self.space.sizes, v.grad) * self.prices.per_step

    def edge(self, source: Op | None, op: Op, name: str, positions: list[int]) -> np.ndarray:
        """Rows: what the source produces (or stores); columns: what the op takes."""
        v = self.graph.values[name]
        # layers that are alike share their domains, as objects
        made = tuple(self.space.storage[name]) if source is None else (id(self.space.domains[source.name]), source.outs.index(name))
        key = (made, id(self.space.domains[op.name]), tuple(positions), v.tensor, v.grad)
        if key not in self.edges:
            have = _distinct(self.space.storage[name]) if source is None else self._made(source, name)
            weight = self.prices.per_step if source is None else 1.0
            want = self._wanted(op, positions)
            self.edges[key] = self._moves(have, want, name) * weight
            if source is not None:
                self.edges[key] = self.edges[key] - self._hidden(source, want)
        return self.edges[key]

    def _hidden(self, source: Op, want: Side) -> np.ndarray:
        """What of each move passes beside the op that makes the value."""
        layouts, which = want
        of = [[self.prices.hidden(source, self.graph, pair, layout, self.space.sizes) for layout in layouts]
              for pair in self.space.domains[source.name]]  # fmt: skip
        return np.array([[sum(each[i] for i in w) for w in which] for each in of])

    def parameter(self, v: Value, op: Op, positions: list[int], footprint: Footprint) -> np.ndarray:
        """Bytes of a parameter: rows: where it is stored; columns: how the op takes it."""
        layouts, which = self._wanted(op, positions)
        rows = []
        for choice in self.space.storage[v.name]:
            stored = footprint.stored(v.tensor, choice, self.space.sizes)
            each = [sum(param_bytes(v.tensor, stored, layout, self.space.sizes, v.grad)) for layout in layouts]
            rows.append([max(each[i] for i in w) for w in which])
        return np.array(rows, dtype=float)

    def sizes(self, layouts: Sequence[Layout], name: str) -> np.ndarray:
        """Bytes of a value in each layout."""
        tensor = self.graph.values[name].tensor
        return np.array([local_bytes(tensor, layout, self.space.sizes) for layout in layouts], dtype=float)

    def taken(self, op: Op, name: str, positions: list[int]) -> np.ndarray:
        """Bytes of a value as each strategy of the op takes it."""
        layouts, which = self._wanted(op, positions)
        each = self.sizes(layouts, name)
        return np.array([each[list(w)].sum() for w in which])

    def from_fixed(self, op: Op, name: str, positions: list[int]) -> np.ndarray:
        return self._moves(_distinct([self.space.held[name]]), self._wanted(op, positions), name)[0]

    def root(self, op: Op, name: str, layout: Layout) -> np.ndarray:
        return self._moves(self._made(op, name), _distinct([layout]), name)[:, 0]

    def made(self, source: Op, name: str) -> list[Layout]:
        layouts, which = self._made(source, name)
        return [layouts[i] for (i,) in which]

    def moves(self, have: Sequence[Layout], want: Sequence[Layout], name: str) -> np.ndarray:
        return self._moves(_distinct(have), _distinct(want), name)

    def same(self, layouts: Sequence[Layout], op: Op, positions: list[int]) -> np.ndarray:
        """Free where the op takes the use's layout, forbidden elsewhere."""
        there, which = self._wanted(op, positions)
        return np.array([[0.0 if w == (i,) else np.inf for w in which] for i in (_index(there, layout) for layout in layouts)])

    def _made(self, source: Op, name: str) -> Side:
        out, domain = source.outs.index(name), self.space.domains[source.name]
        key = (id(domain), out)
        if key not in self.sides:
            self.sides[key] = _distinct([tuple(s.outs[out] for s in pair) for pair in domain])
        return self.sides[key]

    def _wanted(self, op: Op, positions: list[int]) -> Side:
        domain = self.space.domains[op.name]
        key = (id(domain), "in", *positions)
        if key not in self.sides:
            found: dict[Layout, int] = {}
            which = []
            for pair in domain:
                layouts = dict.fromkeys(tuple(s.ins[i] for s in pair) for i in positions)
                which.append(tuple(found.setdefault(layout, len(found)) for layout in layouts))
            self.sides[key] = (tuple(found), which)
        return self.sides[key]

    def _moves(self, have: Side, want: Side, name: str) -> np.ndarray:
        v = self.graph.values[name]
        (rows, row_of), (columns, column_of) = have, want
        known = self.memo.setdefault((v.tensor, v.grad), {})
        move, sizes = self.prices.move, self.space.sizes
        small = np.empty((len(rows), len(columns)))
        for i, a in enumerate(rows):
            for j, b in enumerate(columns):
                found = 0.0 if a is b or a == b else known.get((a, b))
                small[i, j] = known[a, b] = move(v.tensor, a, b, sizes, v.grad) if found is None else found
        full = small[[i for (i,) in row_of]]
        if all(len(w) == 1 for w in column_of):
            return full[:, [i for (i,) in column_of]]
        return np.stack([full[:, list(w)].sum(axis=1) for w in column_of], axis=1)


def _distinct(layouts: Sequence[Layout]) -> Side:
    found: dict[Layout, int] = {}
    which: list[tuple[int, ...]] = [(found.setdefault(layout, len(found)),) for layout in layouts]
    return tuple(found), which


def _index(layouts: Sequence[Layout], wanted: Layout) -> int:
    return layouts.index(wanted) if wanted in layouts else -1
