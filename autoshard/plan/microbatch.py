"""Microbatches as an axis over time: the graph of one microbatch, and what runs once before the loop.

`split_time(graph, n)` pushes "cut into n along the batch" through every op by the same factor rules that cut over ranks.
On the time axis a value is a slice of the batch (S), the same in every microbatch (R), or a term of a sum over microbatches
(P: only the loss may end so; gradients of parameters accumulate). What depends on data alone but needs the whole batch (the
count of labels in a mean) is hoisted: computed once, before the loop. Where a value that depends on parameters would have
to be whole (a batch norm's statistics, an op without a batch rule) there is no way but one microbatch; `NotSplittable` says which op.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from ..layout import P, R, Type, dim_positions, local_shape
from ..trace.blocks import data_only
from ..trace.graph import Graph, Op, Ref, Tensor, Value, map_refs
from ..trace.ops.local import localize
from ..trace.ops.rule import Rule, Strategy, strategies
from ..trace.ops.table import rule_of


class NotSplittable(Exception):
    """Why a graph has to run its batch whole: the op, its source line, what it lacks."""


@dataclass
class TimeSplit:
    """The graph of one microbatch. `once`: ops of the prologue. `inputs`: input value → (source input, its time type)."""

    graph: Graph
    microbatches: int
    once: set[str] = field(default_factory=set)
    inputs: dict[str, tuple[str, Type]] = field(default_factory=dict)
    data: set[str] = field(default_factory=set)
    """Ops of the loop that depend on data alone."""
    kept: dict[str, Type] = field(default_factory=dict)
    """What a step hands out besides the loss: its name → its time type."""

    @functools.cached_property
    def rules(self) -> dict[str, Rule]:
        """The rule of every op; ops that are alike share theirs, as an object."""
        values, known, found = self.graph.values, {}, {}
        for op in self.graph.ops:
            key = alike(op, values)
            if key not in known:
                known[key] = rule_of(op, values)
            found[op.name] = known[key]
        return found


def alike(op: Op, values: Mapping[str, Value]) -> Hashable:
    """Equal for ops that compute the same of values that are alike."""
    number: dict[str, int] = {}

    def of(ref: Ref) -> Ref:
        return Ref(str(number.setdefault(ref.name, len(number))))

    arguments = repr(map_refs((op.args, op.kwargs), of))
    # an opaque region's rule may look at anything
    name = op.name if "opaque" in op.target else ""
    return (op.target, arguments, name, *((values[n].tensor, values[n].role, values[n].grad) for n in (*number, *op.outs)))


def prune(graph: Graph) -> Graph:
    """The graph with only what its roots need."""
    needed, ops = set(graph.roots), []
    for op in reversed(graph.ops):
        if any(out in needed for out in op.outs):
            needed.update(op.inputs)
            ops.append(op)
    ops.reverse()
    made = {out for op in ops for out in op.outs}
    keep = {n: v for n, v in graph.values.items() if n in made or (v.role != "value" and (n in needed or v.role in ("param", "buffer")))}
    return replace(graph, values=keep, ops=ops, outputs={})


def split_time(graph: Graph, n: int) -> TimeSplit:
    """The graph of one of `n` microbatches. Raises NotSplittable."""
    graph = prune(graph)
    if n == 1:
        inputs = {v.name: (v.name, R) for v in graph.sources("input")}
        return TimeSplit(graph, 1, set(), inputs, data_only(graph), dict.fromkeys(graph.kept, R))
    return _Splitter(graph, n).run()


class _Splitter:
    def __init__(self, graph: Graph, n: int) -> None:
        self.old, self.n = graph, n
        self.data = data_only(graph)
        self.producer = graph.producer()
        self.time: dict[str, Type] = {}  # value of the new graph → its type on the time axis
        self.new = Graph(loss=graph.loss, updates=dict(graph.updates), tied=graph.tied, notes=list(graph.notes))
        self.split = TimeSplit(self.new, n)
        self.whole: dict[str, str] = {}  # value → its name in the prologue
        self.body: list[Op] = []
        self.prologue: list[Op] = []
        self.lazy: dict[str, Op] = {}  # random masks and broadcasts whose time type their user decides
        self.derived: dict[tuple[str, Type], str] = {}
        self.choices: dict[object, Strategy] = {}

    def run(self) -> TimeSplit:
        for v in self.old.sources("param", "buffer", "constant", "input"):
            self._source(v)
        for op in self.old.ops:
            self._op(op)
        for path, name in self.old.updates.items():
            if self.time[self._materialise(name)] != R:
                if self.producer[name].name not in self.data:
                    raise NotSplittable(f"the update of buffer {path} needs the whole batch")
                self.new.updates[path] = self._hoist(name)
            elif name in self.whole:
                self.new.updates[path] = self.whole[name]
        for label, name in self.old.kept.items():
            self.split.kept[label] = self.time[self._materialise(name)]
            self.new.kept[label] = self.whole.get(name, name) if self.split.kept[label] == R else name
        loss = self.time.get(self.old.loss)
        if loss == R:
            self.new.loss = self._convert(self.old.loss, P)
        elif loss != P:
            raise NotSplittable(f"the loss is not a sum over the batch (it is {loss} over time)")
        self.new.ops = self.prologue + self.body
        self.split.data = data_only(self.new) - self.split.once
        return self.split

    def _source(self, v: Value) -> None:
        t = R
        if v.role == "input" and v.batch_dim is not None:
            size = v.tensor.shape[v.batch_dim]
            if size % self.n:
                raise NotSplittable(f"a batch of {size} doesn't divide into {self.n} microbatches")
            t = Type("S", v.batch_dim)
        self._declare(v.name, v, t)
        if v.role == "input":
            self.split.inputs[v.name] = (v.name, t)
        if t == R:
            self.whole[v.name] = v.name

    def _declare(self, name: str, v: Value, t: Type) -> None:
        shape = local_shape(v.tensor.shape, (t,), (self.n,), (0,))
        self.new.values[name] = replace(v, name=name, tensor=Tensor(shape, v.tensor.dtype))
        self.time[name] = t

    def _op(self, op: Op) -> None:
        ins = op.inputs
        if op.target == "autoshard.dropout_mask.default" or (op.target == "aten.expand.default" and self.time.get(ins[0]) == R):
            self.lazy[op.outs[0]] = op
            return
        types = [self._type(name) for name in ins]
        known = [t for t in types if t is not None]
        if op.name in self.data and all(t == R for t in known):
            self._once(op)
            return
        # layers that are alike are cut alike
        key = (alike(op, self.old.values), *types, *(self._hoistable(n) for n in ins))
        if key not in self.choices:
            self.choices[key] = self._choose(op, types)
        choice = self.choices[key]
        args = dict(zip(ins, ins, strict=True))
        renamed: list[str] = []
        for name, t in zip(ins, choice.ins, strict=True):
            renamed.append(self._convert(name, t))
        feed = iter(renamed)
        named = map_refs((op.args, op.kwargs), lambda ref: Ref(next(feed)))
        del args
        for name, t in zip(op.outs, choice.outs, strict=True):
            self._declare(name, self.old.values[name], t if t.kind in "SP" else R)
        self._emit(replace(op, args=named[0], kwargs=named[1]), op, choice)

    def _type(self, name: str) -> Type | None:
        return None if name in self.lazy and name not in self.time else self.time[name]

    def _choose(self, op: Op, types: list[Type | None]) -> Strategy:
        old = [self.old.values[n] for n in op.inputs]
        outs = [self.old.values[n] for n in op.outs]
        seeds: dict[str, set[Type]] = {}
        for v, t in zip(old, types, strict=True):
            if t is not None and t.kind == "S":
                seeds.setdefault(v.name, set()).add(t)
        best: tuple[tuple[int, int], Strategy] | None = None
        for s in strategies(rule_of(op, self.old.values), old, outs, self.n, seeds):
            s = Strategy(tuple(R if t.kind == "I" else t for t in s.ins), tuple(R if t.kind == "I" else t for t in s.outs), s.body)
            price = [self._price(name, t, want) for name, t, want in zip(op.inputs, types, s.ins, strict=True)]
            if None in price:
                continue
            rank = (sum(p for p in price if p), sum(o.kind == "P" for o in s.outs))
            if best is None or rank < best[0]:
                best = (rank, s)
        if best is None:
            raise NotSplittable(f"{op.target} ({op.name}) at {op.source or 'an unknown line'} can't take its batch in parts")
        return best[1]

    def _price(self, name: str, have: Type | None, want: Type) -> int | None:
        """How far `have` is from `want`: 0 equal, more for a slice or a hoist, None if there is no way."""
        if have == want:
            return 0
        if have is None:
            return 0 if want.kind == "S" else 1 if want == R else None
        if have == R:
            return {"S": 2, "P": 3}[want.kind]
        hoistable = self._hoistable(name)
        if self.old.values[name].role == "input" and hoistable and want.kind != "P":
            return 10
        return 10 if hoistable and want.kind != "P" else None

    def _hoistable(self, name: str) -> bool:
        return name not in self.producer or self.producer[name].name in self.data

    def _convert(self, name: str, want: Type) -> str:
        """The value in type `want`, under the name that holds it."""
        if name in self.lazy and name not in self.time:
            return self._lazy(name, want)
        have = self.time[name]
        if have == want:
            return self.whole.get(name, name) if want == R else name
        if want == R:
            return self._hoist(name)
        source = self.whole.get(name, name) if have == R else self._hoist(name)
        key = (source, want)
        if key not in self.derived:
            v = self.old.values[name]
            target = "time_slice" if want.kind == "S" else "time_mask"
            new = f"{name}@{target}{len(self.derived)}"
            self._declare(new, replace(v, role="value", path="", batch_dim=None), want)
            extra = (want.dim, str(want), v.tensor.shape[want.dim]) if want.kind == "S" else ()
            self.body.append(Op(new, f"autoshard.{target}.default", (Ref(source), *extra), {}, (new,)))
            self.derived[key] = new
        return self.derived[key]

    def _materialise(self, name: str) -> str:
        """The value in the loop under its own name, whatever its type."""
        return self._lazy(name, R) if name in self.lazy and name not in self.time else name

    def _lazy(self, name: str, want: Type) -> str:
        op = self.lazy[name]
        key = (name, want)
        if key in self.derived:
            return self.derived[key]
        new = name if name not in self.time else f"{name}@{len(self.derived)}"
        if op.target == "aten.expand.default":
            if want == R and op.name in self.data:
                self._once(op)
                self.derived[key] = self.whole[name]
                return self.whole[name]
            old = [self.old.values[n] for n in op.inputs]
            rule = strategies(
                rule_of(op, self.old.values), old, [self.old.values[name]], self.n, {name: {want}} if want.kind == "S" else {}
            )
            fitting = [s for s in rule if s.outs[0] == want and s.ins[0].kind in "RI"]
            if not fitting:
                expanded = self._lazy(name, R)
                return self._convert(expanded, want) if expanded == name else self._slice_whole(name, expanded, want)
        self._declare(new, self.old.values[name], want)
        renamed = replace(op, name=new, outs=(new,), args=map_refs(op.args, lambda r: Ref(self.whole.get(r.name, r.name))))
        choice = Strategy((R,) * len(op.inputs), (want,), "dropout_mask" if not op.inputs else "")
        self._emit(renamed, op, choice, new)
        self.derived[key] = new
        return new

    def _slice_whole(self, name: str, whole: str, want: Type) -> str:
        new = f"{name}@slice{len(self.derived)}"
        v = self.old.values[name]
        self._declare(new, replace(v, role="value", path="", batch_dim=None), want)
        self.body.append(Op(new, "autoshard.time_slice.default", (Ref(whole), want.dim, str(want), v.tensor.shape[want.dim]), {}, (new,)))
        self.derived[(name, want)] = new
        return new

    def _emit(self, named: Op, op: Op, choice: Strategy, out: str = "") -> None:
        """Append the op with its sizes localized to one microbatch."""
        layouts = dict(zip(op.inputs, choice.ins, strict=True))

        def held(name: str, dim: int):  # type: ignore[no-untyped-def]
            return dim_positions(self.old.values[name].tensor.shape[dim], dim, (layouts[name],), (self.n,), (0,))

        local = localize(op, held, self.new.values[out or op.outs[0]].tensor.shape)
        feed = iter(named.inputs)
        args = map_refs(local, lambda ref: Ref(next(feed)))
        kwargs = dict(named.kwargs)
        if choice.body == "dropout_mask":
            kwargs |= {"full": self.old.values[op.outs[0]].tensor.shape, "time": str(choice.outs[0])}
        self.body.append(replace(named, args=args, kwargs=kwargs))
        if choice.body == "mean" and choice.outs[0] == P:
            self._scale(named)

    def _scale(self, op: Op) -> None:
        """A mean over the batch is, per microbatch, the microbatch's mean over the number of microbatches."""
        (out,) = op.outs
        inner = out + "@mean"
        self.new.values[inner] = replace(self.new.values[out], name=inner)
        self.time[inner] = P
        self.body[-1] = replace(op, name=inner, outs=(inner,))
        self.body.append(Op(out, "aten.div.Scalar", (Ref(inner), self.n), {}, (out,), op.source, op.module))

    def _once(self, op: Op) -> None:
        """Run an op of data alone, whole, in the prologue."""
        if op.name in self.split.once:
            return
        for name in op.inputs:
            if name not in self.whole:
                self._hoist(name)
        clash = any(out in self.time for out in op.outs)
        names = {out: f"{out}@whole" if clash else out for out in op.outs}
        args, kwargs = map_refs((op.args, op.kwargs), lambda r: Ref(self.whole[r.name]))
        for out, new in names.items():
            self.new.values[new] = replace(self.old.values[out], name=new)
            self.whole[out] = new
            self.time[new] = R
        name = f"{op.name}@whole" if clash else op.name
        self.prologue.append(replace(op, name=name, args=args, kwargs=kwargs, outs=tuple(names.values())))
        self.split.once.add(name)

    def _hoist(self, name: str) -> str:
        """The whole-batch version of a value that depends on data alone."""
        if name not in self.whole:
            v = self.old.values[name]
            if v.role == "input":
                whole = f"{name}@whole"
                self.new.values[whole] = replace(v, name=whole)
                self.time[whole] = R
                self.whole[name] = whole
                self.split.inputs[whole] = (name, R)
            else:
                self._once(self.producer[name])
        return self.whole[name]
