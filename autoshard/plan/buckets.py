"""Buckets: which parameters travel together, when they are gathered before the loop and when their gradients are reduced after it.

A bucket is a run of blocks of one stage: the parameters that are first used there and aren't used as they are stored. Its collectives of
one kind become one, on one flat buffer, unless they are large enough to fill the wire by themselves (`lower.coalesce`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from ..layout import Layout
from ..trace.blocks import Block
from ..trace.graph import Graph
from .moves import local_bytes
from .space import Pair, Placements

BUCKET = 64 << 20
"""Bytes as used. Collectives of this size run at nine tenths of what the largest reach (nccl-tests on 2 and 8 H200)."""


def moved(
    graph: Graph, blocks: Sequence[Block], cuts: Sequence[int], placed: Mapping[str, Pair], storage: Mapping[str, Layout]
) -> list[dict[tuple[str, Layout], None]]:
    """Per block, the (parameter, use) that its stage needs there for the first time, where that isn't how it is stored."""
    ops = {op.name: op for op in graph.ops}
    found: list[dict[tuple[str, Layout], None]] = []
    known: set[tuple[str, Layout]] = set()
    for i, block in enumerate(blocks):
        if i in cuts:
            known = set()
        here: dict[tuple[str, Layout], None] = {}
        for name in block.ops:
            for j, operand in enumerate(ops[name].inputs):
                key = (operand, tuple(s.ins[j] for s in placed[name]))
                if graph.values[operand].role == "param" and key not in known:
                    known.add(key)
                    if key[1] != storage[operand]:
                        here[key] = None
        found.append(here)
    return found


def starts(
    graph: Graph, blocks: Sequence[Block], cuts: Sequence[int], placed: Mapping[str, Pair], storage: Mapping[str, Layout],
    sizes: tuple[int, ...], limit: int,
) -> tuple[int, ...]:  # fmt: skip
    """The first block of each bucket: a new one at each stage, and where the last has reached `limit` bytes as used."""
    found, size = [], 0.0
    for i, uses in enumerate(moved(graph, blocks, cuts, placed, storage)):
        here = sum(local_bytes(graph.values[name].tensor, use, sizes) for name, use in uses)
        if i in cuts or (here and size >= limit):
            found.append(i)
            size = 0.0
        size += here
    return tuple(found)


class Prices(Protocol):
    """What the planner pays; see `plan.prices`."""

    def least(self, a: Layout, b: Layout, grad: bool) -> float: ...


def credit(
    gather: np.ndarray, reduce: np.ndarray, graph: Graph, blocks: Sequence[Block], placed: Placements, prices: Prices,
    sizes: tuple[int, ...], limit: int,
) -> None:  # fmt: skip
    """Take from the blocks' seconds beside the loop what travelling together saves: of each bucket's moves of one kind, the least time
    that a collective takes, for all but one."""
    if not limit:
        return
    begins = starts(graph, blocks, (0,), placed.ops, placed.storage, sizes, limit)
    known: set[object] = set()
    for i, uses in enumerate(moved(graph, blocks, (0,), placed.ops, placed.storage)):
        if i in begins:
            known = set()
        for name, use in uses:
            v, stored = graph.values[name], placed.storage[name]
            kind = (tuple((a.kind, b.kind) for a, b in zip(stored, use, strict=True)), v.grad, v.tensor.dtype)
            if local_bytes(v.tensor, use, sizes) < limit:
                if kind in known:
                    there = prices.least(stored, use, False)
                    gather[i] -= there
                    reduce[i] -= prices.least(stored, use, v.grad) - there
                known.add(kind)


def legal(buckets: Sequence[int], cuts: Sequence[int], blocks: int) -> bool:
    """Whether they rise, lie in the model and begin anew with each stage."""
    rising = all(a < b for a, b in itertools.pairwise(buckets))
    return rising and set(cuts) <= set(buckets) and all(0 <= b < max(blocks, 1) for b in buckets)
