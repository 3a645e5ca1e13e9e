"""Placements within a stage: the domains, the cost tables, and the exact choice.

In: the graph of one microbatch, a mesh's inner axes (dp, tp) and prices. Out: for every op one `Strategy` per axis, for every
parameter where it is stored. A variable is an op (or a parameter); its domain is the product over the axes of the op's
strategies; a table between two ops prices the transitions from what one produces to what the other takes, there and back;
`solve.Problem` finds the minimum. Axes are chosen together: one at a time, data parallelism would always win.

dp cuts what descends from the inputs' batch dims, tp everything else. What depends on data alone (masks, position tables) is
cheap and used everywhere, so it isn't part of the problem: it lies cut along the batch on dp and whole on tp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..layout import I, Layout, P, R, S, Type, divisible, legal, local_shape, transition
from ..trace.blocks import Block, kind_of
from ..trace.graph import Graph, Op, Tensor, Value
from ..trace.ops.rule import Factor, Place, Rule, Strategy, factor_cuts, strategies
from ..trace.ops.table import rule_of
from .microbatch import TimeSplit
from .solve import Problem

AXES = ("dp", "tp")
Pair = tuple[Strategy, ...]
"""One strategy per inner axis."""


class Prices(Protocol):
    """What the planner pays, in seconds; see `plan.prices`."""

    def op(self, op: Op, rule: Rule, graph: Graph, choices: Sequence[Pair], sizes: tuple[int, ...]) -> np.ndarray: ...
    def move(self, tensor: Tensor, a: Layout, b: Layout, sizes: tuple[int, ...], grad: bool) -> float: ...
    def stored(self, tensor: Tensor, choices: Sequence[Layout], sizes: tuple[int, ...], trainable: bool) -> np.ndarray: ...

    share: bool
    """Whether matmuls that take one value should take it in one layout, so that it moves once."""
    hold: float
    """Seconds that a byte of a parameter counts for, as the loop uses it; above 0 where memory is short."""
    per_step: float
    """What a transition outside the microbatch loop weighs, against one inside."""


@dataclass
class Placements:
    """The choice: op → strategies, parameter value → storage, input value → layout; and its cost in seconds a microbatch."""

    ops: dict[str, Pair]
    storage: dict[str, Layout]
    inputs: dict[str, Layout]
    seconds: float = 0.0


@dataclass
class Space:
    """All that may be chosen for one time-split graph on one mesh, before prices."""

    split: TimeSplit
    sizes: tuple[int, int]
    rules: dict[str, Rule] = field(default_factory=dict)
    domains: dict[str, list[Pair]] = field(default_factory=dict)
    storage: dict[str, list[Layout]] = field(default_factory=dict)
    fixed: dict[str, Pair] = field(default_factory=dict)
    inputs: dict[str, Layout] = field(default_factory=dict)
    seeds: tuple[dict[str, set[Type]], dict[str, set[Type]]] = field(default_factory=lambda: ({}, {}))
    weight: Mapping[str, int] = field(default_factory=dict)
    """How many ops one stands for, where that isn't one (`plan.fold`)."""
    alike: Sequence[tuple[str, str]] = ()
    """Ops that must run alike."""
    data_alone: bool = False

    def __post_init__(self) -> None:
        graph = self.split.graph
        self.rules = {op.name: rule_of(op, graph.values) for op in graph.ops}
        self._input_layouts()
        self.seeds = self._spread_seeds()
        self._fix_data()
        if self.data_alone:
            return
        memo: dict[object, list[Pair]] = {}
        for op in graph.ops:
            if op.name not in self.fixed:
                self.domains[op.name] = self._domain(op, memo)
        for v in graph.sources("param"):
            self.storage[v.name] = self._storage(v)

    def _input_layouts(self) -> None:
        for v in self.split.graph.sources("input", "constant", "buffer"):
            cut = v.role == "input" and v.batch_dim is not None and v.tensor.shape[v.batch_dim] >= self.sizes[0] > 1
            self.inputs[v.name] = (S(v.batch_dim) if cut else R, R)  # type: ignore[arg-type]

    def _spread_seeds(self) -> tuple[dict[str, set[Type]], dict[str, set[Type]]]:
        """Which shards are in use where, to a fixed point: dp's start at the batch, tp's at every factor of every op."""
        batch: dict[str, set[Type]] = {n: {t[0]} for n, t in self.inputs.items() if t[0].kind == "S"}
        self._fixpoint(batch, self.sizes[0], natural=False)
        inner: dict[str, set[Type]] = {}
        if self.sizes[1] > 1 and not self.data_alone:
            self._fixpoint(inner, self.sizes[1], natural=True)
            along_batch: dict[str, set[Type]] = {
                v.name: {S(v.batch_dim)} for v in self.split.graph.sources("input") if v.batch_dim is not None
            }  # type: ignore[arg-type]
            self._fixpoint(along_batch, self.sizes[1], natural=False)
            for name, shards in along_batch.items():
                inner[name] = inner.get(name, set()) - shards
        return batch, inner

    def _fixpoint(self, seeds: dict[str, set[Type]], parts: int, natural: bool) -> None:
        if parts == 1:
            return
        graph = self.split.graph
        values, consumers, producer = graph.values, graph.consumers(), graph.producer()
        queue = dict.fromkeys(op.name for op in graph.ops)
        by_name = {op.name: op for op in graph.ops}
        while queue:
            name = next(iter(queue))
            del queue[name]
            op = by_name[name]
            operands, outs = [values[n] for n in op.inputs], [values[n] for n in op.outs]
            if not natural and not any(n in seeds for n in (*op.inputs, *op.outs)):
                continue
            for factor in self.rules[name].factors:
                for value, t in _shards(factor, operands, outs, parts, seeds, natural):
                    known = seeds.setdefault(value, set())
                    if t in known or len(known) >= 8:
                        continue
                    known.add(t)
                    for other in consumers[value]:
                        queue[other.name] = None
                    if value in producer:
                        queue[producer[value].name] = None

    def _fix_data(self) -> None:
        """Data-only ops: cut along the batch on dp where that needs no communication, else whole."""
        graph, held = self.split.graph, dict(self.inputs)
        for op in graph.ops:
            if op.name not in self.split.data and op.name not in self.split.once:
                continue
            operands, outs = [graph.values[n] for n in op.inputs], [graph.values[n] for n in op.outs]
            best = Strategy((R,) * len(operands), (R,) * len(outs))
            if any(held[n][0].kind == "S" for n in op.inputs):
                for s in strategies(self.rules[op.name], operands, outs, self.sizes[0], self.seeds[0]):
                    if any(t.kind == "S" for t in s.ins) and all(
                        a == b or (a == R and b.kind == "S") for a, b in zip((held[n][0] for n in op.inputs), s.ins, strict=True)
                    ):
                        best = s
                        break
            whole = Strategy((R,) * len(operands), (R,) * len(outs))
            self.fixed[op.name] = (best, whole)
            held |= {n: (t, R) for n, t in zip(op.outs, best.outs, strict=True)}
        self.held = held

    def _domain(self, op: Op, memo: dict[object, list[Pair]]) -> list[Pair]:
        values = self.split.graph.values
        operands, outs = [values[n] for n in op.inputs], [values[n] for n in op.outs]
        touched = [*op.inputs, *op.outs]
        key = (kind_of([op], self.split.graph), *(tuple(sorted(map(str, seeds.get(n, ())))) for seeds in self.seeds for n in touched))
        if key in memo:
            return memo[key]
        per_axis = []
        for parts, seeds in zip(self.sizes, self.seeds, strict=True):
            found = strategies(self.rules[op.name], operands, outs, parts, seeds) if parts > 1 else []
            found = [
                s
                for s in found
                if all(t.kind != "S" or t in seeds.get(v.name, ()) for v, t in zip([*operands, *outs], [*s.ins, *s.outs], strict=True))
            ]
            per_axis.append(found or [Strategy(tuple(I if v.grad else R for v in operands), tuple(I if v.grad else R for v in outs))])
        pairs: list[Pair] = [(a, b) for a in per_axis[0] for b in per_axis[1] if self._fits(operands, outs, (a, b))]
        memo[key] = pairs
        return pairs

    def _fits(self, operands: list[Value], outs: list[Value], pair: Pair) -> bool:
        for i, v in enumerate(operands):
            if not legal(v.tensor.shape, tuple(s.ins[i] for s in pair), self.sizes):
                return False
        return all(legal(v.tensor.shape, tuple(s.outs[i] for s in pair), self.sizes) for i, v in enumerate(outs))

    def _storage(self, v: Value) -> list[Layout]:
        whole = I if v.grad else R
        shards = sorted(self.seeds[1].get(v.name, ()), key=str)
        return [(whole, t) for t in [whole, *(t for t in shards if divisible(t.cut, v.tensor.shape[t.dim], self.sizes[1]))]]


def _shards(
    factor: Factor, operands: list[Value], outs: list[Value], parts: int, seeds: Mapping[str, set[Type]], natural: bool
) -> list[tuple[str, Type]]:
    from ..layout import canonical

    found = []
    sides = [*zip(operands, factor.ins, strict=True), *zip(outs, factor.outs, strict=True)]
    here = {v.name: seeds.get(v.name, set()) for v, _ in sides}
    own = factor if natural else Factor(factor.name, factor.size, factor.ins, factor.outs, (), factor.body)
    for cut in factor_cuts(own, operands, outs, parts, here):
        if not divisible(cut, factor.size, parts):
            continue
        placed: list[tuple[str, Type]] = []
        for v, place in sides:
            if isinstance(place, Place):
                n = v.tensor.shape[place.dim]
                of_dim = place.cut_of(cut, factor.size)
                if of_dim is None or not divisible(of_dim, n, parts):
                    placed = []
                    break
                placed.append((v.name, S(place.dim, canonical(of_dim, n, parts))))
        found += placed
    return found


def choose(space: Space, prices: Prices, blocks: Sequence[Block], roots: Mapping[str, Layout], fold: bool = True) -> Placements:
    """The cheapest placements. `roots`: layouts that some values must end in; `fold`: blocks of one kind cost the same.
    Raises solve.TooWide."""
    graph = space.split.graph
    producer = graph.producer()
    problem = Problem({n: len(d) for n, d in space.domains.items()} | {n: len(d) for n, d in space.storage.items()})
    tables = _Tables(space, prices)
    weight = _weights(space)
    for v in graph.sources("param"):
        problem.add((v.name,), tables.stored(v) * weight(v.name))
    shared = _siblings(space, blocks) if prices.share else {}
    for op in graph.ops:
        if op.name in space.fixed:
            continue
        often = weight(op.name)
        problem.add((op.name,), tables.unary(op) * often)
        for name, positions in _operand_positions(op).items():
            source = producer[name].name if name in producer else name
            fixed = source in space.fixed or graph.values[name].role in ("input", "constant", "buffer")
            use = shared.get((op.name, name))
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
    if fold:
        _fold(problem, space, blocks, shared)
    seconds, chosen = problem.minimum()
    return Placements(
        {**space.fixed, **{n: d[chosen[n]] for n, d in space.domains.items()}},
        {n: d[chosen[n]] for n, d in space.storage.items()},
        space.inputs,
        seconds,
    )


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


def fix_data(split: TimeSplit, sizes: tuple[int, int]) -> tuple[dict[str, Pair], dict[str, Layout]]:
    """Where a graph's inputs lie, and how its data-only ops run: (op → strategies, source → layout)."""
    space = Space(split, sizes, data_alone=True)
    return space.fixed, space.inputs


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


def _fold(problem: Problem, space: Space, blocks: Sequence[Block], shared: Mapping[tuple[str, str], _Use]) -> None:
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
        inside = set(inner)
        key = (block.kind, space.weight.get(block.ops[0], 1), tuple(_signature(space, n) for n in names), tuple(n in inside for n in names),
               tuple(space.held.get(n) for op in block.ops for n in by_name[op].inputs))  # fmt: skip
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
            if source is None and self.prices.hold:
                each = self.prices.hold * v.tensor.bytes / max(v.tensor.numel, 1)
                used = [each * numel(v.tensor, layout, self.space.sizes) for layout in want[0]]
                self.edges[key] = self.edges[key] + np.array([sum(used[i] for i in which) for which in want[1]])
        return self.edges[key]

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
        small = np.array(
            [[0.0 if a == b else known[a, b] if (a, b) in known else self._price(v, a, b, known) for b in columns] for a in rows]
        )
        full = small[[i for (i,) in row_of]]
        if all(len(w) == 1 for w in column_of):
            return full[:, [i for (i,) in column_of]]
        return np.stack([full[:, list(w)].sum(axis=1) for w in column_of], axis=1)

    def _price(self, v: Value, a: Layout, b: Layout, known: dict[tuple[Layout, Layout], float]) -> float:
        there = reachable(v, a, b, self.space.sizes)
        known[a, b] = self.prices.move(v.tensor, a, b, self.space.sizes, v.grad) if there else float("inf")
        return known[a, b]


def numel(tensor: Tensor, layout: Layout, sizes: tuple[int, ...]) -> int:
    return math.prod(local_shape(tensor.shape, layout, sizes, (0,) * len(sizes)))


def _distinct(layouts: Sequence[Layout]) -> Side:
    found: dict[Layout, int] = {}
    which: list[tuple[int, ...]] = [(found.setdefault(layout, len(found)),) for layout in layouts]
    return tuple(found), which


def _index(layouts: Sequence[Layout], wanted: Layout) -> int:
    return layouts.index(wanted) if wanted in layouts else -1


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


__all__ = ["AXES", "Layout", "P", "Pair", "Placements", "Prices", "Space", "choose", "path", "reachable"]
