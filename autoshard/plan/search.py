"""search(graph, cluster) → Plan: every mesh shape and microbatch count, placements exact within each, the fastest that fits.

In order: fold the layers that are alike (`fold`); for each candidate (pp × dp × tp, microbatches) choose placements (`placement.choose`),
estimate what they cost (`estimate`), cut the chain of blocks into stages (`stages.balance`), play the instruction list (`simulate`); keep
the fastest whose memory fits. Cutting the batch finer can't make a microbatch's work cheaper in sum, so what a coarse count costs bounds
all finer ones, and candidates that can't win any more are not solved. What was looked at and lost, and why, is in `Plan.runners_up`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NoPlanError
from ..layout import I, Layout, R, S, Type
from ..mesh import Mesh
from ..trace.blocks import Block, find_blocks
from ..trace.graph import Graph, Op
from ..trace.ops.table import TABLE
from . import buckets, merge, schedules
from .cluster import Cluster
from .estimate import BlockCosts, block_costs, kinds
from .fold import Folded, fold
from .microbatch import NotSplittable, TimeSplit, prune, split_time
from .placement import Placements, Space, choose, fix_data
from .plan import Plan, fingerprint
from .prices import Prices, RandomPrices, flops
from .simulate import simulate
from .solve import TooWide
from .stages import balance, crossings
from .whole import Chain, Unlike, spread

PINS = ("schedule", "cuts", "zero", "storage", "ops", "divide", "merge", "buckets", "kernels")
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


FRUGAL = 1e-9
"""Seconds a step that a byte of a parameter as used counts for, where the fastest placements don't fit: what divides it then wins."""
RUNNERS = 24
"""Candidates that lost and are kept in the plan."""


def search(
    graph: Graph,
    cluster: Cluster | None = None,
    mesh: Mapping[str, int] | Mesh | None = None,
    microbatches: int | None = None,
    pins: Mapping[str, Any] | None = None,
    memory: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """The fastest plan under the cost model.

    `mesh` pins the degrees (otherwise every split of the cluster's ranks is tried), `microbatches` their count. `pins`:
    "schedule" (gpipe, 1f1b), "cuts" (first block of each stage), "zero" (bool: store what dp replicates in shards),
    "storage" (parameter path → type on tp, as text), "ops" (op → strategy on tp, as text), "divide" (bool: divide parameters and
    matmuls over tp wherever that is possible, whatever it costs; the default where `mesh` is given), "merge" (linears of one input
    as one matmul: all that may be, none, or lists of their weights' paths), "buckets" (bytes of parameters, as used, that travel
    together; 0: each alone), "kernels" (names: put these where the model computes what they do). `memory`: bytes per rank.
    `progress` is told what is being looked at. Raises NoPlanError with the reasons of the nearest candidates; `candidates` has all.
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
    # a pin may name what folding leaves out
    folding = not any(pins.get(p) for p in ("storage", "ops")) and isinstance(pins.get("merge", True), bool)
    hold, refused = 0.0, None
    while True:
        searcher = _Search(graph, cluster, pins, limit, pinned=wanted is not None, folding=folding, hold=hold)
        try:
            return _Race(searcher, meshes, microbatches, progress or (lambda _: None)).run()
        except Unlike:
            folding = False
        except NoPlanError as error:
            if hold or not error.short:
                raise refused or error from None
            hold, refused = FRUGAL, error


@dataclass
class _Bound:
    """What a candidate found out about its mesh: seconds in all stages together, a whole step; those of the loop among them."""

    count: int
    total: float
    loop: float


class _Race:
    """Candidates in the order of their lower bounds, until none can win.

    Of each mesh the finest count comes first: if that doesn't fit, no other does (a microbatch holds less, and no more of them are in
    flight than there are stages). Then the coarsest, which bounds the time of all others.
    """

    def __init__(self, searcher: _Search, meshes: Sequence[Mesh], microbatches: int | None, progress: Callable[[str], None]) -> None:
        self.searcher, self.meshes, self.progress = searcher, meshes, progress
        self.bounds: list[list[_Bound]] = [[] for _ in meshes]
        self.tries = [searcher.counts(shape, microbatches) for shape in meshes]
        self.too_large = [0] * len(meshes)  # the finest count that is known not to fit
        self.found: list[tuple[float, int, int, _Candidate]] = []
        self.lost: list[dict[str, Any]] = []
        self.best = math.inf

    def run(self) -> Plan:
        queue: list[tuple[float, int, int]] = []
        for m, (counts, _) in enumerate(self.tries):
            self.attempt(m, counts[-1])
            if self.too_large[m] < counts[-1] and len(counts) > 1:
                self.attempt(m, counts[0])
                queue += [(self.bound(m, count), m, count) for count in counts[1:-1]]
        heapq.heapify(queue)
        while queue:
            bound, m, count = heapq.heappop(queue)
            now = self.bound(m, count)
            if now > self.best:
                queue.append((now, m, count))
                break
            if now > bound:
                heapq.heappush(queue, (now, m, count))
            elif count > self.too_large[m]:
                self.attempt(m, count)
        return self.result([entry for entry in queue if entry[2] > self.too_large[entry[1]]])

    def bound(self, m: int, count: int) -> float:
        """Seconds that a step can't be shorter than: the work of a coarser count, in even stages, and the bubble of this one."""
        pp, best = self.meshes[m].size("pp"), 0.0
        for known in self.bounds[m]:
            if count % known.count == 0 and not self.searcher.pinned:
                best = max(best, (known.total + known.loop * (pp - 1) / count) / pp)
        return best

    def attempt(self, m: int, count: int) -> None:
        """Solve one candidate and note what comes of it."""
        shape = self.meshes[m]
        row: dict[str, Any] = {"mesh": str(shape), "microbatches": count}
        self.progress(f"{shape} × {count}" + (f", best so far {self.best:.4g} s a step" if self.best < math.inf else ""))
        try:
            found = self.searcher.candidate(shape, count)
        except TooWide as error:
            self.lost.append({**row, "reason": f"too many placements to choose from: {error}", "fits": False})
        except _Refused as error:
            if error.bound:
                self.bounds[m].append(error.bound)
            self.too_large[m] = max(self.too_large[m], count)
            self.lost.append({**row, **error.facts, "reason": error.reason, "fits": False})
        except NoPlanError as error:
            self.lost.append({**row, "reason": str(error), "fits": False})
        else:
            self.bounds[m].append(found.bound)
            self.found.append((found.seconds, m, count, found))
            self.best = min(self.best, found.seconds)

    def result(self, left: Sequence[tuple[float, int, int]]) -> Plan:
        self.lost.sort(key=lambda row: row.get("missing_bytes", math.inf))
        if not self.found:
            raise self.nothing()
        self.found.sort(key=lambda f: f[:3])
        best, m, _, winner = self.found[0]
        plan = self.searcher.plan(winner)
        plan.notes += self.tries[m][1]
        rows = [
            {"mesh": str(f.mesh), "microbatches": f.count, "step_seconds": t, "memory_bytes": f.memory,
             "reason": f"{100 * (t / best - 1):.1f} % slower" if t > best else "as fast; the first found was taken", "fits": True}
            for t, _, _, f in self.found[1:]
        ]  # fmt: skip
        unsolved: dict[int, tuple[float, int]] = {}
        for bound, at, count in left:
            unsolved[at] = min(unsolved.get(at, (math.inf, 0)), (max(bound, self.bound(at, count)), count))
        bounded = [
            {"mesh": str(self.meshes[at]), "microbatches": count, "at_least_seconds": bound,
             "reason": f"at least {100 * (bound / best - 1):.1f} % slower, so not solved", "fits": None}
            for at, (bound, count) in sorted(unsolved.items(), key=lambda u: u[1])
        ]  # fmt: skip
        plan.runners_up = rows[:RUNNERS] + bounded[: RUNNERS // 2] + self.lost[: RUNNERS // 2]
        return plan

    def nothing(self) -> NoPlanError:
        lines = [f"{row['mesh']} × {row['microbatches']} microbatches: {row['reason']}" for row in self.lost]
        more = f"\n  and {len(lines) - 6} more" if len(lines) > 7 else ""
        missing = next((row["missing_bytes"] for row in self.lost if "missing_bytes" in row), None)
        near = f": the nearest needs {_gib(missing)} more than the {_gib(self.searcher.limit)} of a rank" if missing else ""
        hint = "more ranks, a shorter sequence or a smaller batch need less memory" if missing else ""
        error = NoPlanError(f"no plan fits{near}:\n  " + "\n  ".join(lines[: 6 if more else 7] or ["nothing to try"]) + more, hint=hint)
        error.short = missing is not None
        error.candidates = self.lost
        return error


def random_plan(graph: Graph, mesh: Mapping[str, int], microbatches: int = 1, seed: int = 0) -> Plan:
    """A legal plan with random placements, storage, cuts and schedule, for tests. Raises NoPlanError."""
    shape = Mesh.of(mesh)
    rng = np.random.default_rng(seed)
    pins = {"schedule": str(rng.choice(["gpipe", "1f1b"])), "zero": bool(rng.integers(2))}
    searcher = _Search(graph, Cluster.local(shape.ranks), pins, math.inf, seed)
    counts, note = searcher.counts(shape, microbatches)
    plan = searcher.plan(searcher.candidate(shape, counts[0]))
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


class _Refused(NoPlanError):
    """A candidate that can't be; `facts` are for its row."""

    def __init__(self, reason: str, bound: _Bound | None = None, **facts: Any) -> None:
        super().__init__(reason)
        self.reason, self.bound, self.facts = reason, bound, facts


@dataclass
class _Inner:
    """What (dp, tp, microbatches) decides, whatever the pipeline. `chain`: the whole model's blocks; `costs`: of each of them."""

    split: TimeSplit
    blocks: list[Block]
    placed: Placements
    space: Space
    prices: Prices | RandomPrices
    chain: Chain
    short: BlockCosts | None = None
    costs: BlockCosts | None = None


@dataclass
class _Candidate:
    """A mesh and a microbatch count that can be: where it is cut, and what it is predicted to take."""

    mesh: Mesh
    count: int
    schedule: str
    cuts: tuple[int, ...]
    inner: _Inner
    bound: _Bound
    predicted: dict[str, Any]

    @property
    def seconds(self) -> float:
        return float(self.predicted["step_seconds"])

    @property
    def memory(self) -> int:
        return int(max(self.predicted["memory_bytes"]))


class _Search:
    def __init__(
        self, graph: Graph, cluster: Cluster, pins: Mapping[str, Any], limit: float, seed: int | None = None, pinned: bool = False,
        folding: bool = False, hold: float = 0.0,
    ) -> None:  # fmt: skip
        self.hold = hold
        self.graph, self.cluster, self.pins, self.limit, self.seed, self.pinned = graph, cluster, pins, limit, seed, pinned
        self.folded = fold(graph) if folding else Folded(prune(graph))
        self.splits: dict[int, TimeSplit | NotSplittable] = {}
        self.inner: dict[tuple[int, int, int], _Inner] = {}
        self.fingerprint = fingerprint(graph)
        self.flops = 3 * sum(flops(op, graph.values) for op in graph.ops)
        self.small = min(0.002 * sum(v.tensor.bytes for v in graph.sources("param")), 2.0**20)

    def split(self, count: int) -> TimeSplit | NotSplittable:
        if count not in self.splits:
            try:
                self.splits[count] = split_time(self.folded.graph, count)
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
        dp = mesh.size("dp")
        batch = max((v.tensor.shape[v.batch_dim] for v in self.graph.sources("input") if v.batch_dim is not None), default=1)
        good = [n for n in MICROBATCHES if n == 1 or (batch % (n * dp) == 0 and not isinstance(self.split(n), NotSplittable))]
        return good, []

    def solve(self, mesh: Mesh, count: int) -> _Inner:
        key = (mesh.size("dp"), mesh.size("tp"), count)
        if key in self.inner and self.seed is None:
            return self.inner[key]
        split = self.split(count)
        assert not isinstance(split, NotSplittable)
        blocks = find_blocks(split.graph, split.once | split.data)
        space = Space(split, key[:2], weight=self.folded.weight, alike=self.folded.tied)
        self._pin(space)
        divide = bool(self.pins.get("divide", self.pinned))
        prices = RandomPrices(self.seed) if self.seed is not None else Prices(self.cluster, mesh, count, divide, self.hold / count)
        if self.seed is not None:
            _thin(space, self.seed)
        roots: dict[str, Layout] = {n: (I, I) if split.graph.values[n].grad else (R, R) for n in split.graph.roots}
        placed = choose(space, prices, blocks, roots, fold=self.seed is None)
        if not math.isfinite(placed.seconds):
            raise NoPlanError("no placement is legal under the pins")
        if self.pins.get("zero", True):
            shard_storage(space.split.graph, space.sizes, placed.storage, self.small)
        chain = Chain.of(split, blocks, self.folded, _held(space, placed), space.sizes)
        inner = self.inner[key] = _Inner(split, blocks, placed, space, prices, chain)
        if isinstance(prices, Prices):
            honest = inner.prices = Prices(self.cluster, mesh, count)
            inner.short = block_costs(space, blocks, placed, honest)
            buckets.credit(
                inner.short.once, split.graph, blocks, placed, honest, space.sizes, int(self.pins.get("buckets", buckets.BUCKET))
            )
            merge.credit(inner.short.compute, split.graph, blocks, placed, honest, space.sizes, self.pins.get("merge"))
            inner.costs = inner.short.spread(chain.like)
        else:
            inner.costs = BlockCosts.random(prices.random.random(len(blocks)))
        return inner

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

    def candidate(self, mesh: Mesh, count: int) -> _Candidate:
        stages = mesh.size("pp")
        schedule = self.pins.get("schedule", "1f1b")
        in_flight = [count if schedule == "gpipe" else min(count, stages - s) for s in range(stages)]
        if not self.pinned:
            self._least(mesh)
        inner = self.solve(mesh, count)
        blocks = len(inner.chain.like)
        if stages > blocks:
            raise _Refused(f"{stages} stages, but the model has only {blocks} blocks to divide")
        assert inner.costs is not None
        loop = float(inner.costs.seconds.sum()) * count
        bound = _Bound(count, loop + float(inner.costs.once.sum()), loop)
        room = self.limit
        for _ in range(2):  # where to cut decides what is sent, and its buffers need room too
            cuts = self._cuts(inner.costs, stages, in_flight, bound, room)
            found = _Candidate(mesh, count, schedule, cuts, inner, bound, self._predict(inner, mesh, count, cuts, schedule, in_flight))
            missing = found.memory - self.limit
            if missing <= 0 or "cuts" in self.pins:
                return found
            room = self.limit - missing
        raise _Refused(
            f"out of memory: needs {_gib(found.memory)} a rank, {_gib(missing)} more than the {_gib(self.limit)} that are there", bound,
            memory_bytes=found.memory, missing_bytes=int(missing),
        )  # fmt: skip

    def _least(self, mesh: Mesh) -> None:
        """Refuse a mesh on which even evenly divided parameters and gradients, as the loop uses them, are too large."""
        size = 2 * sum(v.tensor.bytes for v in self.graph.sources("param") if v.grad) / (mesh.size("pp") * mesh.size("tp"))
        if size > self.limit:
            raise _Refused(
                f"out of memory: parameters and gradients alone need {_gib(size)} a rank, {_gib(size - self.limit)} more than the"
                f" {_gib(self.limit)} that are there", memory_bytes=int(size), missing_bytes=int(size - self.limit),
            )  # fmt: skip

    def _pinned_cuts(self, blocks: int, stages: int) -> tuple[int, ...]:
        cuts = tuple(self.pins["cuts"])
        if len(cuts) != stages or cuts[0] != 0 or list(cuts) != sorted(set(cuts)) or cuts[-1] >= blocks:
            raise NoPlanError(f"cuts {cuts} don't make {stages} stages of {blocks} blocks")
        return cuts

    def _cuts(self, costs: BlockCosts, stages: int, in_flight: Sequence[int], bound: _Bound, room: float) -> tuple[int, ...]:
        if "cuts" in self.pins:
            return self._pinned_cuts(len(costs.seconds), stages)
        found, least = balance(costs.for_stages(), stages, in_flight, room)
        if found is None:
            missing = int(least - self.limit)
            reason = f"needs {_gib(least)} a rank, {_gib(missing)} more than the {_gib(self.limit)} that are there"
            raise _Refused(f"out of memory: {reason}", bound, memory_bytes=int(least), missing_bytes=missing)
        return found

    def _predict(
        self, inner: _Inner, mesh: Mesh, count: int, cuts: tuple[int, ...], schedule: str, in_flight: Sequence[int]
    ) -> dict[str, Any]:
        costs, prices = inner.costs, inner.prices
        if isinstance(prices, RandomPrices):
            return {"step_seconds": 0.0, "memory_bytes": [0] * len(cuts)}
        assert costs is not None
        ends = [*cuts[1:], len(costs.seconds)]
        crossing = inner.chain.crossings(cuts)
        edges = {e: sum(prices.send(x.bytes) for x in values) for e, values in crossing.items()}
        grads = [e for e, values in crossing.items() if any(x.grad for x in values)]
        lists = schedules.build(schedule, len(cuts), count, list(crossing), grads)
        durations: dict[tuple[int, str], float] = {}
        seconds = [float(costs.seconds[a:b].sum()) for a, b in zip(cuts, ends, strict=True)]
        for stage, t in enumerate(seconds):
            durations |= {(stage, "F"): t / 3, (stage, "B"): t * 2 / 3, (stage, "I"): t / 3, (stage, "W"): t / 3}
        played = simulate(lists, durations, edges)
        once = [float(costs.once[a:b].sum()) for a, b in zip(cuts, ends, strict=True)]
        step = float(played.step_seconds + max(once))
        stages: list[dict[str, Any]] = []
        for s, (a, b) in enumerate(zip(cuts, ends, strict=True)):
            messages = 2.0 * sum(x.bytes for e, values in crossing.items() if s in e for x in values)
            stages.append(
                {
                    "blocks": [a, b],
                    "compute_seconds": float(costs.compute[a:b].sum()) * count,
                    "communication_seconds": float(costs.communication[a:b].sum()) * count,
                    "pipeline_seconds": float(sum(t for e, t in edges.items() if s in e)) * count,
                    "bubble_seconds": float(played.step_seconds - played.busy[s]),
                    "parameters_seconds": once[s],
                    "in_flight": in_flight[s],
                    "memory": costs.memory(a, b, in_flight[s], messages),
                }
            )
        peak = self.cluster.ranks and mesh.ranks * self.cluster.device.peak_flops(self._dtype())
        return {
            "step_seconds": step,
            "memory_bytes": [int(stage["memory"]["total"]) for stage in stages],
            "memory_limit_bytes": int(self.limit) if math.isfinite(self.limit) else 0,
            "mfu": self.flops / (step * peak) if step and peak else 0.0,
            "breakdown": {
                "compute_and_tp_seconds": [s * count for s in seconds],
                "parameters_and_gradients_seconds": max(once),
                "bubble_fraction": float(played.bubble),
            },
            "stages": stages,
        }

    def _dtype(self) -> str:
        """That of the most parameters."""
        sizes: dict[str, int] = {}
        for v in self.graph.sources("param"):
            sizes[v.tensor.dtype] = sizes.get(v.tensor.dtype, 0) + v.tensor.numel
        return max(sizes, key=sizes.__getitem__, default="float32")

    def plan(self, found: _Candidate) -> Plan:
        """The plan of a candidate, for the whole graph. Raises Unlike if folding took for equal what isn't."""
        inner, mesh = found.inner, found.mesh
        split, blocks, placed = inner.split, inner.blocks, inner.placed
        if self.folded.runs:
            whole = split_time(self.graph, found.count)
            blocks = find_blocks(whole.graph, whole.once | whole.data)
            placed = spread(split, inner.blocks, placed, whole, blocks, inner.chain.like, fix_data(whole, inner.space.sizes))
            if self.pins.get("zero", True):
                shard_storage(whole.graph, inner.space.sizes, placed.storage, self.small)
            split = whole
        crossing = crossings(split, blocks, found.cuts)
        grads = [e for e, names in crossing.items() if any(split.graph.values[n].grad for n in names)]
        lists = schedules.build(found.schedule, mesh.size("pp"), found.count, list(crossing), grads)
        schedules.check(lists, list(crossing), grads)
        if inner.short is not None:
            times = np.bincount(np.asarray(inner.chain.like), minlength=len(inner.blocks))
            found.predicted["kinds"] = kinds(inner.space, inner.blocks, inner.placed, inner.short, times.tolist())
        groups, apart = merge.decide(split.graph, blocks, placed, inner.prices, inner.space.sizes, self.pins.get("merge"))
        size = int(self.pins.get("buckets", buckets.BUCKET))
        starts = buckets.starts(split.graph, blocks, found.cuts, placed.ops, placed.storage, inner.space.sizes, size)
        return Plan(
            self.fingerprint, mesh, found.count, found.schedule, found.cuts, placed.ops, placed.storage, placed.inputs, lists,
            groups, size, starts, list(self.pins.get("kernels", ())), found.predicted,
            [*split.graph.notes, *_unruled(split, placed, inner.prices, inner.space.sizes), *apart],
        )  # fmt: skip


def _unruled(split: TimeSplit, placed: Placements, prices: Prices | RandomPrices, sizes: tuple[int, int]) -> list[str]:
    """What runs whole on every rank because it has no rule: how often, what that costs in a step, and the first line of the model."""
    if math.prod(sizes) == 1:
        return []
    found: dict[str, list[Op]] = {}
    for op in split.graph.ops:
        if op.name not in split.data and op.name not in split.once and op.target not in TABLE:
            found.setdefault(op.target, []).append(op)
    notes = []
    for target, ops in found.items():
        times = f"{len(ops)} times" if len(ops) > 1 else "once"
        if isinstance(prices, Prices):
            times += f", {sum(prices.one(op, split.graph, placed.ops[op.name], sizes) for op in ops):.2g} s a step"
        notes.append(f"{target} has no rule and runs whole on every rank of dp and tp ({times}): {ops[0].source or 'of unknown source'}")
    return notes


def _held(space: Space, placed: Placements) -> dict[str, Layout]:
    held: dict[str, Layout] = dict(space.held)
    for op in space.split.graph.ops:
        for i, out in enumerate(op.outs):
            held[out] = tuple(s.outs[i] for s in placed.ops[op.name])
    return held


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _thin(space: Space, seed: int) -> None:
    """Keep random tables small: at most 14 strategies an op, the whole ones always among them."""
    rng = np.random.default_rng(seed + 1)
    for name, domain in space.domains.items():
        if len(domain) > 14:
            base = [p for p in domain if all(t.kind in "IR" for s in p for t in (*s.ins, *s.outs))]
            batch = [p for p in domain if p[0].body == "" and any(t.kind == "S" for t in (*p[0].ins, *p[0].outs))]
            rest = [domain[i] for i in rng.permutation(len(domain))]
            space.domains[name] = list(dict.fromkeys([*base[:4], *batch[:3], *rest]))[:14]


def shard_storage(graph: Graph, sizes: tuple[int, int], storage: dict[str, Layout], small: float) -> None:
    """Where dp replicates a parameter that isn't small, store a shard of it on each rank (ZeRO; Rajbhandari et al., 2020)."""
    dp = sizes[0]
    if dp == 1:
        return
    for v in graph.sources("param"):
        layout = storage[v.name]
        if layout[0].kind == "S" or v.tensor.bytes < small:
            continue
        free = [d for d, n in enumerate(v.tensor.shape) if n >= dp and not (layout[1].kind == "S" and layout[1].dim == d)]
        if free:
            even = [d for d in free if v.tensor.shape[d] % dp == 0]
            storage[v.name] = (S((even or free)[0]), *layout[1:])


__all__ = ["Cluster", "random_plan", "search"]
