"""Merge: linears of one input become one matmul over the rows of all their weights, where that is legal and pays.

In: the graph of one microbatch, its blocks, the placements. Out: groups of op names (q, k, v; gate, up). A rank's merged weight is its own
shards, one below the other, so nothing depends on how evenly they are cut. It costs no copy in the loop: parameters that are used as they
are stored lie in one buffer and are views of it (`runtime.executor.State.joined`); of gathered ones the merged weight is what the gather
routine makes. Where neither is possible the linears stay apart, and `Merges.notes` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..errors import PlanFileError
from ..layout import Layout, gradient, transition
from ..trace.blocks import Block
from ..trace.graph import Graph, Op, Tensor
from .moves import path
from .saved import VIEWS, WHOLE
from .space import Pair, Placements

LINEAR = "aten.linear.default"
Group = tuple[str, ...]
"""Names of the linears, in the order in which they stand."""


@dataclass
class Merges:
    """`groups`: what may be merged. `apart`: reason → weights that share their input with others and may not."""

    groups: list[Group] = field(default_factory=list)
    apart: dict[str, list[str]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        more = {why: f" and {len(paths) - 1} more" if len(paths) > 1 else "" for why, paths in self.apart.items()}
        return [f"linears of one input that aren't merged, because {why}: {paths[0]}{more[why]}" for why, paths in self.apart.items()]


def mergeable(
    graph: Graph, blocks: Sequence[Block], placed: Mapping[str, Pair], storage: Mapping[str, Layout], sizes: tuple[int, ...]
) -> Merges:
    """Every group of linears that may be one matmul."""
    ops = {op.name: op for op in graph.ops}
    users: dict[str, int] = {}
    for op in graph.ops:
        for name in op.inputs:
            users[name] = users.get(name, 0) + 1
    found = Merges()
    for block in blocks:
        sharing: dict[str, list[Op]] = {}
        for name in block.ops:
            op = ops[name]
            if op.target == LINEAR and len(op.inputs) == 2 and graph.values[op.inputs[0]].role != "param":
                sharing.setdefault(op.inputs[0], []).append(op)
        for linears in sharing.values():
            if len(linears) > 1:
                _divide(found, graph, linears, users, placed, storage, sizes)
    return found


def _divide(
    found: Merges, graph: Graph, linears: Sequence[Op], users: Mapping[str, int], placed: Mapping[str, Pair], storage: Mapping[str, Layout],
    sizes: tuple[int, ...],
) -> None:  # fmt: skip
    """Linears of one input, into groups that may be merged and those that may not."""
    alike: dict[object, list[Op]] = {}
    for op in linears:
        v = graph.values[op.inputs[1]]
        if v.role != "param":
            found.apart.setdefault("their weights are computed", []).append(_place(graph, op))
        elif users[v.name] > 1:
            found.apart.setdefault("a weight has other uses", []).append(_place(graph, op))
        else:
            alike.setdefault(_kind(graph, op, placed, storage, sizes), []).append(op)
    for group in alike.values():
        if len(group) > 1:
            found.groups.append(tuple(op.name for op in group))
    if len(alike) > 1 and (lone := [group[0] for group in alike.values() if len(group) == 1]):
        found.apart.setdefault("they are trained, typed or placed differently", []).extend(_place(graph, op) for op in lone)


def _place(graph: Graph, op: Op) -> str:
    return graph.values[op.inputs[1]].path or op.module or op.name


def _kind(graph: Graph, op: Op, placed: Mapping[str, Pair], storage: Mapping[str, Layout], sizes: tuple[int, ...]) -> object:
    """Linears of one input with equal kinds may be merged: they take the input in one layout, and their weights lie alike, are used alike
    and are trained alike. How a dim is cut may differ."""
    v, use = graph.values[op.inputs[1]], used_as(op, placed)
    stored = storage[v.name]
    x = tuple(s.ins[0] for s in placed[op.name])
    return x, v.grad, v.tensor.dtype, _like(stored), _like(use), how(v.tensor.shape, stored, use, sizes)


def _like(layout: Layout) -> tuple[tuple[str, int], ...]:
    return tuple((t.kind, t.dim) for t in layout)


def used_as(op: Op, placed: Mapping[str, Pair]) -> Layout:
    """The layout in which a linear takes its weight."""
    return tuple(s.ins[1] for s in placed[op.name])


def how(shape: tuple[int, ...], stored: Layout, use: Layout, sizes: tuple[int, ...]) -> str:
    """What becomes of a stored weight: "stored" (used as it lies), "whole" (every element stays where it is, at most its gradient is
    summed, so that merged shards can go the way together) or "gathered" (merged as it arrives)."""
    if stored == use:
        return "stored"
    steps = path(shape, stored, use, sizes) or ()
    stays = all(transition(a, b) == "nothing" and transition(gradient(b), gradient(a)) in ("nothing", "all_reduce") for _, a, b in steps)
    return "whole" if stays else "gathered"


def check(
    groups: Sequence[Group], graph: Graph, blocks: Sequence[Block], placed: Mapping[str, Pair], storage: Mapping[str, Layout],
    sizes: tuple[int, ...],
) -> None:  # fmt: skip
    """Raise PlanFileError unless a plan's groups may be merged (it may have been edited)."""
    legal = {name: i for i, group in enumerate(mergeable(graph, blocks, placed, storage, sizes).groups) for name in group}
    seen: set[str] = set()
    for group in groups:
        odd = next((name for name in group if name not in legal or legal[name] != legal[group[0]] or name in seen), None)
        if odd is not None or len(group) < 2 or len(set(group)) < len(group):
            raise PlanFileError(
                f"merge: {' '.join(group)} can't be one matmul{f', because of {odd}' if odd else ''}",
                hint="merged linears stand in one block, take one input in one layout, and have weights of their own that lie alike",
            )
        seen.update(group)


def decide(
    graph: Graph, blocks: Sequence[Block], placed: Placements, prices: Prices, sizes: tuple[int, ...], pin: Any = None
) -> tuple[list[Group], list[str]]:
    """The groups to merge, and notes on those that can't be. `pin`: all (True), none (False), or lists of weights' paths, of which those
    that may are merged; without it what saves time."""
    if pin is False:
        return [], []
    found = mergeable(graph, blocks, placed.ops, placed.storage, sizes)
    if pin is None:
        gains = savings(found.groups, graph, placed, prices, sizes)
        return [group for group, gain in zip(found.groups, gains, strict=True) if gain > 0], found.notes
    if pin is True:
        return found.groups, found.notes
    return _named(found, graph, pin), found.notes


def credit(
    compute: np.ndarray, graph: Graph, blocks: Sequence[Block], placed: Placements, prices: Prices, sizes: tuple[int, ...], pin: Any = None
) -> None:
    """Take what merging saves from the blocks' seconds."""
    home = {name: i for i, block in enumerate(blocks) for name in block.ops}
    groups, _ = decide(graph, blocks, placed, prices, sizes, pin)
    for group, gain in zip(groups, savings(groups, graph, placed, prices, sizes), strict=True):
        compute[home[group[0]]] -= gain


def _named(found: Merges, graph: Graph, pin: Sequence[Sequence[str]]) -> list[Group]:
    ops = {op.name: op for op in graph.ops}
    wanted: dict[str, int] = {path: i for i, paths in enumerate(pin) for path in paths}
    chosen = []
    for group in found.groups:
        parts: dict[int, list[str]] = {}
        for name in group:
            place = wanted.get(graph.values[ops[name].inputs[1]].path)
            if place is not None:
                parts.setdefault(place, []).append(name)
        chosen += [tuple(names) for names in parts.values() if len(names) > 1]
    return chosen


Placed = tuple[Tensor, Layout, bool]
"""A tensor, how it lies, and whether it has a gradient."""


class Prices(Protocol):
    """What the planner pays; see `plan.prices`."""

    def merging(self, x: Placed, weights: Sequence[Placed], copied: float, gathered: bool, sizes: tuple[int, ...]) -> float: ...


def savings(groups: Sequence[Group], graph: Graph, placed: Placements, prices: Prices, sizes: tuple[int, ...]) -> list[float]:
    """Seconds of a microbatch that merging each group saves."""
    ops, consumers, found = {op.name: op for op in graph.ops}, graph.consumers(), []
    for group in groups:
        linears = [ops[name] for name in group]
        x = graph.values[linears[0].inputs[0]]
        weights, outs = (
            [graph.values[name] for name in names] for names in zip(*((op.inputs[1], op.outs[0]) for op in linears), strict=True)
        )
        uses = [used_as(op, placed.ops) for op in linears]
        slow = sum(v.tensor.numel for v in outs if copied(graph, consumers, v.name)) / max(sum(v.tensor.numel for v in outs), 1)
        gathered = how(weights[0].tensor.shape, placed.storage[weights[0].name], uses[0], sizes) == "gathered"
        taken = (x.tensor, tuple(s.ins[0] for s in placed.ops[group[0]]), x.grad)
        found.append(prices.merging(taken, [(v.tensor, use, v.grad) for v, use in zip(weights, uses, strict=True)], slow, gathered, sizes))
    return found


def copied(graph: Graph, consumers: Mapping[str, Sequence[Op]], name: str) -> bool:
    """Whether a value's gradient has to be copied into that of the merged result: where it comes out of a kernel. A pointwise op that the
    compiler fuses writes it there itself."""
    for op in consumers.get(name, ()):
        kind = op.target.split(".")[1]
        if kind in WHOLE or (kind in VIEWS and any(copied(graph, consumers, out) for out in op.outs)):
            return True
    return False


def weights(groups: Sequence[Group], graph: Graph) -> list[tuple[str, ...]]:
    """The parameters' paths of each group."""
    ops = {op.name: op for op in graph.ops}
    return [tuple(graph.values[ops[name].inputs[1]].path for name in group) for group in groups]
