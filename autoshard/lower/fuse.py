"""Fuse: before partitioning, ops that the plan runs as one become one.

In: a block's ops in order, the plan's groups of linears (`plan.merge`). Out: the same list with each group as one `Merged`, where its first
linear stood: all take the same input, and a weight depends on nothing. The merged weight is one local tensor, the shards of the parts one
below the other; how it comes to lie like that is `partition`'s and the runtime's.

>>> from autoshard.trace.graph import Ref
>>> linear = lambda name, weight: Op(name, "aten.linear.default", (Ref("x"), Ref(weight)), {}, (name,))
>>> relu = Op("r", "aten.relu.default", (Ref("q"),), {}, ("r",))
>>> [item.name for item in fuse([linear("q", "wq"), relu, linear("k", "wk")], [("q", "k")])]
['q+k', 'r']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..trace.graph import Op


@dataclass(frozen=True)
class Merged:
    """Linears of one input as one."""

    ops: tuple[Op, ...]

    @property
    def name(self) -> str:
        return "+".join(op.name for op in self.ops)

    @property
    def input(self) -> str:
        return self.ops[0].inputs[0]

    @property
    def weights(self) -> list[str]:
        return [op.inputs[1] for op in self.ops]


def fuse(ops: Sequence[Op], groups: Sequence[tuple[str, ...]]) -> list[Op | Merged]:
    """The ops, with those of a group in one place."""
    by_name = {op.name: op for op in ops}
    merged = {name: Merged(tuple(by_name[n] for n in group)) for group in groups if group[0] in by_name for name in group}
    found: dict[str, Op | Merged] = {}
    for op in ops:
        item = merged.get(op.name, op)
        found.setdefault(item.name, item)
    return list(found.values())


def joined(names: Sequence[str]) -> str:
    """What stands for several parameters' shards as one tensor, where a value's name would stand."""
    return "merged:" + "+".join(names)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.linear.default(x, weight)


def linears(x: torch.Tensor, weight: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """One matmul; each part's columns of the result."""
    return linear(x, weight).split(list(rows), -1)
