"""Seconds of a collective, from the network's levels.

In: a `Cluster`, the kind, `bytes`, and the group: `size` ranks that stand `stride` apart in rank order. Out: seconds.

`bytes` is always that of the whole tensor as one rank sees it: what an all-gather results in, what a reduce-scatter starts from, what an
all-reduce or a broadcast leaves on every rank, what one rank holds before (and after) an all-to-all, what a send carries.

Each algorithm and protocol is a line, latency + bytes × inverse rate, and the fastest counts, as NCCL's tuner chooses: so costs are
concave and monotone in bytes. Rates: every level that the group crosses passes its share of the bytes, all levels at once (chunks are
pipelined); the slowest decides. Protocols, fitted to the measured curves that the catalogue's comments name (NCCL's LL, LL128, Simple):

    quick    1 × latency, 0.42 of the bandwidth
    middle   2.5 × latency, 0.80
    bulk     8 × latency, all of it

A group of `size` ranks `stride` apart has gcd(size, level.ranks / stride) members in each group of a level: h100x64, size 16, stride 1 is
2 nodes of 8, whose 8 ports carry a ring together; stride 8 is 16 nodes of 1.

>>> from autoshard.plan.cluster import Cluster
>>> h200 = Cluster.load("h200x2")
>>> print(f"{seconds(h200, 'all_reduce', 2**28, 2) * 1e6:.0f} µs")
831 µs
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from ..cluster import Cluster, Level

PIECES = 4
"""The most pieces in which a matmul and the all-reduce of its result go."""
LEAST = 1024
"""Rows of a piece: fewer leave a GPU's last wave of tiles half empty, and a collective at its latency."""

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast")

PROTOCOLS = ((1.0, 0.42), (2.5, 0.80), (8.0, 1.0))

Line = tuple[float, float]


def seconds(cluster: Cluster, kind: str, bytes: Any, size: int, stride: int = 1) -> Any:
    """Seconds of one call; `bytes` may be an array.

    For a send, (size, stride) is the axis along which neighbours talk, and the worst pair counts.
    """
    floor, costs = lines(cluster, kind, size, stride)
    if not isinstance(bytes, np.ndarray):
        if not costs or bytes <= 0:
            return 0.0
        return max(floor, min(fixed + each * bytes for fixed, each in costs))
    if not costs:
        return np.zeros(bytes.shape)
    best = np.min([fixed + each * bytes for fixed, each in costs], axis=0)
    return np.where(bytes > 0, np.maximum(floor, best), 0.0)


@lru_cache(maxsize=65536)
def lines(cluster: Cluster, kind: str, size: int, stride: int = 1) -> tuple[float, tuple[Line, ...]]:
    """(floor, lines of (latency, seconds per byte)); the cost is max(floor, min over the lines). No lines: one rank, nothing to do."""
    assert kind in KINDS, kind
    assert size >= 1 and stride >= 1, (size, stride)
    if size == 1:
        return 0.0, ()
    crossed = spans(cluster, size, stride)
    floor = max(level.floor for level, _, _ in crossed)
    found = {line for algorithm in _ALGORITHMS[kind] for line in algorithm(kind, size, crossed)}
    # keep the lower envelope only: a line above another everywhere is never the minimum
    kept = [a for a in found if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in found)]
    return floor, tuple(sorted(kept))


def pieces(rows: int) -> int:
    """In how many pieces a matmul of so many rows runs beside the all-reduce of its result; 1: not worth it."""
    return max(1, min(PIECES, rows // LEAST))


def contention(cluster: Cluster, size: int, stride: int = 1) -> float:
    """The part of a collective's seconds that computation beside it loses."""
    return max((level.contention for level, _, _ in spans(cluster, size, stride)), default=0.0)


Crossed = list[tuple[Level, int, float]]


def spans(cluster: Cluster, size: int, stride: int) -> Crossed:
    """The levels over which the group talks: (level, members in each inner group, how many such groups meet at this level)."""
    found: Crossed = []
    inner = 1
    for level in cluster.levels:
        members = _members(level.ranks, size, stride, cluster.ranks)
        if members > inner:
            found.append((level, inner, members / inner))
            inner = members
        if members == size:
            return found
    # the cluster is smaller than the group's span: price it on its outermost level
    found.append((cluster.levels[-1], inner, size / inner))
    return found


def _members(ranks: int, size: int, stride: int, total: int) -> int:
    """How many of the group stand in one aligned block of `ranks`; of uneven blocks the fewest."""
    span = size * stride
    if ranks >= total or (span <= ranks and ranks % span == 0):
        return size
    return math.gcd(size, max(1, ranks // stride)) if ranks % stride == 0 else 1


# ---- algorithms: (kind, size, levels crossed) → lines --------------------------------------------------------------


def _protocols(crossed: Crossed, steps: float, rate: float) -> list[Line]:
    """`steps`: seconds of all hops. `rate`: seconds per byte. A step over a network waits for larger chunks in the bulk protocols."""
    latency = sum(level.latency for level, _, _ in crossed)
    hops = (1.0, 1.5, 5.0) if len(crossed) > 1 else (1.0, 1.0, 1.0)
    return [(factor * latency + hop * steps, rate / part) for (factor, part), hop in zip(PROTOCOLS, hops, strict=True)]


def _ring(kind: str, size: int, crossed: Crossed) -> list[Line]:
    """Every rank passes (size − 1) / size of the bytes on, twice for an all-reduce; the ports of a group's members work together."""
    rounds = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}[kind]
    # innermost first: size − size/n0 steps inside the first level, the rest over each further one
    left, steps = size, 0.0
    for level, _, groups in crossed:
        steps += (left - left / groups) * level.hop
        left = round(left / groups)
    wire = rounds * (size - 1) / size
    rate = max(wire / (inner * level.bandwidth) for level, inner, _ in crossed)
    return _protocols(crossed, rounds * steps, rate)


def _tree(kind: str, size: int, crossed: Crossed) -> list[Line]:
    """All-reduce level by level: inside the switch where it can reduce, else a chain; a double binary tree between groups."""
    steps, rate = 0.0, 0.0
    for position, (level, inner, groups) in enumerate(crossed):
        depth = groups - 1 if position == 0 else math.ceil(math.log2(groups))
        # a chain passes 2 (n − 1) / n of the bytes; in a double binary tree each node sends all of them up once and down once
        share = 2 * (groups - 1) / groups if position == 0 or groups <= 2 else 2.0
        each = share / (inner * level.bandwidth)
        if level.reduction and inner == 1 and groups > 2:
            depth, each = groups / 2, 1 / level.reduction
        steps += 2 * depth * level.hop
        rate = max(rate, each)
    return _protocols(crossed, steps, rate)


def _exchange(kind: str, size: int, crossed: Crossed) -> list[Line]:
    """All-to-all: each rank sends each other rank its part; what leaves a group passes its own port."""
    rate, steps = 0.0, 0.0
    for level, inner, groups in crossed:
        rate = max(rate, (size - inner) / size / level.bandwidth)
        steps += level.hop * math.ceil(math.log2(groups))
    return _protocols(crossed, steps, rate)


def _pair(kind: str, size: int, crossed: Crossed) -> list[Line]:
    """One sender, one receiver, over the outermost level that the axis crosses."""
    level = crossed[-1][0]
    return _protocols([crossed[-1]], level.hop, 1 / level.bandwidth)


def _chain(kind: str, size: int, crossed: Crossed) -> list[Line]:
    """Broadcast: chunks pass from rank to rank; each group needs the bytes once."""
    steps = sum(math.ceil(math.log2(groups)) * level.hop for level, _, groups in crossed)
    rate = max(1 / (inner * level.bandwidth) for level, inner, _ in crossed)
    return _protocols(crossed, steps, rate)


_ALGORITHMS = {
    "all_reduce": (_ring, _tree),
    "all_gather": (_ring,),
    "reduce_scatter": (_ring,),
    "all_to_all": (_exchange,),
    "send": (_pair,),
    "broadcast": (_chain,),
}
