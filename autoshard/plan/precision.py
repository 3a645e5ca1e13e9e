"""Precision: which linears multiply in fp8.

In: the graph of one microbatch, its blocks, the placements, groups of merged linears, a recipe. Out: linear → recipe, and the seconds and
bytes that follow. "fp8" scales each tensor by its own largest magnitude: x and W in e4m3, gradients in e5m2, everything else as it is
(parameters, their gradients and the optimizer too).

A linear is taken by what it is and by sizes, not by name: its weight is a parameter; another matmul follows it (what the loss is made of
stays precise: the head); every rank's rows, columns and tokens are multiples of 16, as the matmul wants them; and it is faster, casts
included. A device that multiplies no fp8 plays it, slower: there sizes alone decide.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..errors import PlanFileError
from ..layout import local_shape
from ..trace.blocks import Block, is_heavy
from ..trace.graph import Graph, Op, Value
from .merge import LINEAR, Group
from .space import Pair, Placements

RECIPES = ("fp8",)
MULTIPLE = 16
"""Of every dim of a matmul's operands: cuBLAS wants fp8 in 16-byte steps."""


class Prices(Protocol):
    """What the planner pays; see `plan.prices`."""

    @property
    def multiplies_fp8(self) -> bool: ...

    def halving(self, m: int, n: int, k: int, dtype: str, wanted: bool, trained: bool) -> float: ...


@dataclass
class Chosen:
    """`ops`: linear → recipe. `gains`: the first linear of each matmul → seconds of a microbatch that it saves. `left`: reason → weights of
    linears that stay as they are."""

    ops: dict[str, str] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        found = []
        for why, paths in self.left.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            found.append(f"not in fp8, because {why}: {paths[0]}{more}")
        return found


def choose(
    graph: Graph, blocks: Sequence[Block], placed: Placements, prices: Prices, sizes: tuple[int, ...], groups: Sequence[Group],
    recipe: str | None,
) -> Chosen:  # fmt: skip
    """The linears that run by the recipe; none without one."""
    found = Chosen()
    if not recipe:
        return found
    ops, followed = {op.name: op for op in graph.ops}, _followed(graph)
    merged = {name: group for group in groups for name in group}
    for block in blocks:
        for name in block.ops:
            group = merged.get(name, (name,))
            if name != group[0] or not _linear(graph, ops[name]):
                continue
            why = "they make the loss" if not followed[name] else _misfit(graph, [ops[n] for n in group], placed.ops, sizes)
            if not why:
                gain = _gain(graph, [ops[n] for n in group], placed.ops, prices, sizes)
                why = "their casts cost more than they save" if gain <= 0 and prices.multiplies_fp8 else ""
            if why:
                found.left.setdefault(why, []).extend(graph.values[ops[n].inputs[1]].path for n in group)
                continue
            found.gains[name] = gain
            found.ops |= dict.fromkeys(group, recipe)
    if not found.ops:
        found.left.setdefault("there is nothing that could be", ["no linear"])
    elif not prices.multiplies_fp8:
        found.left["this device multiplies no fp8, so that it is played, slower"] = [f"the linears, {len(found.ops)} of them"]
    return found


def credit(compute: np.ndarray, params: np.ndarray, graph: Graph, blocks: Sequence[Block], placed: Placements, chosen: Chosen,
           sizes: tuple[int, ...]) -> None:  # fmt: skip
    """Take what it saves from the blocks' seconds, and add what weights' casts hold to their bytes: two a weight."""
    ops, known = {op.name: op for op in graph.ops}, set()
    for i, block in enumerate(blocks):
        for name in block.ops:
            compute[i] -= chosen.gains.get(name, 0.0)
            if name in chosen.ops and ops[name].inputs[1] not in known:
                known.add(ops[name].inputs[1])
                n, k = _local(graph.values[ops[name].inputs[1]], 1, placed.ops[name], sizes, (0,) * len(sizes))
                params[i] += 2.0 * n * k


def check(precision: Mapping[str, str], graph: Graph, groups: Sequence[Group], placed: Mapping[str, Pair]) -> None:
    """Raise PlanFileError unless a plan's linears may run so (it may have been edited)."""
    ops = {op.name: op for op in graph.ops}
    for name, recipe in precision.items():
        if recipe not in RECIPES:
            raise PlanFileError(f"precision.{name}: found the recipe {recipe!r}", hint=f"expected {', '.join(RECIPES)}")
        if name not in ops or not _linear(graph, ops[name]) or any(s.body for s in placed[name]):
            raise PlanFileError(f"precision.{name}: it isn't a linear whose weight is a parameter", hint="others have no fp8 form")
    for group in groups:
        if len({precision.get(name) for name in group}) > 1:
            raise PlanFileError(
                f"precision: {' '.join(group)} are one matmul", hint="give all of them the same precision, or don't merge them"
            )


def _linear(graph: Graph, op: Op) -> bool:
    return op.target == LINEAR and graph.values[op.inputs[1]].role == "param" and graph.values[op.inputs[0]].role != "param"


def _followed(graph: Graph) -> dict[str, bool]:
    """Op → whether a matmul depends on what it makes."""
    reach: dict[str, bool] = {}
    found: dict[str, bool] = {}
    for op in reversed(graph.ops):
        found[op.name] = any(reach.get(out, False) for out in op.outs)
        for name in op.inputs:
            reach[name] = reach.get(name, False) or found[op.name] or is_heavy(op)
    return found


def _local(v: Value, operand: int, pair: Pair, sizes: tuple[int, ...], coords: tuple[int, ...]) -> tuple[int, ...]:
    return local_shape(v.tensor.shape, tuple(s.ins[operand] for s in pair), sizes, coords)


def _misfit(graph: Graph, group: Sequence[Op], placed: Mapping[str, Pair], sizes: tuple[int, ...]) -> str:
    for coords in itertools.product(*map(range, sizes)):
        n = 0
        for op in group:
            x, weight = (
                _local(graph.values[name], i, placed[op.name], sizes, coords) for i, name in zip((0, 1), op.inputs[:2], strict=True)
            )
            n, k, m = n + weight[0], weight[1], functools.reduce(lambda a, b: a * b, x[:-1], 1)
        if not all(size > 0 and size % MULTIPLE == 0 for size in (m, n, k)):
            return f"sizes aren't multiples of {MULTIPLE} on every rank"
    return ""


def _gain(graph: Graph, group: Sequence[Op], placed: Mapping[str, Pair], prices: Prices, sizes: tuple[int, ...]) -> float:
    first = group[0]
    x, weight = (graph.values[name] for name in first.inputs[:2])
    start = (0,) * len(sizes)
    n = sum(_local(graph.values[op.inputs[1]], 1, placed[op.name], sizes, start)[0] for op in group)
    *tokens, k = _local(x, 0, placed[first.name], sizes, start)
    return prices.halving(functools.reduce(lambda a, b: a * b, tokens, 1), n, k, weight.tensor.dtype, x.grad, weight.grad)
