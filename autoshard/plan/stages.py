"""Stages: where the chain of blocks is cut for the pipeline, and what then crosses.

In: the time-split graph, its blocks, a cost per block. Out: the first block of each stage (`balance`), and per pair of stages the
values that travel (`crossings`). Data-only values never travel: every stage computes those that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..trace.blocks import Block
from ..trace.graph import Graph
from .microbatch import TimeSplit


def stage_of(cuts: Sequence[int], blocks: Sequence[Block]) -> dict[str, int]:
    """Op name → stage."""
    found = {}
    for s, start in enumerate(cuts):
        end = cuts[s + 1] if s + 1 < len(cuts) else len(blocks)
        for block in blocks[start:end]:
            found.update(dict.fromkeys(block.ops, s))
    return found


def crossings(split: TimeSplit, blocks: Sequence[Block], cuts: Sequence[int]) -> dict[tuple[int, int], tuple[str, ...]]:
    """(source stage, destination stage) → values that travel, in the order in which they are made."""
    graph, home = split.graph, stage_of(cuts, blocks)
    found: dict[tuple[int, int], dict[str, None]] = {}
    producer = graph.producer()
    users: dict[str, set[int]] = {}
    for op in graph.ops:
        if op.name in home:
            for name in op.inputs:
                if name in producer and producer[name].name in home:
                    users.setdefault(name, set()).add(home[op.name])
    for op in graph.ops:
        for out in op.outs:
            for there in sorted(users.get(out, ())):
                here = home[op.name]
                assert there >= here, f"{out} is made after it is used"
                if there > here:
                    found.setdefault((here, there), {})[out] = None
    return {edge: tuple(names) for edge, names in sorted(found.items())}


@dataclass(frozen=True)
class Costs:
    """Per block: seconds of a microbatch, bytes that stay (parameters, gradients, optimizer), bytes saved per microbatch in flight, bytes
    that live only while it runs."""

    seconds: np.ndarray
    fixed: np.ndarray
    saved: np.ndarray
    working: np.ndarray

    def spread(self, like: Sequence[int]) -> Costs:
        """The same for blocks that are like these."""
        at = list(like)
        return Costs(self.seconds[at], self.fixed[at], self.saved[at], self.working[at])


def balance(costs: Costs, stages: int, in_flight: Sequence[int], limit: float) -> tuple[tuple[int, ...] | None, float]:
    """The cuts with the least largest stage, by dynamic programming over the chain, each stage within `limit` bytes; and the bytes of the
    largest stage at best, whatever the limit.

    `in_flight`: microbatches whose saved values stage s holds at its peak. None if no cut fits or there are too few blocks.
    """
    n = len(costs.seconds)
    if stages > n:
        return None, np.inf
    time, fixed, saved = (np.concatenate([[0.0], np.cumsum(c)]) for c in (costs.seconds, costs.fixed, costs.saved))
    # [start, end] of a stage
    ahead = np.arange(n + 1)[None, :] > np.arange(n + 1)[:, None]
    took = np.where(ahead, time[None, :] - time[:, None], np.inf)
    stays, kept = fixed[None, :] - fixed[:, None], saved[None, :] - saved[:, None]
    peak = np.zeros((n + 1, n + 1))
    for start in range(n):
        peak[start, start + 1 :] = np.maximum.accumulate(costs.working[start:])
    best, least = np.full(n + 1, np.inf), np.full(n + 1, np.inf)
    best[0] = least[0] = 0.0
    back = []
    for s in range(stages):
        memory = np.where(ahead, stays + in_flight[s] * kept + peak, np.inf)
        worst = np.where(memory <= limit, np.maximum(best[:, None], took), np.inf)
        back.append(worst.argmin(axis=0))
        best = worst.min(axis=0)
        least = np.maximum(least[:, None], memory).min(axis=0)
    if not np.isfinite(best[n]):
        return None, float(least[n])
    cuts, end = [], n
    for s in reversed(range(stages)):
        end = int(back[s][end])
        cuts.append(end)
    return tuple(reversed(cuts)), float(least[n])


def needed_data(graph: Graph, apart: set[str], wanted: Sequence[str]) -> list[str]:
    """Names of the ops in `apart` that the wanted values need, in order."""
    need, found = set(wanted), []
    for op in reversed(graph.ops):
        if op.name in apart and any(out in need for out in op.outs):
            need.update(op.inputs)
            found.append(op.name)
    return found[::-1]
