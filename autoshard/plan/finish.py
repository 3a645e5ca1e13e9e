"""Finish: the candidate that won → the Plan of the whole graph, with notes on what a user may want to know.

Notes say what was decided for a reason that costs something: ops without a rule, axes whose ranks repeat each other's work.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..trace.blocks import find_blocks, is_heavy
from ..trace.graph import Op
from ..trace.ops.table import TABLE
from . import buckets, merge, precision, schedules
from .estimate import kinds
from .footprint import shard_storage
from .microbatch import TimeSplit, split_time
from .plan import Plan, fingerprint
from .prices import Prices, RandomPrices, flops
from .space import AXES, Placements, fix_data
from .stages import crossings
from .whole import spread

if TYPE_CHECKING:
    from .candidate import Candidate, Candidates, Inner

REPEATED = 0.05
"""The part of the matmuls' operations that an axis may repeat without a note."""


def finish(candidates: Candidates, found: Candidate) -> Plan:
    """The plan of a candidate, for the whole graph. Raises Unlike if folding took for equal what isn't."""
    inner, mesh = found.inner, found.mesh
    split, blocks, placed = inner.split, inner.blocks, inner.placed
    if candidates.folded.runs:
        whole = split_time(candidates.graph, found.count)
        blocks = find_blocks(whole.graph, whole.once | whole.data)
        placed = spread(split, inner.blocks, placed, whole, blocks, inner.chain.like, fix_data(whole, inner.space.sizes))
        if candidates.pins.get("zero", True):
            shard_storage(whole.graph, inner.space.sizes, placed.storage, candidates.small)
        split = whole
    crossing = crossings(split, blocks, found.cuts)
    grads = [e for e, names in crossing.items() if any(split.graph.values[n].grad for n in names)]
    lists = schedules.build(found.schedule, mesh.size("pp"), found.count, list(crossing), grads)
    schedules.check(lists, list(crossing), grads)
    if inner.short is not None:
        times = np.bincount(np.asarray(inner.chain.like), minlength=len(inner.blocks))
        found.predicted["kinds"] = kinds(inner.space, inner.blocks, inner.placed, inner.short, times.tolist())
    sizes, pins = inner.space.sizes, candidates.pins
    groups, apart = merge.decide(split.graph, blocks, placed, inner.prices, sizes, pins.get("merge"))
    chosen = precision.choose(split.graph, blocks, placed, inner.prices, sizes, groups, pins.get("precision"))
    size = int(pins.get("buckets", buckets.BUCKET))
    starts = buckets.starts(split.graph, blocks, found.cuts, placed.ops, placed.storage, sizes, size)
    notes = [*split.graph.notes, *_unruled(split, placed, inner.prices, sizes), *_repeated(inner), *found.notes, *apart, *chosen.notes]
    return Plan(
        fingerprint(candidates.graph), mesh, found.count, found.schedule, found.cuts, placed.ops, placed.storage, placed.inputs, lists,
        groups, size, starts, list(pins.get("kernels", ())), pins.get("overlap", True), chosen.ops, found.predicted, notes,
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


def _repeated(inner: Inner) -> list[str]:
    """Axes on which every rank does the same: how much of the matmuls' work that is, and what would use the ranks better."""
    graph, weight = inner.split.graph, inner.space.weight
    work = {
        op.name: flops(op, graph.values) * weight.get(op.name, 1) for op in graph.ops if is_heavy(op) and op.name not in inner.space.fixed
    }
    total = sum(work.values())
    notes = []
    for axis, (name, size) in enumerate(zip(AXES, inner.space.sizes, strict=True)):
        if size == 1 or not total:
            continue
        repeated = 0.0
        for op, each in work.items():
            strategy = inner.placed.ops[op][axis]
            if not any(t.kind == "S" for t in (*strategy.ins, *strategy.outs)):
                repeated += each / total
        if repeated > REPEATED:
            instead = "a larger batch, or fewer of them" if name == "dp" else "fewer of them, or dp= in their place (with a larger batch)"
            notes.append(
                f"the {size} ranks of {name} all do the same {100 * repeated:.0f} % of the matmul FLOPs, which they don't share: dividing"
                f" them would cost more than it saves; {instead}, would use the ranks better"
            )
    return notes
