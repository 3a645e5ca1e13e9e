"""A candidate: one mesh and microbatch count, what it costs, and whether it fits.

In: a graph (folded), a cluster, pins. Out: `Candidates`, which bounds a candidate without solving it (`floor`), chooses its placements for
time alone (`open`), prices memory where those don't fit (`squeeze`), cuts stages and plays the instruction list. `search` decides which of
them to look at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import NoPlanError
from ..layout import I, Layout, R
from ..mesh import Mesh
from ..trace.blocks import Block, find_blocks
from ..trace.graph import Graph
from . import buckets, merge, precision, schedules
from .cluster import Cluster
from .costs import collective
from .estimate import BlockCosts, block_costs
from .fold import Folded, fold
from .footprint import Footprint, shard_storage
from .microbatch import NotSplittable, TimeSplit, prune, split_time
from .pins import narrow
from .placement import Chooser
from .prices import Prices, RandomPrices, flops
from .simulate import simulate
from .space import Placements, Space
from .squeeze import Walk, walk
from .stages import Costs, balance
from .whole import Chain

MICROBATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass
class Bound:
    """What a candidate found out about its mesh: seconds in all stages together, a whole step; those of the loop among them."""

    count: int
    total: float
    loop: float

    def step(self, pp: int, count: int) -> float:
        """Seconds that a step of `count` microbatches on `pp` stages can't be shorter than: even stages, and the bubble."""
        return (self.total + self.loop * (pp - 1) / count) / pp


class Refused(NoPlanError):
    """A candidate that can't be; `facts` are for its row."""

    def __init__(self, reason: str, **facts: Any) -> None:
        super().__init__(reason)
        self.reason, self.facts = reason, facts


@dataclass
class Inner:
    """Placements chosen for (dp, tp, microbatches), whatever the pipeline. `chain`: the whole model's blocks; `costs`: of each of them."""

    split: TimeSplit
    blocks: list[Block]
    placed: Placements
    space: Space
    prices: Prices | RandomPrices
    chain: Chain
    short: BlockCosts | None
    costs: BlockCosts


@dataclass
class Candidate:
    """A mesh and a microbatch count that can be: where it is cut, and what it is predicted to take."""

    mesh: Mesh
    count: int
    schedule: str
    cuts: tuple[int, ...]
    inner: Inner
    predicted: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return float(self.predicted["step_seconds"])

    @property
    def memory(self) -> int:
        return int(max(self.predicted["memory_bytes"]))


@dataclass
class Open:
    """A candidate whose placements are chosen for time alone. `found`: None if they don't fit, and then `refused` says by how much."""

    mesh: Mesh
    count: int
    chooser: Chooser
    prices: Prices | RandomPrices
    inner: Inner
    bound: Bound
    found: Candidate | None = None
    refused: Refused | None = None


@dataclass
class Alone:
    """One microbatch on one device: its blocks' costs, the bytes that each block takes from others, and which block each of the whole model
    is like."""

    costs: BlockCosts
    taken: list[float]
    like: list[int]


class Candidates:
    """All candidates of one graph on one cluster; what they share is computed once."""

    def __init__(
        self, graph: Graph, cluster: Cluster, pins: Mapping[str, Any], limit: float, seed: int | None = None, pinned: bool = False,
        folding: bool = False,
    ) -> None:  # fmt: skip
        self.graph, self.cluster, self.pins, self.limit, self.seed, self.pinned = graph, cluster, pins, limit, seed, pinned
        self.folded = fold(graph) if folding else Folded(prune(graph))
        self.splits: dict[int, TimeSplit | NotSplittable] = {}
        self.alone: dict[int, Alone] = {}
        self.flops = 3 * sum(flops(op, graph.values) for op in graph.ops)
        self.small = min(0.002 * sum(v.tensor.bytes for v in graph.sources("param")), 2.0**20)
        self.schedule = str(pins.get("schedule", "1f1b"))

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

    def in_flight(self, mesh: Mesh, count: int) -> list[int]:
        """Microbatches whose saved values each stage holds at its peak."""
        stages = mesh.size("pp")
        return [count if self.schedule == "gpipe" else min(count, stages - s) for s in range(stages)]

    # ---- without solving ------------------------------------------------------------------------------------------------

    def floor(self, mesh: Mesh, count: int) -> Bound:
        """What no placements can beat: all work and all that is kept, divided evenly over every rank, and nothing sent but for the bubble.
        Raises Refused where even that is too large."""
        alone = self._alone(count)
        costs, like, pp, tp = alone.costs, alone.like, mesh.size("pp"), mesh.size("tp")
        inner = mesh.size("dp") * tp
        loop = float(costs.compute[like].sum()) * count / inner
        bound = Bound(count, loop, loop)
        if pp > len(like):
            raise Refused(f"{pp} stages, but the model has only {len(like)} blocks to divide")
        if not math.isfinite(self.limit) or "cuts" in self.pins:
            return bound
        # what dp doesn't cut is whole on it as the loop uses it
        fixed = (costs.params + costs.grads) / tp + costs.optimizer / inner
        kept = Costs(costs.compute, fixed, costs.saved / inner, np.zeros(len(fixed))).spread(like)
        found, least = balance(kept, pp, self.in_flight(mesh, count), self.limit)
        if found is None:
            raise self._too_large(least, "at least ")
        return bound

    def guess(self, mesh: Mesh, count: int) -> float:
        """Seconds a step that `floor` and a usual amount of communication take: what a block takes from others is gathered and scattered
        over tp, there and back. Only decides what is looked at first."""
        alone, pp, tp = self._alone(count), mesh.size("pp"), mesh.size("tp")
        each = [4.0 * float(collective.seconds(self.cluster, "all_gather", size / mesh.size("dp"), tp)) for size in alone.taken]
        compute = alone.costs.compute / (mesh.size("dp") * tp)
        loop = sum(float(compute[j]) + each[j] for j in alone.like) * count
        return Bound(count, loop, loop).step(pp, count)

    def _alone(self, count: int) -> Alone:
        if count not in self.alone:
            split = self._split(count)
            blocks = find_blocks(split.graph, split.once | split.data)
            space = Space(split, (1, 1), weight=self.folded.weight)
            ops = {n: d[0] for n, d in space.domains.items()}
            only = Placements({**space.fixed, **ops}, {n: d[0] for n, d in space.storage.items()}, {})
            costs = self._costs(space, blocks, only, Prices(self.cluster, Mesh.of({}), count))
            chain = Chain.of(split, blocks, self.folded, _held(space, only), space.sizes)
            taken = {j: sum(value.bytes for _, value in takes) for j, takes in zip(chain.like, chain.takes, strict=True)}
            self.alone[count] = Alone(costs, [taken[j] for j in range(len(blocks))], chain.like)
        return self.alone[count]

    def _split(self, count: int) -> TimeSplit:
        split = self.split(count)
        assert not isinstance(split, NotSplittable)
        return split

    def _too_large(self, size: float, about: str = "") -> Refused:
        missing = size - self.limit
        return Refused(
            f"out of memory: needs {about}{gib(size)} a rank, {gib(missing)} more than the {gib(self.limit)} that are there",
            memory_bytes=int(size), missing_bytes=int(missing),
        )  # fmt: skip

    # ---- placements -----------------------------------------------------------------------------------------------------

    def open(self, mesh: Mesh, count: int) -> Open:
        """The candidate under the placements that are fastest, whatever they hold. Raises Refused, NoPlanError, TooWide."""
        split = self._split(count)
        blocks = find_blocks(split.graph, split.once | split.data)
        space = Space(split, (mesh.size("dp"), mesh.size("tp")), weight=self.folded.weight, alike=self.folded.tied)
        narrow(space, self.pins)
        overlap = self.pins.get("overlap", True)
        prices: Prices | RandomPrices
        if self.seed is not None:
            prices = RandomPrices(self.seed)
            thin(space, self.seed)
        else:
            prices = Prices(self.cluster, mesh, count, bool(self.pins.get("divide", self.pinned)), overlap)
        roots: dict[str, Layout] = {n: (I, I) if split.graph.values[n].grad else (R, R) for n in split.graph.roots}
        chooser = Chooser(space, prices, blocks, roots, fold=self.seed is None)
        placed = chooser.choose()
        if not math.isfinite(placed.seconds):
            raise NoPlanError("no placement is legal under the pins")
        honest = Prices(self.cluster, mesh, count, overlap=overlap) if isinstance(prices, Prices) and prices.divide else prices
        inner = self._inner(chooser, placed, honest)
        if mesh.size("pp") > len(inner.chain.like):
            raise Refused(f"{mesh.size('pp')} stages, but the model has only {len(inner.chain.like)} blocks to divide")
        loop = float(inner.costs.seconds.sum()) * count
        opened = Open(mesh, count, chooser, honest, inner, Bound(count, loop + float(inner.costs.once.sum()), loop))
        try:
            opened.found = self._finished(opened, inner, self._cuts(mesh, count, inner))
        except Refused as error:
            opened.refused = error
        return opened

    def squeeze(self, opened: Open) -> Candidate:
        """The fastest placements found that fit, where the fastest don't. Raises Refused if those that hold least don't either."""
        mesh, count = opened.mesh, opened.count
        flights = self.in_flight(mesh, count)
        footprint = Footprint.of(opened.inner.space, opened.inner.blocks, self.pins.get("zero", True), self.small)
        bytes_of = opened.chooser.footprint(footprint, sum(flights) / len(flights))
        smallest: Refused | None = None

        def solve(price: float) -> tuple[Placements, float]:
            placed = opened.chooser.choose(bytes_of, price)
            return placed, placed.bytes

        def fit(placed: Placements) -> tuple[Inner, tuple[int, ...]] | None:
            nonlocal smallest
            inner = self._inner(opened.chooser, placed, opened.prices)
            try:
                return inner, self._cuts(mesh, count, inner)
            except Refused as error:
                smallest = smallest or error
                return None

        found: Walk[tuple[Inner, tuple[int, ...]]] | None = walk(solve, fit)
        if found is None:
            raise smallest or opened.refused or Refused("out of memory")
        inner, cuts = found.value
        candidate = self._finished(opened, inner, cuts)
        candidate.predicted["memory_price_seconds_per_gib"] = found.price * 2**30 * count
        told = f"the fastest placements of {mesh} × {count} microbatches don't fit; these hold less"
        if opened.prices is opened.chooser.prices:  # else a pin's wish was among the prices, and they aren't seconds
            candidate.predicted["memory_gap"] = found.gap
            told += f" and are at most {100 * found.gap:.1f} % slower than the fastest that would"
        candidate.notes.append(told)
        return candidate

    def _inner(self, chooser: Chooser, placed: Placements, prices: Prices | RandomPrices) -> Inner:
        space, blocks = chooser.space, list(chooser.blocks)
        placed = replace(placed, storage=dict(placed.storage))
        if self.pins.get("zero", True):
            shard_storage(space.split.graph, space.sizes, placed.storage, self.small)
        chain = Chain.of(space.split, blocks, self.folded, _held(space, placed), space.sizes)
        if isinstance(prices, RandomPrices):
            costs = BlockCosts.random(prices.random.random(len(blocks)))
            return Inner(space.split, blocks, placed, space, prices, chain, None, costs)
        short = self._costs(space, blocks, placed, prices)
        return Inner(space.split, blocks, placed, space, prices, chain, short, short.spread(chain.like))

    def _costs(self, space: Space, blocks: Sequence[Block], placed: Placements, prices: Prices) -> BlockCosts:
        """What blocks cost, their linears merged and their parameters' moves in buckets."""
        graph, size = space.split.graph, int(self.pins.get("buckets", buckets.BUCKET))
        chosen = self.chosen(space, blocks, placed, prices)
        costs = block_costs(space, blocks, placed, prices, chosen.ops)
        buckets.credit(costs.gather, costs.reduce, graph, blocks, placed, prices, space.sizes, size)
        merge.credit(costs.compute, graph, blocks, placed, prices, space.sizes, self.pins.get("merge"))
        precision.credit(costs.compute, costs.params, graph, blocks, placed, chosen, space.sizes)
        return costs

    def chosen(self, space: Space, blocks: Sequence[Block], placed: Placements, prices: Prices) -> precision.Chosen:
        """Which linears run in fp8."""
        recipe = self.pins.get("precision")
        if not recipe:
            return precision.Chosen()
        graph = space.split.graph
        groups, _ = merge.decide(graph, blocks, placed, prices, space.sizes, self.pins.get("merge"))
        return precision.choose(graph, blocks, placed, prices, space.sizes, groups, recipe)

    # ---- stages and the clock -------------------------------------------------------------------------------------------

    def _cuts(self, mesh: Mesh, count: int, inner: Inner) -> tuple[int, ...]:
        """Where the chain is cut. Raises Refused if no cut fits."""
        stages, flights, blocks = mesh.size("pp"), self.in_flight(mesh, count), len(inner.chain.like)
        if "cuts" in self.pins:
            pinned = tuple(self.pins["cuts"])
            if len(pinned) != stages or pinned[-1] >= blocks:
                raise NoPlanError(f"cuts {pinned} don't make {stages} stages of {blocks} blocks")
            return pinned
        room = self.limit
        for _ in range(2):  # where to cut decides what is sent, and its buffers need room too
            cuts, least = balance(inner.costs.for_stages(), stages, flights, room)
            if cuts is None:
                raise self._too_large(max(least, least + self.limit - room))
            size = max(stage["total"] for stage in self._memory(inner, cuts, flights))
            if size <= self.limit:
                return cuts
            room = self.limit - (size - self.limit)
        raise self._too_large(size)

    @staticmethod
    def _memory(inner: Inner, cuts: Sequence[int], flights: Sequence[int]) -> list[dict[str, int]]:
        """Bytes of each stage, by what they are for."""
        ends, crossing = [*cuts[1:], len(inner.chain.like)], inner.chain.crossings(cuts)
        messages = [2.0 * sum(x.bytes for e, values in crossing.items() if s in e for x in values) for s in range(len(cuts))]
        return [inner.costs.memory(a, b, flights[s], messages[s]) for s, (a, b) in enumerate(zip(cuts, ends, strict=True))]

    def _finished(self, opened: Open, inner: Inner, cuts: tuple[int, ...]) -> Candidate:
        predicted = self._predict(inner, opened.mesh, opened.count, cuts)
        return Candidate(opened.mesh, opened.count, self.schedule, cuts, inner, predicted)

    def _predict(self, inner: Inner, mesh: Mesh, count: int, cuts: tuple[int, ...]) -> dict[str, Any]:
        costs, prices = inner.costs, inner.prices
        if isinstance(prices, RandomPrices):
            return {"step_seconds": 0.0, "memory_bytes": [0] * len(cuts)}
        ends, flights = [*cuts[1:], len(costs.seconds)], self.in_flight(mesh, count)
        crossing = inner.chain.crossings(cuts)
        edges = {e: sum(prices.send(x.bytes) for x in values) for e, values in crossing.items()}
        grads = [e for e, values in crossing.items() if any(x.grad for x in values)]
        lists = schedules.build(self.schedule, len(cuts), count, list(crossing), grads)
        durations: dict[tuple[int, str], float] = {}
        seconds = [float(costs.seconds[a:b].sum()) for a, b in zip(cuts, ends, strict=True)]
        for stage, t in enumerate(seconds):
            durations |= {(stage, "F"): t / 3, (stage, "B"): t * 2 / 3, (stage, "I"): t / 3, (stage, "W"): t / 3}
        played = simulate(lists, durations, edges)
        beside = [costs.beside(a, b) for a, b in zip(cuts, ends, strict=True)]
        lost = collective.contention(self.cluster, mesh.size("dp"), mesh.stride("dp"))
        once = [float(costs.once[a:b].sum()) + waits + lost * hides for a, b, (waits, hides) in zip(cuts, ends, beside, strict=True)]
        step = float(played.step_seconds + max(once))
        memory = self._memory(inner, cuts, flights)
        stages = [
            {
                "blocks": [a, b],
                "compute_seconds": float(costs.compute[a:b].sum()) * count,
                "communication_seconds": float(costs.communication[a:b].sum()) * count,
                "pipeline_seconds": float(sum(t for e, t in edges.items() if s in e)) * count,
                "bubble_seconds": float(played.step_seconds - played.busy[s]),
                "parameters_seconds": once[s],
                "hidden_seconds": beside[s][1],
                "in_flight": flights[s],
                "memory": memory[s],
            }
            for s, (a, b) in enumerate(zip(cuts, ends, strict=True))
        ]
        peak = mesh.ranks * self.cluster.device.peak_flops(self._dtype())
        return {
            "step_seconds": step,
            "memory_bytes": [stage["total"] for stage in memory],
            "memory_limit_bytes": int(self.limit) if math.isfinite(self.limit) else 0,
            "mfu": self.flops / (step * peak) if step and peak else 0.0,
            "breakdown": {
                "compute_and_tp_seconds": [s * count for s in seconds],
                "parameters_and_gradients_seconds": max(once),
                "hidden_communication_seconds": max(hides for _, hides in beside),
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


def _held(space: Space, placed: Placements) -> dict[str, Layout]:
    held: dict[str, Layout] = dict(space.held)
    for op in space.split.graph.ops:
        for i, out in enumerate(op.outs):
            held[out] = tuple(s.outs[i] for s in placed.ops[op.name])
    return held


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def thin(space: Space, seed: int) -> None:
    """Keep random tables small: at most 14 strategies an op, the whole ones always among them."""
    rng = np.random.default_rng(seed + 1)
    for name, domain in space.domains.items():
        if len(domain) > 14:
            base = [p for p in domain if all(t.kind in "IR" for s in p for t in (*s.ins, *s.outs))]
            batch = [p for p in domain if p[0].body == "" and any(t.kind == "S" for t in (*p[0].ins, *p[0].outs))]
            rest = [domain[i] for i in rng.permutation(len(domain))]
            space.domains[name] = list(dict.fromkeys([*base[:4], *batch[:3], *rest]))[:14]
