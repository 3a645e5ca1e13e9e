"""Partition: a block's ops on one rank's shards, with explicit moves where placements differ.

In: ops of the time-split graph, the strategies that the plan chose, a rank's coordinates. Out: a `Routine`, a straight list of
steps over named local tensors, and the rank inputs it needs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..layout import Layout, Type, dim_positions, local_shape, segments
from ..plan.moves import path
from ..plan.space import AXES, Pair
from ..trace.graph import Graph, Op, Ref, Tensor, map_refs
from ..trace.interpret import call
from ..trace.ops.local import localize
from . import bodies, fp8
from .collectives import Local, Spot, indices, local_cut, move
from .fuse import Merged, fuse, joined, linears
from .kernels import place
from .program import RankInput
from .routine import SAME, Fn, Port, Routine, Step, value_name
from .rows import EXPERTS, sort_rows
from .topk import compare_few


@dataclass(frozen=True)
class Gathered:
    """A parameter that is used otherwise than it is stored; or several that are used as one, which go there together (`whole`) or each by
    itself."""

    names: tuple[str, ...]
    stored: tuple[Layout, ...]
    used: tuple[Layout, ...]
    whole: bool = False

    @property
    def name(self) -> str:
        return self.names[0] if len(self.names) == 1 else joined(self.names)


@dataclass(frozen=True)
class Drawn:
    """A mask of dropout that every rank draws: the whole's shape, the probability of 0, names of the seed and of positions per dim."""

    full: tuple[int, ...]
    p: float
    ins: tuple[str, ...]


@dataclass
class Partitioner:
    """Builds routines for one rank's coordinates. `sizes`: of dp and tp; `dropout`: "philox" or "exact"."""

    graph: Graph
    placed: Mapping[str, Pair]
    held: Mapping[str, Layout]
    sizes: tuple[int, int]
    coords: tuple[int, int]
    microbatches: int
    dropout: str = "philox"
    opaque: Mapping[str, Fn] = field(default_factory=dict)
    merge: Sequence[tuple[str, ...]] = ()
    kernels: Sequence[str] = ()
    precision: Mapping[str, str] = field(default_factory=dict)

    def local(self, name: str, layout: Layout) -> Tensor:
        v = self.graph.values[name]
        return Tensor(local_shape(v.tensor.shape, layout, self.sizes, self.coords), v.tensor.dtype)

    def block(self, ops: Sequence[Op], params: Mapping[str, str], wanted: Sequence[tuple[str, Layout]], label: str) -> Routine:
        """The routine of some ops. `params`: parameter value → "" (its uses come in as inputs named by use layout). `wanted`:
        values that must come out, in these layouts."""
        build = _Builder(self, Routine(label=label), params)
        for op in fuse(ops, self.merge):
            if isinstance(op, Merged):
                build.merged(op)
            else:
                build.op(op)
        for name, layout in wanted:
            build.output(name, layout)
        outputs = {p.name for p in build.routine.outputs}
        steps = compare_few(build.routine.steps, build.tensors())
        build.routine.steps, tensors = sort_rows(steps, build.tensors(), outputs)
        if self.kernels:
            build.routine.steps = place(build.routine.steps, tensors, outputs, self.kernels)
        return build.routine

    def rows(self, names: Sequence[str], layouts: Sequence[Layout]) -> Tensor:
        """A parameter's shard; several weights', one below the other."""
        if len(names) == 1:
            return self.local(names[0], layouts[0])
        parts = [self.local(name, layout) for name, layout in zip(names, layouts, strict=True)]
        return Tensor((sum(p.shape[0] for p in parts), *parts[0].shape[1:]), parts[0].dtype)

    def gather(self, uses: Sequence[Gathered]) -> Routine:
        """Parameters as stored → as used."""
        build = _Builder(self, Routine(label="parameters"), {})
        for each in uses:
            build.gathered(each)
        return build.routine

    def casts(self, weights: Sequence[tuple[str, Tensor, bool]]) -> Routine:
        """Weights as used → their casts to fp8."""
        routine = Routine(label="casts")
        for env, tensor, turn in weights:
            routine.inputs.append(Port(env, tensor, False, param=True))
            cast = fp8.names(env, turn)
            routine.steps.append(Step(functools.partial(fp8.cast, transpose=turn), (env,), cast, f"fp8 cast {turn}"))
            routine.outputs += [Port(name, spec, False) for name, spec in zip(cast, fp8.specs(tensor, turn), strict=True)]
        return routine


class _Builder:
    def __init__(self, part: Partitioner, routine: Routine, params: Mapping[str, str]) -> None:
        self.part, self.routine, self.params = part, routine, params
        self.known: set[str] = set()  # env names that exist
        self.layouts: dict[str, Layout] = {}  # value → layout in which it was made or came in
        self.seen: list[tuple[str, Layout]] = []
        self.shifted: dict[str, Tensor] = {}  # indices counted from where a shard begins
        self.draws: dict[str, Drawn] = {}

    def tensors(self) -> dict[str, Tensor]:
        """Every value that is known here, by its name here."""
        found = {port.name: port.tensor for port in self.routine.inputs}
        return found | {value_name(name, layout): self.part.local(name, layout) for name, layout in self.seen} | self.shifted

    def op(self, op: Op) -> None:
        part, graph = self.part, self.part.graph
        pair = part.placed[op.name]
        ins = [self.operand(name, tuple(s.ins[i] for s in pair)) for i, name in enumerate(op.inputs)]
        layouts = {name: tuple(s.ins[i] for s in pair) for i, name in enumerate(op.inputs)}

        def held(name: str, dim: int) -> np.ndarray:
            return dim_positions(graph.values[name].tensor.shape[dim], dim, layouts[name], part.sizes, part.coords)

        outs = []
        for i, name in enumerate(op.outs):
            layout = tuple(s.outs[i] for s in pair)
            self.layouts[name] = layout
            self.seen.append((name, layout))
            outs.append(value_name(name, layout))
        out_layout = tuple(s.outs[0] for s in pair)
        if op.name in part.precision:
            weight = part.local(op.inputs[1], layouts[op.inputs[1]])
            self.eight((op,), ins, weight, [weight.shape[0]], outs)
            return
        local = replace_args(op, localize(op, held, part.local(op.outs[0], out_layout).shape))
        body_axes = [a for a, s in enumerate(pair) if s.body]
        extra: list[str] = []
        drawn = self.draws.get(ins[-1]) if op.target == "autoshard.attention.default" and len(op.args) > 6 else None
        if body_axes and op.target == EXPERTS:
            ins[2], body_axes = self._counted_from(op, ins[2], layouts), []
        if drawn is not None:
            ins, (fn, text, extra) = ins[:-1], _dropping(local, drawn)
        elif body_axes or op.target.startswith("autoshard.dropout_mask") or op.target.startswith("autoshard.time_"):
            fn, text, extra = self._body(local, op, out_layout, layouts)
        else:
            fn, text = _runner(local, part.opaque), f"{local.target}{_numbered(local)}"
        self.known.update(outs)
        plain = None if extra or body_axes else _renamed(local, ins)
        self.routine.steps.append(Step(fn, (*ins, *extra), tuple(outs), text, op.source, plain))

    def merged(self, group: Merged) -> None:
        """Several linears as one."""
        part, graph = self.part, self.part.graph
        pairs = [part.placed[op.name] for op in group.ops]
        x = self.operand(group.input, tuple(s.ins[0] for s in pairs[0]))
        uses = [tuple(s.ins[1] for s in pair) for pair in pairs]
        weight = value_name(joined(group.weights), uses[0])
        tensor, grad = part.rows(group.weights, uses), graph.values[group.weights[0]].grad
        self.routine.inputs.append(Port(weight, tensor, grad, param=True))
        rows = [part.local(name, use).shape[0] for name, use in zip(group.weights, uses, strict=True)]
        outs = []
        for op, pair in zip(group.ops, pairs, strict=True):
            layout = self.layouts[op.outs[0]] = tuple(s.outs[0] for s in pair)
            self.seen.append((op.outs[0], layout))
            outs.append(value_name(op.outs[0], layout))
        if group.ops[0].name in part.precision:
            self.eight(group.ops, [x, weight], tensor, rows, outs)
            return
        self.known.update(outs)
        step = Step(
            lambda x, w: linears(x, w, rows), (x, weight), tuple(outs), f"merged linear {rows}", group.ops[0].source, rows=tuple(rows)
        )
        self.routine.steps.append(step)

    def eight(self, ops: Sequence[Op], ins: Sequence[str], weight: Tensor, rows: Sequence[int], outs: Sequence[str]) -> None:
        """Linears of one input in fp8. `ins`: x, the weight, and a bias if there is one. The weight's casts come in."""
        (x, w, *bias), (first, *_) = ins, ops
        of_x, of_weight = (self.part.graph.values[name].grad for name in first.inputs[:2])
        mine, theirs = fp8.names(x, of_weight), fp8.names(w, of_x)
        if mine.plain not in self.known:
            self.known.update(mine)
            cast = functools.partial(fp8.cast, transpose=of_weight)
            self.routine.steps.append(Step(cast, (x,), mine, f"fp8 cast {of_weight}", first.source))
        if theirs.plain not in self.known:
            self.known.update(theirs)
            self.routine.casts.append((w, weight, of_x))
            self.routine.inputs += [Port(n, s, False, param=True) for n, s in zip(theirs, fp8.specs(weight, of_x), strict=True)]

        def fn(x: torch.Tensor, w: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return fp8.linears(x, w, rest[0] if bias else None, rest[len(bias) :], rows)

        self.known.update(outs)
        text = f"fp8 linear {list(rows)} {bool(bias)}"
        self.routine.steps.append(Step(fn, (x, w, *bias, *mine, *theirs), tuple(outs), text, first.source))

    def gathered(self, each: Gathered) -> None:
        """Parameters on their way into the loop."""
        grad = self.part.graph.values[each.names[0]].grad
        if each.whole or len(each.names) == 1:
            self.parameter(value_name(each.name, each.stored[0]), self.part.rows(each.names, each.stored), grad)
            out = self.moved(each.names[0], each.stored[0], each.used[0], each.name)
        else:
            ways = list(zip(each.names, each.stored, each.used, strict=True))
            for name, stored, _ in ways:
                self.parameter(value_name(name, stored), self.part.local(name, stored), grad)
            parts = tuple(self.moved(*way) for way in ways)
            out = value_name(each.name, each.used[0])
            self.routine.steps.append(Step(lambda *parts: torch.cat(parts), parts, (out,), f"merge {len(parts)}"))
        self.routine.outputs.append(Port(out, self.part.rows(each.names, each.used), grad))

    def parameter(self, env: str, tensor: Tensor, grad: bool) -> None:
        if env not in self.known:
            self.known.add(env)
            self.routine.inputs.append(Port(env, tensor, grad, param=True))

    def operand(self, name: str, want: Layout) -> str:
        """The value in the layout wanted, moved there if it isn't."""
        v = self.part.graph.values[name]
        if name in self.params:
            env = value_name(name, want)
            self.parameter(env, self.part.local(name, want), v.grad)
            return env
        if name not in self.layouts:
            layout = self.part.held[name]
            self.layouts[name] = layout
            env = value_name(name, layout)
            self.known.add(env)
            self.routine.inputs.append(Port(env, self.part.local(name, layout), v.grad))
        return self.moved(name, self.layouts[name], want)

    def output(self, name: str, layout: Layout) -> None:
        env = self.operand(name, layout)
        self.routine.outputs.append(Port(env, self.part.local(name, layout), self.part.graph.values[name].grad))

    def moved(self, name: str, have: Layout, want: Layout, label: str = "") -> str:
        """Take a value from one layout to another, axis by axis; what was done once is reused. `label`: what goes by another name, as the
        value does."""
        label = label or name
        env = value_name(label, have)
        if have == want:
            return env
        v = self.part.graph.values[name]
        steps = path(v.tensor.shape, have, want, self.part.sizes)
        assert steps is not None, f"no way for {name} from {have} to {want}"
        layout = list(have)
        for axis, a, b in steps:
            layout[axis] = b
            target = value_name(label, tuple(layout))
            if target not in self.known:
                self.seen.append((name, tuple(layout)))
                self._move(env, target, v.tensor, tuple(layout), axis, a, b, v.grad)
            env = target
        final = value_name(label, want)
        if env != final and final not in self.known:  # axes of size 1 change their type without a step
            self.known.add(final)
            self.seen.append((name, want))
            self.routine.steps.append(Step(lambda x: x, (env,), (final,), SAME))
        return final

    def _move(self, source: str, target: str, tensor: Tensor, layout: Layout, axis: int, a: Type, b: Type, grad: bool) -> None:
        part = self.part
        sides = [self._local_cut(tensor, t, axis, layout) if t.kind == "S" else () for t in (a, b)]
        spot = Spot(AXES[axis], part.sizes[axis], part.coords[axis], *sides)
        ins = [source]
        needed = indices(a, b, grad)
        specs = [RankInput("index", cuts=((AXES[axis], ()),), draw=side) for side in sides] + [RankInput("first", cuts=((AXES[axis], ()),))]
        ins += [self.rank_input(spec) for spec, need in zip(specs, needed, strict=True) if need]

        def fn(x: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
            given = iter(extra)
            return move(x, a, b, spot, grad, *(next(given) if need else None for need in needed))

        uneven = any(len(set(sizes)) > 1 for side in sides for _, sizes, _ in side)
        text = f"move {a}->{b} {spot.axis} {sides} {grad} {spot.coord if uneven else ''}"
        self.known.add(target)
        self.routine.steps.append(Step(fn, tuple(ins), (target,), text))

    def _local_cut(self, tensor: Tensor, t: Type, axis: int, layout: Layout) -> Local:
        n = tensor.shape[t.dim]
        others = [
            (segments(u.cut, n)[0], self.part.sizes[o], self.part.coords[o])
            for o, u in enumerate(layout)
            if o != axis and u.kind == "S" and u.dim == t.dim and self.part.sizes[o] > 1
        ]
        return local_cut(segments(t.cut, n), self.part.sizes[axis], others)

    def rank_input(self, spec: RankInput) -> str:
        name = f"@{spec.kind}:{hashlib.md5(repr(spec).encode()).hexdigest()[:10]}"
        if name not in self.known:
            self.known.add(name)
            self.routine.rank_inputs[name] = spec
            self.routine.inputs.append(Port(name, self._rank_tensor(spec), False))
        return name

    def _rank_tensor(self, spec: RankInput) -> Tensor:
        if spec.kind == "first":
            return Tensor((), "float32")
        if spec.kind in ("offset", "seed"):
            return Tensor((), "int64")
        sizes = dict(zip(AXES, self.part.sizes, strict=True)) | {"mb": self.part.microbatches}
        coords = dict(zip(AXES, self.part.coords, strict=True)) | {"mb": 0}
        if spec.kind == "dropout":
            from .program import chain_positions

            shape = tuple(len(chain_positions(n, c, sizes, coords)) for n, c in zip(spec.draw[0], spec.draw[4], strict=True))
            return Tensor(shape, spec.draw[3].removeprefix("torch."))
        return Tensor((len(spec.tensor(sizes, coords)),), "int64")

    def _counted_from(self, op: Op, index: str, layouts: Mapping[str, Layout]) -> str:
        """An index of matrices [offset, offset + E), counted from there: those that choose others lie outside, and give zeros."""
        n = self.part.graph.values[op.inputs[1]].tensor.shape[0]
        offset = self.rank_input(RankInput("offset", n, self._chain(n, 0, layouts[op.inputs[1]])))
        out = f"{index}-{offset}"
        if out not in self.known:
            self.known.add(out)
            self.shifted[out] = self.tensors()[index]
            self.routine.steps.append(Step(torch.sub, (index, offset), (out,), "counted from a shard's offset", op.source))
        return out

    def _body(self, local: Op, op: Op, out: Layout, ins: Mapping[str, Layout]) -> tuple[Fn, str, list[str]]:
        """An op that takes its shard's place: the function, its text, its rank inputs."""
        graph = self.part.graph
        if op.target in ("aten.embedding.default", "autoshard.pick.default"):
            table = op.inputs[0]
            shape = graph.values[table].tensor.shape
            dim = 0 if op.target.startswith("aten") else len(shape) - 1
            chain = self._chain(shape[dim], dim, ins[table])
            offset = self.rank_input(RankInput("offset", shape[dim], chain))
            return (bodies.embedding if dim == 0 else bodies.pick), f"{op.target} shard", [offset]
        if op.target == "aten.mean.dim":
            shape = graph.values[op.inputs[0]].tensor.shape
            dims = tuple(d % len(shape) for d in op.args[1]) or tuple(range(len(shape)))
            count = int(np.prod([shape[d] for d in dims]))
            keep = bool(op.args[2]) if len(op.args) > 2 else False
            return (lambda x: bodies.mean(x, dims, keep, count)), f"mean {dims} {keep} {count}", []
        if op.target == "autoshard.time_slice.default":
            _, dim, time, n = op.args
            chain = (("mb", Type.parse(time).cut),)
            index = self.rank_input(RankInput("positions", n, chain))
            return (lambda x, i: x.index_select(dim, i)), f"time_slice {dim}", [index]
        if op.target == "autoshard.time_mask.default":
            first = self.rank_input(RankInput("first", cuts=(("mb", ()),)))
            return (lambda x, f: torch.where(f != 0, x, torch.zeros((), dtype=x.dtype, device=x.device))), "time_mask", [first]
        assert op.target == "autoshard.dropout_mask.default", op.target
        return self._dropout(local, op, out)

    def _dropout(self, local: Op, op: Op, out: Layout) -> tuple[Fn, str, list[str]]:
        _, p, dtype, order, strides = op.args
        full = op.kwargs.get("full", op.args[0])
        time = Type.parse(op.kwargs["time"]) if op.kwargs.get("time") not in (None, "R") else None
        chains = []
        for d, n in enumerate(op.args[0]):
            start = (("mb", time.cut),) if time and time.dim == d else ()
            chains.append((*start, *self._chain(n, d, out)))
        if self.part.dropout == "exact":
            mask = self.rank_input(RankInput("dropout", order=order, draw=(tuple(full), tuple(strides), p, dtype, tuple(chains))))
            return (lambda m: m.view_as(m)), "dropout mask", [mask]
        seed = self.rank_input(RankInput("seed", order=order))
        where = [self.rank_input(RankInput("positions", n, chain)) for n, chain in zip(full, chains, strict=True)]
        kind = getattr(torch, dtype.removeprefix("torch."))
        if not isinstance(p, tuple):
            self.draws[value_name(op.outs[0], out)] = Drawn(tuple(full), float(p), (seed, *where))
        return (lambda s, *at: bodies.dropout_mask(s, at, tuple(full), p, kind)), f"dropout {full} {p} {dtype}", [seed, *where]

    def _chain(self, n: int, dim: int, layout: Layout) -> tuple[tuple[str, Any], ...]:
        return tuple((AXES[a], t.cut) for a, t in enumerate(layout) if t.kind == "S" and t.dim == dim and self.part.sizes[a] > 1)


def _dropping(op: Op, drawn: Drawn) -> tuple[Fn, str, list[str]]:
    """Attention that draws what it drops: of its operands the noise isn't made."""
    _, _, _, mask, causal, scale, _ = op.args

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seed, *places = rest[mask is not None :]
        given = rest[0] if mask is not None else None
        return bodies.dropout_attention(q, k, v, given, seed, places, drawn.full, drawn.p, causal, scale)

    return fn, f"attention, dropping {drawn.full} {drawn.p} {mask is not None} {causal} {scale}", list(drawn.ins)


def replace_args(op: Op, args: tuple[Any, ...]) -> Op:
    return Op(op.name, op.target, args, op.kwargs, op.outs, op.source, op.module)


def _renamed(op: Op, names: Sequence[str]) -> Op:
    """The op with these names in place of its operands', in order."""
    feed = iter(names)
    args, kwargs = map_refs((op.args, op.kwargs), lambda _: Ref(next(feed)))
    return Op(op.name, op.target, args, kwargs, op.outs, op.source, op.module)


def _numbered(op: Op) -> str:
    return repr(map_refs((op.args, op.kwargs), lambda r: Ref("_")))


def _runner(op: Op, opaque: Mapping[str, Fn]) -> Fn:
    """A function of the op's operands, in the order of op.inputs (repeats kept)."""

    def fn(*tensors: torch.Tensor) -> Any:
        feed = iter(tensors)
        args, kwargs = map_refs((op.args, op.kwargs), lambda _: next(feed))
        return call(op.target, args, kwargs, device="cpu")

    return fn
