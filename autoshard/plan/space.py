"""Space: all ways to place one time-split graph on the inner axes of a mesh (dp, tp), before prices.

In: the graph of one microbatch and the axes' sizes. Out: for every op its strategies on both axes, for every parameter where it may be
stored, and where data lies. dp cuts what descends from the inputs' batch dims, tp everything else. What depends on data alone (masks,
position tables) is cheap and used everywhere, so it is no part of the problem: it lies cut along the batch on dp and whole on tp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..layout import I, Layout, R, S, Type, canonical, divisible, legal
from ..trace.graph import Op, Value
from ..trace.ops.rule import Factor, Place, Rule, Strategy, factor_cuts, strategies
from .microbatch import TimeSplit

AXES = ("dp", "tp")
Pair = tuple[Strategy, ...]
"""One strategy per inner axis."""


@dataclass
class Placements:
    """The choice: op → strategies, parameter value → storage, input value → layout; and its cost in seconds a microbatch (`bytes`: what it
    holds, where that was asked for)."""

    ops: dict[str, Pair]
    storage: dict[str, Layout]
    inputs: dict[str, Layout]
    seconds: float = 0.0
    bytes: float = 0.0


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
        self.rules = self.split.rules
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
        memo: dict[object, list[tuple[int, Type]]] = {}
        by_name = {op.name: op for op in graph.ops}
        while queue:
            name = next(iter(queue))
            del queue[name]
            op = by_name[name]
            operands, outs = [values[n] for n in op.inputs], [values[n] for n in op.outs]
            if not natural and not any(n in seeds for n in (*op.inputs, *op.outs)):
                continue
            sides = [*operands, *outs]
            for at, factor in enumerate(self.rules[name].factors):
                key = (id(self.rules[name]), at, *(frozenset(seeds.get(v.name, ())) for v in sides))
                if key not in memo:
                    memo[key] = _shards(factor, operands, outs, parts, seeds, natural)
                for i, t in memo[key]:
                    value = sides[i].name
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
        # ops that are alike share their rule, as an object
        key = (id(self.rules[op.name]), *(frozenset(seeds.get(n, ())) for seeds in self.seeds for n in touched))
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
) -> list[tuple[int, Type]]:
    """(operand or output, shard) of every cut of the factor that it or its neighbours suggest."""
    found: list[tuple[int, Type]] = []
    values = [*operands, *outs]
    here = {v.name: seeds.get(v.name, set()) for v in values}
    own = factor if natural else Factor(factor.name, factor.size, factor.ins, factor.outs, (), factor.body)
    for cut in factor_cuts(own, operands, outs, parts, here):
        if not divisible(cut, factor.size, parts):
            continue
        placed: list[tuple[int, Type]] = []
        for i, (v, place) in enumerate(zip(values, [*factor.ins, *factor.outs], strict=True)):
            if isinstance(place, Place):
                n = v.tensor.shape[place.dim]
                of_dim = place.cut_of(cut, factor.size)
                if of_dim is None or not divisible(of_dim, n, parts):
                    placed = []
                    break
                placed.append((i, S(place.dim, canonical(of_dim, n, parts))))
        found += placed
    return found


def fix_data(split: TimeSplit, sizes: tuple[int, int]) -> tuple[dict[str, Pair], dict[str, Layout]]:
    """Where a graph's inputs lie, and how its data-only ops run: (op → strategies, source → layout)."""
    space = Space(split, sizes, data_alone=True)
    return space.fixed, space.inputs
