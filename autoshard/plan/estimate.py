"""What placements cost, block by block: seconds of computation and of communication, bytes that stand, bytes kept for the backward.

In: the graph of one microbatch, its blocks, the placements chosen, prices. Out: `BlockCosts`, arrays with an entry per block, which
`search` sums over stages; and the refusals and rows that a report shows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..layout import Layout
from ..trace.blocks import Block
from .costs.memory import FRAGMENTATION
from .footprint import param_bytes
from .prices import Prices
from .saved import saved
from .space import Pair, Placements, Space
from .stages import Costs


@dataclass
class BlockCosts:
    """Per block. Seconds of a microbatch: `compute`, `communication`; once a step: `once`, the optimizer's, and what runs beside the loop:
    `gather` (parameters before their first use) and `reduce` (their gradients after the last). Bytes: `params` (stored and as used),
    `grads`, `optimizer`; `saved` per microbatch in flight; `working`, what lives only while the block runs."""

    compute: np.ndarray
    communication: np.ndarray
    once: np.ndarray
    gather: np.ndarray
    reduce: np.ndarray
    params: np.ndarray
    grads: np.ndarray
    optimizer: np.ndarray
    saved: np.ndarray
    working: np.ndarray

    def spread(self, like: Sequence[int]) -> BlockCosts:
        """The same for blocks that are like these."""
        return BlockCosts(*(getattr(self, f.name)[list(like)] for f in fields(self)))

    @classmethod
    def random(cls, seconds: np.ndarray) -> BlockCosts:
        """Costs that mean nothing: blocks take these seconds and no memory."""
        nothing = np.zeros(len(seconds))
        return cls(seconds, *(nothing for _ in fields(cls)[1:]))

    @property
    def seconds(self) -> np.ndarray:
        return self.compute + self.communication

    def beside(self, a: int, b: int) -> tuple[float, float]:
        """Of what runs beside the loop in the stage of blocks [a, b): the seconds that the loop waits for, and those that it hides. Gathers
        hide behind the first microbatch's forward, each done before its block begins; reductions behind the last one's backward, each begun
        when its block is done. (A bucket of several blocks is taken for as many.)"""
        forward, moves = self.seconds[a:b] / 3, self.gather[a:b].sum() + self.reduce[a:b].sum()
        loop = lane = 0.0
        for gather, seconds in zip(self.gather[a:b], forward, strict=True):
            lane += gather
            loop = max(loop, lane) + seconds
        waits = loop - forward.sum()
        loop = lane = 0.0
        for reduce, seconds in zip(self.reduce[a:b][::-1], 2 * forward[::-1], strict=True):
            loop += seconds
            lane = max(loop, lane) + reduce
        waits = float(max(waits, 0.0) + max(lane - loop, 0.0))
        return waits, max(float(moves - waits), 0.0)

    def for_stages(self) -> Costs:
        fixed = self.params + self.grads + self.optimizer
        return Costs(self.seconds, fixed, self.saved * FRAGMENTATION, self.working * FRAGMENTATION)

    def memory(self, a: int, b: int, in_flight: int, message: float) -> dict[str, int]:
        """Peak bytes of the stage of blocks [a, b) on a rank, by what they are for."""
        parts = {
            "parameters": self.params[a:b].sum(),
            "gradients": self.grads[a:b].sum(),
            "optimizer": self.optimizer[a:b].sum(),
            "activations": in_flight * self.saved[a:b].sum() * FRAGMENTATION,
            "working": self.working[a:b].max(initial=0.0) * FRAGMENTATION,
            "buffers": message,
        }
        found = {name: int(size) for name, size in parts.items()}
        return {**found, "total": sum(found.values())}


def block_costs(space: Space, blocks: Sequence[Block], placed: Placements, prices: Prices, fp8: Collection[str] = ()) -> BlockCosts:
    """A parameter counts where it is used first. `fp8`: linears that keep their input in 8 bits."""
    graph = space.split.graph
    ops, producer = {op.name: op for op in graph.ops}, graph.producer()
    held: dict[str, Layout] = dict(space.held)
    for name, pair in placed.ops.items():
        for i, out in enumerate(ops[name].outs):
            held[out] = tuple(s.outs[i] for s in pair)
    costs = BlockCosts(*(np.zeros(len(blocks)) for _ in fields(BlockCosts)))
    charged: set[str] = set()
    moved: set[tuple[str, Layout]] = set()
    kept: dict[object, tuple[float, float]] = {}
    for i, block in enumerate(blocks):
        for name in block.ops:
            op, pair = ops[name], placed.ops[name]
            costs.compute[i] += prices.one(op, graph, pair, space.sizes)
            for j, operand in enumerate(op.inputs):
                v, want = graph.values[operand], tuple(s.ins[j] for s in pair)
                if v.role != "param":
                    if held[operand] != want:
                        costs.communication[i] += prices.move(v.tensor, held[operand], want, space.sizes, v.grad)
                        if operand in producer and producer[operand].name in placed.ops:
                            source = producer[operand]
                            costs.communication[i] -= prices.hidden(source, graph, placed.ops[source.name], want, space.sizes)
                    continue
                storage = placed.storage[operand]
                if (operand, want) not in moved:
                    moved.add((operand, want))
                    there = prices.move(v.tensor, storage, want, space.sizes, False)
                    costs.gather[i] += there
                    costs.reduce[i] += prices.move(v.tensor, storage, want, space.sizes, True) - there if v.grad else 0.0
                if operand not in charged:
                    charged.add(operand)
                    costs.once[i] += float(prices.stored(v.tensor, [storage], space.sizes, v.grad)[0])
                    sizes = param_bytes(v.tensor, storage, want, space.sizes, v.grad)
                    for part, size in zip((costs.params, costs.grads, costs.optimizer), sizes, strict=True):
                        part[i] += size
        eight = tuple(n in fp8 for n in block.ops)
        key = (block.kind, eight, tuple(id(placed.ops[n]) for n in block.ops), tuple(held.get(n) for b in block.ops for n in ops[b].inputs))
        if key not in kept:
            kept[key] = saved([ops[n] for n in block.ops], placed.ops, held, graph, space.sizes, fp8)
        costs.saved[i], costs.working[i] = kept[key]
    return costs


def kinds(space: Space, blocks: Sequence[Block], placed: Placements, costs: BlockCosts, count: Sequence[int]) -> list[dict[str, Any]]:
    """A row per way in which blocks run: what it is, how often, its seconds and bytes, where its parameters lie, how its matmuls run."""
    graph = space.split.graph
    ops = {op.name: op for op in graph.ops}
    rows: dict[object, dict[str, Any]] = {}
    for i, block in enumerate(blocks):
        named = [ops[n] for n in block.ops]
        params = dict.fromkeys(n for op in named for n in op.inputs if graph.values[n].role == "param")
        storage = {graph.values[n].path: _text(placed.storage[n]) for n in params}
        heavy = {op.name: _text(placed.ops[op.name]) for op in named if any(n in params for n in op.inputs) and len(op.outs) == 1}
        key = (block.kind, tuple(storage.values()), tuple(heavy.values()))
        if key in rows:
            rows[key]["count"] += int(count[i])
            continue
        rows[key] = {
            "kind": block.kind,
            "count": int(count[i]),
            "label": next((op.module for op in named if any(n in params for n in op.inputs) and op.module), named[0].module),
            "seconds": float(costs.seconds[i]),
            "saved_bytes": int(costs.saved[i]),
            "storage": storage,
            "ops": heavy,
        }
    return list(rows.values())


def _text(each: Layout | Pair) -> str:
    return " ; ".join(map(str, each))
