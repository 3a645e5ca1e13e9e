"""Run a graph's ops on shards, every value kept: to compare each with the whole, and to find the first op that differs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from autoshard.layout import Layout, dim_positions
from autoshard.lower.differentiate import differentiate
from autoshard.lower.partition import Partitioner, value_name
from autoshard.mesh import Mesh
from autoshard.plan.microbatch import TimeSplit
from autoshard.plan.space import Placements
from autoshard.runtime.coroutine import coroutine
from autoshard.runtime.in_process import Player

Locals = dict[str, list[torch.Tensor]]


def take(whole: torch.Tensor, layout: Layout, sizes: tuple[int, ...], coords: tuple[int, ...]) -> torch.Tensor:
    """What a rank holds of a whole tensor; of a pending sum, one of unequal terms of alternating sign."""
    local = whole
    for d, n in enumerate(whole.shape):
        local = local.index_select(d, torch.from_numpy(dim_positions(n, d, layout, sizes, coords)))
    for t, k, c in zip(layout, sizes, coords, strict=True):
        if t.kind == "P" and t.reduce == "sum" and k > 1:
            local = local * (k if c == 0 else 3.0 * (-1) ** c) - (0 if c else local * (k - 1 + sum(3.0 * (-1) ** i for i in range(1, k))))
    return local


def assemble(parts: Mapping[tuple[int, ...], torch.Tensor], shape: tuple[int, ...], layout: Layout, sizes: tuple[int, ...]) -> torch.Tensor:
    """The whole tensor of what the ranks hold. Raises AssertionError where replicas differ."""
    some = next(iter(parts.values()))
    whole = torch.zeros(shape, dtype=some.dtype)
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    for coords, part in parts.items():
        key = tuple(c if t.kind in "SP" else 0 for c, t in zip(coords, layout, strict=True))
        if key in seen:
            torch.testing.assert_close(part, seen[key], msg="replicas differ")
            continue
        seen[key] = part
        index = [torch.from_numpy(dim_positions(n, d, layout, sizes, coords)) for d, n in enumerate(shape)]
        grid = torch.meshgrid(*index, indexing="ij") if index else ()
        if any(t.kind == "P" and t.reduce == "max" for t in layout):
            first = len(seen) == 1
            whole[grid] = part if first else torch.maximum(whole[grid], part)
        else:
            whole[grid] = whole[grid] + part if part.dtype != torch.bool else whole[grid] | part
    return whole


def forward(
    split: TimeSplit, placed: Placements, sizes: tuple[int, int], sources: Mapping[str, torch.Tensor], opaque=None
) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Every value of the graph, computed on shards and assembled. One microbatch; `sources`: whole tensors by value name."""
    graph = split.graph
    held: dict[str, Layout] = dict(placed.inputs)
    for op in graph.ops:
        held |= {out: tuple(s.outs[i] for s in placed.ops[op.name]) for i, out in enumerate(op.outs)}
    params = {v.name: "" for v in graph.sources("param")}
    everything = [(out, held[out]) for op in graph.ops for out in op.outs]
    mesh = Mesh(("dp", "tp"), sizes)
    runs, ranks = [], list(itertools.product(range(sizes[0]), range(sizes[1])))
    for coords in ranks:
        part = Partitioner(graph, placed.ops, held, sizes, coords, 1, opaque=opaque or {})
        routine = part.block(graph.ops, params, everything, "all")
        where = {"dp": coords[0], "tp": coords[1], "mb": 0}
        named = {value_name(n, layout): (n, layout) for n, layout in [*held.items(), *_uses(split, placed)]}
        given = []
        for port in routine.inputs:
            if port.name in routine.rank_inputs:
                spec = routine.rank_inputs[port.name]
                given.append(torch.tensor(7) if spec.kind == "seed" else spec.tensor({"dp": sizes[0], "tp": sizes[1], "mb": 1}, where))
            else:
                name, layout = named[port.name]
                given.append(take(sources[name], layout, sizes, coords))
        runs.append(coroutine(differentiate(routine).forward)(*given))
    with torch.no_grad():
        results = Player(mesh, runs, lambda rank: "forward").play()
    found = {}
    for i, (name, layout) in enumerate(everything):
        parts = {coords: results[r][i] for r, coords in enumerate(ranks)}
        try:
            found[name] = assemble(parts, graph.values[name].tensor.shape, layout, sizes)
        except AssertionError as error:
            found[name] = torch.tensor(float("nan"))
            error.add_note(f"{name} {layout}")
    return found


def _uses(split: TimeSplit, placed: Placements) -> list[tuple[str, Layout]]:
    return [
        (name, tuple(s.ins[i] for s in placed.ops[op.name]))
        for op in split.graph.ops
        for i, name in enumerate(op.inputs)
        if split.graph.values[name].role == "param"
    ]
