"""search(graph, cluster) → Plan: every mesh shape and microbatch count, placements exact within each, the fastest that fits.

In order: list the candidates (pp × dp × tp, microbatches); for each (dp, tp, microbatches) solve the placements once
(`placement.choose`); cut the chain of blocks into stages (`stages.balance`); play the instruction list (`simulate`); keep the
fastest whose memory fits. What was looked at and lost is in `Plan.runners_up`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NoPlanError
from ..layout import I, Layout, R, S, Type, local_shape
from ..mesh import Mesh
from ..trace.blocks import Block, find_blocks
from ..trace.graph import Graph, Tensor
from . import schedules
from .cluster import Cluster
from .costs.memory import FRAGMENTATION
from .microbatch import NotSplittable, TimeSplit, split_time
from .placement import Placements, Space, choose
from .plan import Plan, fingerprint
from .prices import Prices, RandomPrices
from .simulate import simulate
from .solve import TooWide
from .stages import Costs, balance, crossings

PINS = ("schedule", "cuts", "zero", "storage", "ops", "divide")
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)


def search(
    graph: Graph,
    cluster: Cluster | None = None,
    mesh: Mapping[str, int] | Mesh | None = None,
    microbatches: int | None = None,
    pins: Mapping[str, Any] | None = None,
    memory: float | None = None,
) -> Plan:
    """The fastest plan under the cost model.

    `mesh` pins the degrees (otherwise every split of the cluster's ranks is tried), `microbatches` their count. `pins`:
    "schedule" (gpipe, 1f1b), "cuts" (first block of each stage), "zero" (bool: store what dp replicates in shards),
    "storage" (parameter path → type on tp, as text), "ops" (op → strategy on tp, as text), "divide" (bool: divide parameters and
    matmuls over tp wherever that is possible, whatever it costs; the default where `mesh` is given). `memory`: bytes per rank.
    Raises NoPlanError with every candidate's reason.
    """
    pins = dict(pins or {})
    unknown = set(pins) - set(PINS)
    if unknown:
        raise NoPlanError(f"unknown pin {sorted(unknown)[0]!r}", hint=f"pins are {', '.join(PINS)}")
    if isinstance(mesh, Mesh):
        mesh = dict(zip(mesh.names, mesh.sizes, strict=True))
    wanted = Mesh.of(mesh) if mesh is not None else None
    cluster = cluster or Cluster.local(wanted.ranks if wanted else 1)
    meshes = [wanted] if wanted else list(_meshes(cluster.ranks, graph))
    limit = memory or cluster.device.usable
    searcher = _Search(graph, cluster, pins, limit, pinned=wanted is not None)
    found: list[tuple[float, Plan]] = []
    refused: list[str] = []
    for shape in meshes:
        counts, note = searcher.counts(shape, microbatches)
        for count in counts:
            try:
                plan = searcher.candidate(shape, count)
            except (NoPlanError, TooWide) as error:
                refused.append(f"{shape} × {count} microbatches: {error}")
                continue
            plan.notes += note
            found.append((plan.predicted["step_seconds"], plan))
    if not found:
        raise NoPlanError("no plan fits:\n  " + "\n  ".join(refused or ["nothing to try"]))
    found.sort(key=lambda f: f[0])
    best = found[0][1]
    best.runners_up = [
        {"mesh": str(p.mesh), "microbatches": p.microbatches, "step_seconds": t, "memory_bytes": max(p.predicted["memory_bytes"])}
        for t, p in found[1:9]
    ]
    return best


def random_plan(graph: Graph, mesh: Mapping[str, int], microbatches: int = 1, seed: int = 0) -> Plan:
    """A legal plan with random placements, storage, cuts and schedule, for tests. Raises NoPlanError."""
    shape = Mesh.of(mesh)
    rng = np.random.default_rng(seed)
    pins = {"schedule": str(rng.choice(["gpipe", "1f1b"])), "zero": bool(rng.integers(2))}
    searcher = _Search(graph, Cluster.local(shape.ranks), pins, math.inf, seed)
    counts, note = searcher.counts(shape, microbatches)
    plan = searcher.candidate(shape, counts[0])
    plan.notes += note
    return plan


def _meshes(ranks: int, graph: Graph) -> list[Mesh]:
    found = []
    batch = max((v.tensor.shape[v.batch_dim] for v in graph.sources("input") if v.batch_dim is not None), default=1)
    for pp, tp in itertools.product(_divisors(ranks), repeat=2):
        if ranks % (pp * tp) == 0 and ranks // (pp * tp) <= batch:
            found.append(Mesh.of({"pp": pp, "dp": ranks // (pp * tp), "tp": tp}))
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass
class _Inner:
    """What (dp, tp, microbatches) decides, whatever the pipeline."""

    split: TimeSplit
    blocks: list[Block]
    placed: Placements
    costs: Costs
    prices: Prices | RandomPrices


class _Search:
    def __init__(
        self, graph: Graph, cluster: Cluster, pins: Mapping[str, Any], limit: float, seed: int | None = None, pinned: bool = False
    ) -> None:
        self.graph, self.cluster, self.pins, self.limit, self.seed, self.pinned = graph, cluster, pins, limit, seed, pinned
        self.splits: dict[int, TimeSplit | NotSplittable] = {}
        self.inner: dict[tuple[int, int, int], _Inner] = {}
        self.fingerprint = fingerprint(graph)

    def split(self, count: int) -> TimeSplit | NotSplittable:
        if count not in self.splits:
            try:
                self.splits[count] = split_time(self.graph, count)
            except NotSplittable as error:
                self.splits[count] = error
        return self.splits[count]

    def counts(self, mesh: Mesh, wanted: int | None) -> tuple[list[int], list[str]]:
        """Microbatch counts to try, and what to say about them."""
        if wanted is not None:
            found = self.split(wanted)
            if isinstance(found, NotSplittable):
                return [1], [f"one microbatch instead of {wanted}: {found}"]
            return [wanted], []
        if mesh.size("pp") == 1:
            tries: Sequence[int] = (1, 2, 4, 8)
        else:
            tries = MICROBATCHES
        dp = mesh.size("dp")
        batch = max((v.tensor.shape[v.batch_dim] for v in self.graph.sources("input") if v.batch_dim is not None), default=1)
        good = [n for n in tries if n == 1 or (batch % (n * dp) == 0 and not isinstance(self.split(n), NotSplittable))]
        return good, []

    def solve(self, mesh: Mesh, count: int) -> _Inner:
        key = (mesh.size("dp"), mesh.size("tp"), count)
        if key in self.inner and self.seed is None:
            return self.inner[key]
        split = self.split(count)
        assert not isinstance(split, NotSplittable)
        blocks = find_blocks(split.graph, split.once | split.data)
        space = Space(split, key[:2])
        self._pin(space)
        divide = bool(self.pins.get("divide", self.pinned))
        prices = RandomPrices(self.seed) if self.seed is not None else Prices(self.cluster, mesh, count, divide)
        if self.seed is not None:
            _thin(space, self.seed)
        roots: dict[str, Layout] = {n: (I, I) if split.graph.values[n].grad else (R, R) for n in split.graph.roots}
        placed = choose(space, prices, blocks, roots, fold=self.seed is None)
        if not math.isfinite(placed.seconds):
            raise NoPlanError("no placement is legal under the pins")
        if self.pins.get("zero", True):
            _shard_storage(space, placed)
        honest = prices if isinstance(prices, RandomPrices) else Prices(self.cluster, mesh, count)
        costs = self._costs(space, blocks, placed, honest)
        self.inner[key] = _Inner(split, blocks, placed, costs, honest)
        return self.inner[key]

    def _pin(self, space: Space) -> None:
        for path, text in dict(self.pins.get("storage", {})).items():
            value = next((v for v in space.split.graph.sources("param") if v.path == path), None)
            if value is None:
                raise NoPlanError(f"a pin names parameter {path!r}, which the model doesn't have")
            wanted = Type.parse(text)
            space.storage[value.name] = [s for s in space.storage[value.name] if s[1] == wanted]
            if not space.storage[value.name]:
                raise NoPlanError(f"parameter {path} can't be stored as {text} on tp={space.sizes[1]}")
        for name, text in dict(self.pins.get("ops", {})).items():
            if name not in space.domains:
                raise NoPlanError(f"a pin names op {name!r}, which the graph doesn't have (or which depends on data alone)")
            space.domains[name] = [pair for pair in space.domains[name] if str(pair[1]) == text]
            if not space.domains[name]:
                raise NoPlanError(f"op {name} can't run as {text} on tp={space.sizes[1]}")

    def _costs(self, space: Space, blocks: Sequence[Block], placed: Placements, prices: Prices | RandomPrices) -> Costs:
        graph = space.split.graph
        ops = {op.name: op for op in graph.ops}
        held = dict(space.held)
        for name, pair in placed.ops.items():
            for i, out in enumerate(ops[name].outs):
                held[out] = tuple(s.outs[i] for s in pair)
        if isinstance(prices, RandomPrices):
            return Costs(prices.random.random(len(blocks)), np.zeros(len(blocks)), np.zeros(len(blocks)))
        seconds, fixed, saved = np.zeros(len(blocks)), np.zeros(len(blocks)), np.zeros(len(blocks))
        charged: set[str] = set()
        for i, block in enumerate(blocks):
            for name in block.ops:
                op, pair = ops[name], placed.ops[name]
                seconds[i] += prices.op(op, space.rules[name], graph, [pair], space.sizes)[0]
                for j, operand in enumerate(op.inputs):
                    v, want = graph.values[operand], tuple(s.ins[j] for s in pair)
                    if v.role == "param":
                        if operand not in charged:
                            charged.add(operand)
                            fixed[i] += _param_bytes(v.tensor, placed.storage[operand], want, space.sizes, v.grad)
                    elif held[operand] != want:
                        seconds[i] += prices.move(v.tensor, held[operand], want, space.sizes, v.grad)
                for out in op.outs:
                    if graph.values[out].grad or op.target.startswith("autoshard"):
                        local = local_shape(graph.values[out].tensor.shape, held[out], space.sizes, (0, 0))
                        saved[i] += Tensor(local, graph.values[out].tensor.dtype).bytes * _kept(op.target)
        return Costs(seconds, fixed, saved * FRAGMENTATION)

    def candidate(self, mesh: Mesh, count: int) -> Plan:
        inner = self.solve(mesh, count)
        stages = mesh.size("pp")
        if stages > len(inner.blocks):
            raise NoPlanError(f"{stages} stages, but the model has only {len(inner.blocks)} blocks to divide")
        schedule = self.pins.get("schedule", "1f1b")
        in_flight = [count if schedule == "gpipe" else min(count, stages - s) for s in range(stages)]
        cuts = self._cuts(inner, stages, in_flight)
        crossing = crossings(inner.split, inner.blocks, cuts)
        graph = inner.split.graph
        grads = [e for e, names in crossing.items() if any(graph.values[n].grad for n in names)]
        lists = schedules.build(schedule, stages, count, list(crossing), grads)
        schedules.check(lists, list(crossing), grads)
        return Plan(
            self.fingerprint, mesh, count, schedule, cuts, inner.placed.ops, inner.placed.storage, inner.placed.inputs, lists,
            self._predict(inner, mesh, count, cuts, lists, crossing, in_flight), list(graph.notes),
        )  # fmt: skip

    def _cuts(self, inner: _Inner, stages: int, in_flight: Sequence[int]) -> tuple[int, ...]:
        if "cuts" in self.pins:
            cuts = tuple(self.pins["cuts"])
            if len(cuts) != stages or cuts[0] != 0 or list(cuts) != sorted(set(cuts)) or cuts[-1] >= len(inner.blocks):
                raise NoPlanError(f"cuts {cuts} don't make {stages} stages of {len(inner.blocks)} blocks")
            return cuts
        cuts_found = balance(inner.costs, stages, in_flight, self.limit)
        if cuts_found is None:
            needed = inner.costs.fixed.sum() + max(in_flight) * inner.costs.saved.sum()
            raise NoPlanError(f"out of memory: about {needed / stages / 2**30:.1f} GiB a rank, {self.limit / 2**30:.1f} GiB are there")
        return cuts_found

    def _predict(
        self, inner: _Inner, mesh: Mesh, count: int, cuts: tuple[int, ...], lists: schedules.Lists,
        crossing: Mapping[tuple[int, int], tuple[str, ...]], in_flight: Sequence[int],
    ) -> dict[str, Any]:  # fmt: skip
        if isinstance(inner.prices, RandomPrices):
            return {"step_seconds": 0.0, "memory_bytes": [0] * len(cuts)}
        ends = [*cuts[1:], len(inner.blocks)]
        seconds = [float(inner.costs.seconds[a:b].sum()) for a, b in zip(cuts, ends, strict=True)]
        memory = [
            float(inner.costs.fixed[a:b].sum() + n * inner.costs.saved[a:b].sum()) for a, b, n in zip(cuts, ends, in_flight, strict=True)
        ]
        graph = inner.split.graph
        edges = {
            e: sum(inner.prices.send(graph.values[n].tensor.bytes / (mesh.size("dp") * 1.0)) for n in names)
            for e, names in crossing.items()
        }
        durations: dict[tuple[int, str], float] = {}
        for stage, t in enumerate(seconds):
            durations |= {(stage, "F"): t / 3, (stage, "B"): t * 2 / 3, (stage, "I"): t / 3, (stage, "W"): t / 3}
        played = simulate(lists, durations, edges)
        once = self._once(inner, mesh, cuts)
        return {
            "step_seconds": float(played.step_seconds + once),
            "memory_bytes": [int(m) for m in memory],
            "breakdown": {
                "compute_and_tp_seconds": [s * count for s in seconds],
                "parameters_and_gradients_seconds": float(once),
                "bubble_fraction": float(played.bubble),
            },
        }

    def _once(self, inner: _Inner, mesh: Mesh, cuts: tuple[int, ...]) -> float:
        """Gathering parameters, reducing gradients, the optimizer: of the largest stage."""
        graph, placed, prices = inner.split.graph, inner.placed, inner.prices
        assert isinstance(prices, Prices)
        ends = [*cuts[1:], len(inner.blocks)]
        ops = {op.name: op for op in graph.ops}
        worst = 0.0
        sizes = (mesh.size("dp"), mesh.size("tp"))
        for a, b in zip(cuts, ends, strict=True):
            seen: set[tuple[str, Layout]] = set()
            total = 0.0
            for block in inner.blocks[a:b]:
                for name in block.ops:
                    for j, operand in enumerate(ops[name].inputs):
                        v = graph.values[operand]
                        want = tuple(s.ins[j] for s in placed.ops[name])
                        if v.role == "param" and (operand, want) not in seen:
                            seen.add((operand, want))
                            total += prices.move(v.tensor, placed.storage[operand], want, sizes, v.grad)
                            total += float(prices.stored(v.tensor, [placed.storage[operand]], sizes, v.grad)[0])
            worst = max(worst, total)
        return worst


def _kept(target: str) -> float:
    """The part of an op's output that backward keeps: views are free, pointwise chains keep about half."""
    name = target.split(".")[1]
    if name in ("reshape", "permute", "expand", "slice", "split_with_sizes", "detach", "add", "sub", "neg", "sum", "mean"):
        return 0.0
    return 1.0


def _param_bytes(tensor: Tensor, storage: Layout, use: Layout, sizes: tuple[int, ...], trainable: bool) -> float:
    """Stored parameter, its gradient, two moments and a master where it is half; and the copy as used."""
    stored = math.prod(local_shape(tensor.shape, storage, sizes, (0,) * len(sizes)))
    used = math.prod(local_shape(tensor.shape, use, sizes, (0,) * len(sizes)))
    size = tensor.bytes / max(tensor.numel, 1)
    if not trainable:
        return stored * size
    state = 8 + (4 if size < 4 else 0) if size <= 4 else 2 * size
    return stored * (2 * size + state) + (2 * used * size if used > stored else 0)


def _thin(space: Space, seed: int) -> None:
    """Keep random tables small: at most 14 strategies an op, the whole ones always among them."""
    rng = np.random.default_rng(seed + 1)
    for name, domain in space.domains.items():
        if len(domain) > 14:
            base = [p for p in domain if all(t.kind in "IR" for s in p for t in (*s.ins, *s.outs))]
            batch = [p for p in domain if p[0].body == "" and any(t.kind == "S" for t in (*p[0].ins, *p[0].outs))]
            rest = [domain[i] for i in rng.permutation(len(domain))]
            space.domains[name] = list(dict.fromkeys([*base[:4], *batch[:3], *rest]))[:14]


def _shard_storage(space: Space, placed: Placements) -> None:
    """Where dp replicates a parameter that isn't tiny, store a shard of it on each rank (ZeRO; Rajbhandari et al., 2020)."""
    dp = space.sizes[0]
    if dp == 1:
        return
    graph = space.split.graph
    total = sum(v.tensor.bytes for v in graph.sources("param"))
    for v in graph.sources("param"):
        layout = placed.storage[v.name]
        if layout[0].kind == "S" or v.tensor.bytes < total * 0.002:
            continue
        free = [d for d, n in enumerate(v.tensor.shape) if n >= dp and not (layout[1].kind == "S" and layout[1].dim == d)]
        if free:
            even = [d for d in free if v.tensor.shape[d] % dp == 0]
            placed.storage[v.name] = (S((even or free)[0]), *layout[1:])


__all__ = ["Cluster", "random_plan", "search"]
