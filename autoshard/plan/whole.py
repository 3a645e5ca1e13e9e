"""From the short graph back to the whole: what crosses between blocks, and every layer's placements.

In: the short graph's split, its blocks and placements, what `fold` left out. Out: a `Chain`, which knows for any cuts which values travel,
without the whole graph; and `spread`, the placements of the whole graph, made once for the plan that won.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..layout import I, Layout, R
from ..trace.blocks import Block
from .fold import KEPT, Folded
from .microbatch import TimeSplit
from .moves import local_bytes
from .space import Pair, Placements


class Unlike(Exception):
    """Blocks that were folded for equal aren't."""


class Crossing(NamedTuple):
    name: str
    bytes: float
    grad: bool


@dataclass
class Chain:
    """`like`: for each block of the whole graph the block of the short one. `takes`: per block, (block, value) that it takes."""

    like: list[int]
    takes: list[list[tuple[int, Crossing]]]

    @classmethod
    def of(cls, split: TimeSplit, blocks: Sequence[Block], folded: Folded, held: Mapping[str, Layout], sizes: tuple[int, ...]) -> Chain:
        """Raises Unlike if the split graph has other blocks than the one that was folded."""
        graph = split.graph
        like = folded.like(len(blocks))
        if folded.runs and max(like) + 1 != len(blocks):
            raise Unlike
        home = {name: i for i, block in enumerate(blocks) for name in block.ops}
        producer = graph.producer()
        ops = {op.name: op for op in graph.ops}
        taken: list[dict[str, tuple[int, Crossing]]] = [{} for _ in blocks]
        for i, block in enumerate(blocks):
            for name in block.ops:
                for operand in ops[name].inputs:
                    source = producer.get(operand)
                    if source is not None and source.name in home and home[source.name] != i and operand not in taken[i]:
                        v = graph.values[operand]
                        taken[i][operand] = (home[source.name], Crossing(operand, local_bytes(v.tensor, held[operand], sizes), v.grad))
        return cls(like, _spread_takes(like, taken, folded))

    def crossings(self, cuts: Sequence[int]) -> dict[tuple[int, int], list[Crossing]]:
        """(source stage, destination stage) → the values that travel."""
        found: dict[tuple[int, int], dict[tuple[int, str], Crossing]] = {}
        for i, takes in enumerate(self.takes):
            there = bisect.bisect_right(cuts, i) - 1
            for producer, value in takes:
                here = bisect.bisect_right(cuts, producer) - 1
                if here < there:
                    found.setdefault((here, there), {})[producer, value.name] = value
        return {edge: list(values.values()) for edge, values in sorted(found.items())}


def _spread_takes(
    like: Sequence[int], taken: Sequence[Mapping[str, tuple[int, Crossing]]], folded: Folded
) -> list[list[tuple[int, Crossing]]]:
    first_like: dict[int, int] = {}
    for i, j in enumerate(like):
        first_like.setdefault(j, i)
    run_of = {j: run for run in folded.runs for j in range(run.short, run.short + KEPT * run.period)}
    found = []
    for i, j in enumerate(like):
        mine = []
        for q, value in taken[j].values():
            same_run = j in run_of and run_of.get(q) is run_of[j]
            mine.append((i - (j - q) if same_run else first_like[q], value))
        found.append(mine)
    return found


def spread(
    split: TimeSplit, blocks: Sequence[Block], placed: Placements, whole: TimeSplit, all_blocks: Sequence[Block], like: Sequence[int],
    data: tuple[Mapping[str, Pair], Mapping[str, Layout]],
) -> Placements:  # fmt: skip
    """The placements of the whole graph. `data`: its data-only ops and sources. Raises Unlike if a block isn't of its like's kind."""
    if [blocks[j].kind for j in like] != [block.kind for block in all_blocks]:
        raise Unlike
    short_ops = {op.name: op for op in split.graph.ops}
    whole_ops = {op.name: op for op in whole.graph.ops}
    ops: dict[str, Pair] = dict(data[0])
    storage: dict[str, Layout] = {}
    for j, block in zip(like, all_blocks, strict=True):
        for new, old in zip(block.ops, blocks[j].ops, strict=True):
            ops[new] = placed.ops[old]
            for mine, theirs in zip(whole_ops[new].inputs, short_ops[old].inputs, strict=True):
                if theirs in placed.storage:
                    storage[mine] = placed.storage[theirs]
    idle = {v.name: (I, I) if v.grad else (R, R) for v in whole.graph.sources("param")}
    return Placements(ops, {**idle, **storage}, dict(data[1]), placed.seconds)
