"""Fold: a model of eighty equal layers is planned as one of three.

In: a captured graph. Out: a `Folded`: a graph in which every run of repeating blocks keeps its first, second and last repetition, and
what the second stands for. Placements are chosen on the short graph, where whatever happens in the second repetition counts as often as it
happens in the model; `Folded.spread` says which block of the short graph each block of the whole one is like.

A run may be folded if its repetitions are alike not only inside (their blocks' kinds) but in what they take: from the repetition before, at
the same place; or from one and the same value all along. Anything else leaves the graph as it is, which costs time and nothing more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..trace.blocks import Block, data_only, find_blocks
from ..trace.graph import Graph, Op, Ref, map_refs
from .microbatch import prune

KEPT = 3
"""Repetitions that stay: the first, one for all in the middle, the last."""
LONGEST = 24
"""Blocks in the longest period looked for."""


@dataclass(frozen=True)
class Run:
    """Blocks [start, start + period · repeats) of the whole graph repeat after `period`. `short`: where it starts in the short one."""

    start: int
    period: int
    repeats: int
    short: int

    @property
    def dropped(self) -> int:
        return (self.repeats - KEPT) * self.period


@dataclass
class Folded:
    """`graph`: the short graph. `weight`: op of a middle repetition → how many it stands for. `tied`: (op, op) that must run alike, so
    that the middle can follow itself. `blocks`: blocks of the whole graph."""

    graph: Graph
    runs: list[Run] = field(default_factory=list)
    weight: dict[str, int] = field(default_factory=dict)
    tied: list[tuple[str, str]] = field(default_factory=list)
    blocks: int = 0

    @property
    def spread(self) -> list[int]:
        """For each block of the whole graph, the block of the short graph that it is like."""
        found: list[int] = []
        at = 0
        for run in self.runs:
            found += range(at, run.short)
            first, middle, last = (range(run.short + i * run.period, run.short + (i + 1) * run.period) for i in range(KEPT))
            found += [*first, *list(middle) * (run.repeats - 2), *last]
            at = run.short + KEPT * run.period
        found += range(at, self.blocks - sum(run.dropped for run in self.runs))
        assert len(found) == self.blocks, (len(found), self.blocks)
        return found

    def like(self, blocks: int) -> list[int]:
        """`spread`, where the short graph has so many blocks; without runs every block is like itself."""
        return self.spread if self.runs else list(range(blocks))


def fold(graph: Graph) -> Folded:
    """The short graph of a captured graph; the graph itself (without what no root needs) where nothing repeats often enough."""
    graph = prune(graph)
    blocks = find_blocks(graph, data_only(graph))
    folded = Folded(graph, blocks=len(blocks))
    home = {name: i for i, block in enumerate(blocks) for name in block.ops}
    place = {name: k for block in blocks for k, name in enumerate(block.ops)}
    ops = {op.name: op for op in graph.ops}
    maker = {out: op for op in graph.ops for out in op.outs}
    stands: dict[str, str] = {}
    gone: set[str] = set()
    for start, period, repeats in _runs([block.kind for block in blocks]):
        inputs = _inputs(blocks, ops, maker, home, place, start, period, repeats)
        if inputs is None:
            continue
        first_gone, last = start + 2 * period, start + (repeats - 1) * period
        names = {name for block in blocks[first_gone:last] for name in block.ops}
        into_last = {name for block in blocks[last : last + period] for name in block.ops}
        if any(maker[n].name in names for op in graph.ops if op.name not in names | into_last for n in op.inputs if n in maker):
            continue
        before = last - period
        for i in range(period):
            for old, new in zip(blocks[before + i].ops, blocks[start + period + i].ops, strict=True):
                stands |= zip(ops[old].outs, ops[new].outs, strict=True)
        gone |= names
        short = start - sum(run.dropped for run in folded.runs)
        folded.runs.append(Run(start, period, repeats, short))
        folded.weight |= {name: repeats - 2 for block in blocks[start + period : first_gone] for name in block.ops}
        folded.tied += [(blocks[start + i].ops[k], blocks[start + period + i].ops[k]) for i, k in inputs]
    if folded.runs:
        kept = [_renamed(op, stands) for op in graph.ops if op.name not in gone]
        folded.graph = _without_idle_parameters(prune(replace(graph, ops=kept)), graph)
    return folded


def _renamed(op: Op, stands: dict[str, str]) -> Op:
    if not any(n in stands for n in op.inputs):
        return op
    args, kwargs = map_refs((op.args, op.kwargs), lambda ref: Ref(stands.get(ref.name, ref.name)))
    return replace(op, args=args, kwargs=kwargs)


def _without_idle_parameters(short: Graph, whole: Graph) -> Graph:
    """Without the parameters and buffers of what was dropped; those that the whole graph doesn't use either stay."""
    used_before = {n for op in whole.ops for n in op.inputs}
    used = {n for op in short.ops for n in op.inputs} | set(short.roots)
    return replace(short, values={n: v for n, v in short.values.items() if n in used or n not in used_before or v.role == "value"})


def _runs(kinds: Sequence[str]) -> list[tuple[int, int, int]]:
    """(start, period, repeats) of runs that don't overlap, from left to right, each the longest from where it starts."""
    found = []
    at = 0
    while at < len(kinds):
        best = (0, 0, 0)
        for period in range(1, min(LONGEST, (len(kinds) - at) // (KEPT + 1)) + 1):
            same = next((i for i in range(at, len(kinds) - period) if kinds[i] != kinds[i + period]), len(kinds) - period) - at
            repeats = same // period + 1
            if repeats > KEPT and (repeats - KEPT) * period > best[0]:
                best = ((repeats - KEPT) * period, period, repeats)
        if best[0]:
            found.append((at, best[1], best[2]))
            at += best[1] * best[2]
        else:
            at += 1
    return found


def _inputs(
    blocks: Sequence[Block], ops: dict[str, Op], maker: dict[str, Op], home: dict[str, int], place: dict[str, int],
    start: int, period: int, repeats: int,
) -> set[tuple[int, int]] | None:  # fmt: skip
    """What a repetition takes from the one before: (block of the period, op of the block); None if repetitions differ in what they take."""
    taken: list[list[object]] = []
    inputs: set[tuple[int, int]] = set()
    for repeat in range(1, repeats):
        low = start + repeat * period
        pattern: list[object] = []
        for block in blocks[low : low + period]:
            for name in block.ops:
                for operand in ops[name].inputs:
                    source = maker.get(operand)
                    if source is None or source.name not in home or home[source.name] >= low:
                        continue
                    at, op = home[source.name], place[source.name]
                    if at >= low - period:
                        inputs.add((at - low + period, op))
                        pattern.append((at - low, op, operand.removeprefix(source.name)))
                    else:
                        pattern.append(operand)
        taken.append(pattern)
    return inputs if all(a == b for a, b in itertools.pairwise(taken)) else None
