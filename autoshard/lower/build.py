"""Build: for each rank, its blocks' routines in the layouts that the plan chose, traced and bound to the instruction list.

In: a captured graph and a Plan. Out: a Program. Routines whose text is equal share one module, so a transformer of 80 equal
layers on 64 ranks traces two or three modules.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PlanFileError
from ..layout import I, Layout, R
from ..plan import buckets, merge, precision, schedules
from ..plan.microbatch import TimeSplit, split_time
from ..plan.plan import Plan
from ..plan.stages import crossings, needed_data, stage_of
from ..trace.blocks import Block, find_blocks
from ..trace.capture import Captured
from . import kernels
from .accumulate import accumulating
from .coalesce import coalesced
from .differentiate import differentiate
from .early import early
from .fuse import joined
from .partition import Gathered, Partitioner
from .program import Call, InputSlice, Module, Program, RankProgram, Slot
from .routine import Port, Routine, value_name

log = logging.getLogger("autoshard")
INNER = ("dp", "tp")


def compile(captured: Captured, plan: Plan, *, ranks: Sequence[int] | None = None, dropout: str = "philox") -> Program:
    """The program of a plan: deterministic, no devices needed. `ranks`: build only these (others are None); `dropout`: "exact"
    replays torch's own random stream (for tests). Raises StalePlanError if the plan is another graph's, DeadlockError if its
    instructions could leave a rank waiting."""
    plan.check(captured.graph)
    split = split_time(captured.graph, plan.microbatches)
    builder = _Builder(captured, plan, split, dropout)
    wanted = range(plan.mesh.ranks) if ranks is None else ranks
    programs: list[Any] = [None] * plan.mesh.ranks
    for rank in wanted:
        programs[rank] = builder.rank(rank)
    for name in plan.kernels:
        if name not in builder.kernels:
            log.warning("the kernel %s is in the plan, but no block has a place for it", name)
    return Program(plan, split.graph, plan.mesh, dict(captured.constants), programs, captured, split.kept)


@dataclass
class _Builder:
    captured: Captured
    plan: Plan
    split: TimeSplit
    dropout: str
    modules: dict[str, Module] = field(default_factory=dict)
    kernels: set[str] = field(default_factory=set)
    """Those that were placed somewhere."""
    used: dict[int, dict[str, dict[Layout, None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.split.graph
        self.apart = self.split.once | self.split.data
        self.blocks = find_blocks(self.graph, self.apart)
        self.ops = {op.name: op for op in self.graph.ops}
        self.producer = self.graph.producer()
        self.home = stage_of(self.plan.cuts, self.blocks)
        self.crossing = crossings(self.split, self.blocks, self.plan.cuts)
        grads = [edge for edge, names in self.crossing.items() if any(self.graph.values[n].grad for n in names)]
        # a plan may have been edited since it was made
        schedules.check(self.plan.instructions, list(self.crossing), grads)
        mesh = self.plan.mesh
        self.sizes = (mesh.size("dp"), mesh.size("tp"))
        merge.check(self.plan.merge, self.graph, self.blocks, self.plan.ops, self.plan.storage, self.sizes)
        kernels.check(self.plan.kernels)
        precision.check(self.plan.precision, self.graph, self.plan.merge, self.plan.ops)
        if not buckets.legal(self.plan.buckets, self.plan.cuts, len(self.blocks)):
            raise PlanFileError(
                f"buckets {list(self.plan.buckets)} of {len(self.blocks)} blocks that are cut at {list(self.plan.cuts)}",
                hint="buckets begin at rising blocks, and at every cut",
            )
        self.held: dict[str, Layout] = dict(self.plan.inputs)
        for op in self.graph.ops:
            for i, out in enumerate(op.outs):
                self.held[out] = tuple(s.outs[i] for s in self.plan.ops[op.name])
        self.param_of = {v.name: v for v in self.graph.sources("param")}
        groups = [tuple(self.ops[name].inputs[1] for name in group) for group in self.plan.merge]
        self.merged = {name: group for group in groups for name in group}
        """Weight → all those that it is merged with, itself among them."""
        self.moved = buckets.moved(self.graph, self.blocks, self.plan.cuts, self.plan.ops, self.plan.storage)
        self.root_layout: dict[str, Layout] = {}
        for name in self.graph.roots:
            self.root_layout[name] = (I, I) if self.graph.values[name].grad else (R, R)

    def rank(self, rank: int) -> RankProgram:
        coords = self.plan.mesh.coords(rank)
        stage = coords["pp"]
        place, count = (coords["dp"], coords["tp"]), self.plan.microbatches
        part = Partitioner(
            self.graph,
            self.plan.ops,
            self.held,
            self.sizes,
            place,
            count,
            self.dropout,
            self.captured.opaque,
            self.plan.merge,
            self.plan.kernels,
            self.plan.precision,
        )
        return _Rank(self, part, rank, coords, stage).build()

    def module(self, routine: Routine, bucket: int | None = None) -> Module:
        """`bucket`: it moves parameters, and collectives of one kind become one, up to so many bytes."""
        text = f"{routine.text}\n{bucket}"
        self.kernels.update(step.kernel for step in routine.steps)
        if text not in self.modules:
            made = differentiate(routine, key=f"m{len(self.modules)}")
            made = made if bucket is None else coalesced(made, bucket)
            self.modules[text] = early(made) if self.plan.overlap else made
        return self.modules[text]

    def repeated(self, routine: Routine) -> Module:
        """The module of what runs once a microbatch."""
        module = self.module(routine)
        if self.plan.microbatches > 1 and module.backward is not None and module.accumulate is None:
            module.accumulate = accumulating(module.backward, len(module.grad_inputs))
        return module

    def stage_blocks(self, stage: int) -> list[Block]:
        cuts = self.plan.cuts
        end = cuts[stage + 1] if stage + 1 < len(cuts) else len(self.blocks)
        return self.blocks[cuts[stage] : end]

    def uses(self, stage: int) -> dict[str, dict[Layout, None]]:
        """Parameter value → the layouts in which the stage's ops take it."""
        if stage in self.used:
            return self.used[stage]
        found: dict[str, dict[Layout, None]] = {}
        for block in self.stage_blocks(stage):
            for name in block.ops:
                op, pair = self.ops[name], self.plan.ops[name]
                for i, operand in enumerate(op.inputs):
                    if operand in self.param_of:
                        found.setdefault(operand, {})[tuple(s.ins[i] for s in pair)] = None
        self.used[stage] = found
        return found


@dataclass
class _Rank:
    """One rank's program in the making."""

    build_: _Builder
    part: Partitioner
    number: int
    coords: dict[str, int]
    stage: int

    def build(self) -> RankProgram:
        b, graph = self.build_, self.build_.graph
        uses = b.uses(self.stage)
        blocks = b.stage_blocks(self.stage)
        routines = [self._block(block, uses) for block in blocks]
        updates = {path: name for path, name in graph.updates.items() if self._updates_here(name)}
        kept = {label: name for label, name in graph.kept.items() if self._updates_here(name)}
        wanted = [p for r in routines for p in r.inputs if not p.param]
        wanted_names = list(dict.fromkeys(p.name.split("|")[0] for p in wanted if not p.name.startswith("@")))
        wanted_names += [name for name in (*updates.values(), *kept.values()) if b.producer[name].name in b.apart]
        data = self._data(b.split.data, wanted_names, "data")
        once_for = wanted_names + ([p.name.split("|")[0] for p in data.inputs if not p.name.startswith("@")] if data else [])
        once = self._data(b.split.once, once_for, "prologue")
        gathers = [self.part.gather(bucket) for bucket in self._buckets()]
        casts = self._casts(routines)
        everything = [r for r in (*gathers, *casts, once, data, *routines) if r]
        loss = value_name(graph.loss, b.root_layout[graph.loss]) if graph.loss and b.home[b.producer[graph.loss].name] == self.stage else ""
        for routine in routines:
            b.repeated(routine)
        calls = [self._call(r) for r in routines]
        rank_inputs = {n: spec for r in everything for n, spec in r.rank_inputs.items()}
        ports = {p.name: p for r in everything for p in r.inputs}
        edges = {e: tuple(value_name(n, b.held[n]) for n in names) for e, names in b.crossing.items() if self.stage in e}
        travelling = {value_name(n, b.held[n]): n for names in b.crossing.values() for n in names}
        values = {p.name: p.tensor for r in routines for p in (*r.outputs, *r.inputs)}
        values |= {env: self.part.local(n, b.held[n]) for env, n in travelling.items()}
        return RankProgram(
            rank=self.number,
            coords=self.coords,
            stage=self.stage,
            params=self._params(uses),
            buffers={v.path: self._slot(v.name, (R, R)) for v in graph.sources("buffer")},
            instructions=b.plan.instructions[self.stage],
            gathers=(*(self._call(r, b.plan.bucket_bytes) for r in gathers), *map(self._call, casts)),
            once=self._call(once) if once else None,
            data=self._call(data) if data else None,
            blocks=calls,
            inputs=self._inputs(ports),
            constants=tuple(dict.fromkeys(n.split("|")[0] for n in ports if self._role(n) == "constant")),
            rank_inputs=rank_inputs,
            edges=edges,
            grad_values=frozenset(env for env, n in travelling.items() if graph.values[n].grad),
            values=values,
            loss=loss,
            updates={path: self._env(value_name(name, b.root_layout[name])) for path, name in updates.items()},
            kept={label: value_name(name, b.root_layout[name]) for label, name in kept.items()},
            tied=self._tied(uses),
            joined=self._joined(ports),
        )

    def _updates_here(self, name: str) -> bool:
        op = self.build_.producer[name].name
        return op in self.build_.apart or self.build_.home[op] == self.stage

    def _block(self, block: Block, uses: Mapping[str, Any]) -> Routine:
        b = self.build_
        inside = set(block.ops)
        ops = [b.ops[name] for name in block.ops]
        consumers = self._consumers()
        wanted: list[tuple[str, Layout]] = []
        for op in ops:
            for out in op.outs:
                if any(c not in inside for c in consumers.get(out, ())):
                    wanted.append((out, b.held[out]))
                if out in b.root_layout and (out, b.root_layout[out]) not in wanted:
                    wanted.append((out, b.root_layout[out]))
        return self.part.block(ops, dict.fromkeys(uses, ""), wanted, block.kind)

    def _consumers(self) -> dict[str, set[str]]:
        b = self.build_
        if not hasattr(b, "consumer_names"):
            b.consumer_names = {n: {c.name for c in cs} for n, cs in b.graph.consumers().items()}  # type: ignore[attr-defined]
        return b.consumer_names  # type: ignore[attr-defined,no-any-return]

    def _data(self, apart: set[str], wanted: Sequence[str], label: str) -> Routine | None:
        """The routine of the data-only ops among `apart` that the wanted values need."""
        b = self.build_
        names = needed_data(b.graph, apart, wanted)
        if not names:
            return None
        made = {out for n in names for out in b.ops[n].outs}
        outs: list[tuple[str, Layout]] = []
        for name in dict.fromkeys(wanted):
            if name in made:
                outs.append((name, b.held[name]))
                if name in b.root_layout and b.root_layout[name] != b.held[name]:
                    outs.append((name, b.root_layout[name]))
        return self.part.block([b.ops[n] for n in names], {}, outs, label)

    def _buckets(self) -> list[list[Gathered]]:
        """What is used otherwise than it is stored, by the plan's buckets."""
        b = self.build_
        first, end = b.plan.cuts[self.stage], [*b.plan.cuts, len(b.blocks)][self.stage + 1]
        found: list[list[Gathered]] = []
        for i in range(first, end):
            if i in b.plan.buckets:
                found.append([])
            for name, use in b.moved[i]:
                names = b.merged.get(name, (name,))
                if name == names[0]:
                    found[-1].append(self._gathered(names, use))
        return [bucket for bucket in found if bucket]

    def _casts(self, routines: Sequence[Routine]) -> list[Routine]:
        """For each block, the casts of its weights that no block before it has made."""
        known: set[tuple[str, bool]] = set()
        found = []
        for routine in routines:
            new = [cast for cast in routine.casts if (cast[0], cast[2]) not in known]
            known.update((env, turn) for env, _, turn in new)
            found.append(self.part.casts(new))
        return [routine for routine in found if routine.steps]

    def _gathered(self, names: Sequence[str], use: Layout) -> Gathered:
        b = self.build_
        stored = tuple(b.plan.storage[n] for n in names)
        if len(names) == 1:
            return Gathered(tuple(names), stored, (use,))
        used = tuple(next(iter(b.uses(self.stage)[n])) for n in names)
        whole = merge.how(b.graph.values[names[0]].tensor.shape, stored[0], used[0], b.sizes) == "whole"
        return Gathered(tuple(names), stored, used, whole)

    def _joined(self, ports: Mapping[str, Port]) -> dict[str, tuple[str, ...]]:
        """Merged weights that are used, or move on, as they are stored: the environment's name → the parameters' paths."""
        b, found = self.build_, {}
        for names in dict.fromkeys(b.merged.values()):
            env = value_name(joined(names), b.plan.storage[names[0]])
            if env in ports:
                found[env] = tuple(b.param_of[n].path for n in names)
        return found

    def _call(self, routine: Routine, bucket: int | None = None) -> Call:
        ports = [self._env(p.name) for p in routine.inputs]
        return Call(self.build_.module(routine, bucket), tuple(ports), tuple(self._env(p.name) for p in routine.outputs), routine.label)

    def _role(self, env: str) -> str:
        name = env.split("|")[0]
        return self.build_.graph.values[name].role if name in self.build_.graph.values else ""

    def _env(self, port: str) -> str:
        """The environment's name of a routine's port."""
        name = port.split("|")[0]
        role = self._role(port)
        if role == "constant":
            return name
        if role == "buffer":
            return f"buffer:{self.build_.graph.values[name].path}"
        if role == "param" and port == value_name(name, self.build_.plan.storage[name]):
            return f"param:{self.build_.graph.values[name].path}"
        return port

    def _inputs(self, ports: Mapping[str, Port]) -> dict[str, InputSlice]:
        b = self.build_
        found = {}
        for env in ports:
            if self._role(env) != "input":
                continue
            name = env.split("|")[0]
            source, time = b.split.inputs[name]
            whole = b.captured.graph.values[source].tensor
            layout = b.held[name]
            chains = []
            for d in range(len(whole.shape)):
                chain: list[tuple[str, Any]] = [("mb", time.cut)] if time.kind == "S" and time.dim == d else []
                chain += [(INNER[a], t.cut) for a, t in enumerate(layout) if t.kind == "S" and t.dim == d and b.sizes[a] > 1]
                chains.append(tuple(chain))
            found[env] = InputSlice(source, whole, tuple(chains), time.kind == "S")
        return found

    def _params(self, uses: Mapping[str, Any]) -> dict[str, Slot]:
        b = self.build_
        used_anywhere = {n for s in range(b.plan.stages) for n in b.uses(s)} if self.stage == 0 else set()
        found = {}
        for name, v in b.param_of.items():
            if name in uses or (self.stage == 0 and name not in used_anywhere):
                found[v.path] = self._slot(name, b.plan.storage[name])
        return found

    def _slot(self, name: str, layout: Layout) -> Slot:
        b, v = self.build_, self.build_.graph.values[name]
        return Slot(v.path, v.tensor, layout, v.grad, b.sizes, self.part.coords)

    def _tied(self, uses: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Parameters that several stages use: the ranks that hold the same shard."""
        b = self.build_
        if b.plan.stages == 1:
            return {}
        found = {}
        for name in uses:
            stages = [s for s in range(b.plan.stages) if name in b.uses(s)]
            if len(stages) > 1:
                found[b.param_of[name].path] = tuple(b.plan.mesh.rank({**self.coords, "pp": s}) for s in stages)
        return found
