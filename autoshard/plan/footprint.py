"""Footprint: the bytes that each choice of the solver holds, as tables over the same variables as its costs.

In: a `Space`, its blocks. Out: for each op's operand and each parameter, which bytes count where: what `Chooser.footprint` turns into
tables that a price per byte multiplies. Parameters are exact (as stored, as the loop uses them, gradients, optimizer). What a block keeps
for its backward is a minimum cut, which is no sum over ops; here the values of the cut of the undivided block count, each in the layout in
which it is read (the layout in which it was made, where nothing reads it itself but others are made from it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..layout import Layout, S
from ..trace.blocks import Block
from ..trace.graph import Graph, Tensor
from .moves import numel
from .saved import kept_values
from .space import Space


@dataclass(frozen=True)
class Kept:
    """A value that a block keeps: the ops of the block whose backward reads it (none: it counts where it is made)."""

    name: str
    readers: tuple[str, ...]


@dataclass
class Footprint:
    """`kept`: per block. `charged`: parameter → the op with which it counts, its first user. `zero`: whether dp shares storage."""

    kept: list[list[Kept]]
    charged: dict[str, str] = field(default_factory=dict)
    zero: bool = True
    small: float = 0.0

    @classmethod
    def of(cls, space: Space, blocks: Sequence[Block], zero: bool, small: float) -> Footprint:
        graph = space.split.graph
        ops = {op.name: op for op in graph.ops}
        charged: dict[str, str] = {}
        kept, known = [], {}
        for block in blocks:
            inputs = [n for name in block.ops for n in ops[name].inputs]
            for name in block.ops:
                for operand in ops[name].inputs:
                    if operand in space.storage:
                        charged.setdefault(operand, name)
            # a kind's values by position
            key = block.kind
            names = list(dict.fromkeys([*inputs, *(out for name in block.ops for out in ops[name].outs)]))
            if key not in known:
                found = kept_values([ops[n] for n in block.ops], graph, space)
                known[key] = [(names.index(n), tuple(block.ops.index(r) for r in readers)) for n, readers in found.items()]
            kept.append([Kept(names[i], tuple(block.ops[r] for r in readers)) for i, readers in known[key]])
        return cls(kept, charged, zero, small)

    def stored(self, tensor: Tensor, layout: Layout, sizes: tuple[int, ...]) -> Layout:
        return zero_layout(tensor, layout, sizes[0], self.small) if self.zero else layout


def param_bytes(tensor: Tensor, storage: Layout, use: Layout, sizes: tuple[int, ...], trainable: bool) -> tuple[float, float, float]:
    """(parameter, gradient, optimizer): as stored, with two moments and a float32 master where it is half; and as used in the loop,
    where that is more than what is stored."""
    stored = numel(tensor, storage, sizes)
    used = numel(tensor, use, sizes)
    size = tensor.bytes / max(tensor.numel, 1)
    held = (stored + (used if used > stored else 0)) * size
    if not trainable:
        return held, 0.0, 0.0
    state = 8 + (4 if size < 4 else 0) if size <= 4 else 2 * size
    return held, held, stored * state


def zero_layout(tensor: Tensor, layout: Layout, dp: int, small: float) -> Layout:
    """Where dp replicates a parameter that isn't small, a shard of it on each rank (ZeRO; Rajbhandari et al., 2020)."""
    if dp == 1 or layout[0].kind == "S" or tensor.bytes < small:
        return layout
    free = [d for d, n in enumerate(tensor.shape) if n >= dp and not (layout[1].kind == "S" and layout[1].dim == d)]
    even = [d for d in free if tensor.shape[d] % dp == 0]
    return (S((even or free)[0]), *layout[1:]) if free else layout


def shard_storage(graph: Graph, sizes: tuple[int, int], storage: dict[str, Layout], small: float) -> None:
    """Store every parameter as `zero_layout` says."""
    for v in graph.sources("param"):
        storage[v.name] = zero_layout(v.tensor, storage[v.name], sizes[0], small)
