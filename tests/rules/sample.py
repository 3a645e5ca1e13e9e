"""One op call, and how to run it on shards: `Sample` holds it whole, `on_shards` runs it under strategies through the real
partitioner, `disagreement` says in which output or gradient the shards differ from the whole.

The op itself never communicates, so the inputs are handed to each rank in the strategy's own types and no collective runs.
Pending inputs are unequal terms of alternating sign with noise of their own, so that a rule can't pass by symmetry.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autoshard.layout import Layout, R, dim_positions, gradient
from autoshard.lower.partition import Partitioner, Routine, value_name
from autoshard.trace import graph as ir
from autoshard.trace.graph import Graph, Op, Ref, Value
from autoshard.trace.interpret import call, resolve
from autoshard.trace.ops.rule import Strategy

Coords = tuple[int, ...]


@dataclass
class Sample:
    """An op call on whole tensors, its results, and the gradients of a random linear function of them."""

    name: str
    op: Op
    graph: Graph
    tensors: dict[str, Tensor]
    microbatches: int = 1
    outs: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    cotangents: list[Tensor | None] = field(default_factory=list)

    def operands(self) -> list[Value]:
        return [self.graph.values[n] for n in self.op.inputs]

    def results(self) -> list[Value]:
        return [self.graph.values[n] for n in self.op.outs]


def sample(target: str, *args: Any, frozen: Sequence[int] = (), note: str = "", microbatches: int = 1, **kwargs: Any) -> Sample:
    """Tensors among the arguments become operands. `frozen`: floating ones (by number) without gradient."""
    graph, tensors = Graph(), {}

    def take(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            name = f"x{len(tensors)}"
            tensors[name] = tree
            grad = (tree.is_floating_point() or tree.is_complex()) and len(tensors) - 1 not in frozen
            graph.add_value(name, _described(tree), role="input", grad=grad)
            return Ref(name)
        if isinstance(tree, (tuple, list)):
            return tuple(take(t) for t in tree)
        return tree

    op = Op("y", target, take(args), {k: take(v) for k, v in kwargs.items()}, ())
    found = Sample(f"{target} {note}".strip(), op, graph, tensors, microbatches)
    _run_whole(found)
    return found


def _described(t: Tensor) -> ir.Tensor:
    return ir.Tensor(tuple(t.shape), str(t.dtype).removeprefix("torch."))


def _run_whole(s: Sample) -> None:
    leaves = {n: t.clone().requires_grad_(s.graph.values[n].grad) for n, t in s.tensors.items()}
    with torch.enable_grad():
        if _plain(s.op.target):
            args, kwargs = ir.map_refs((s.op.args, s.op.kwargs), lambda ref: leaves[ref.name])
            made = call(s.op.target, args, kwargs, device="cpu")
            results = list(made) if isinstance(made, tuple) else [made]
        else:  # an op that exists only as a body: whole is what one rank does
            shape = s.op.args[0] if not s.tensors else next(iter(s.tensors.values())).shape
            if s.op.target == "autoshard.time_slice.default":
                dim = s.op.args[1]
                shape = tuple(n // s.microbatches if d == dim else n for d, n in enumerate(shape))
            kind = "float64" if not s.tensors else _described(next(iter(s.tensors.values()))).dtype
            s.op.outs = ("y",)
            s.graph.add_op(s.op, [ir.Tensor(tuple(shape), kind)], grad=bool(s.tensors))
            whole = Strategy((R,) * len(s.tensors), (R,), "whole")
            results = list(on_shards(s, (whole, whole), (1, 1), leaves)[0, 0][1])
    if not s.op.outs:
        s.op.outs = ("y",) if len(results) == 1 else tuple(f"y.{i}" for i in range(len(results)))
        s.graph.add_op(s.op, [_described(t) for t in results])
        for name, t in zip(s.op.outs, results, strict=True):
            s.graph.values[name].grad = t.requires_grad
    s.cotangents = [noise(t.shape, 11 + i).to(t.dtype) if t.requires_grad else None for i, t in enumerate(results)]
    try:
        s.gradients = _gradients(results, s.cotangents, leaves, s)
    except RuntimeError as error:
        assert "not implemented" in str(error), s.name  # torch has no derivative of the op
        for v in s.graph.values.values():
            v.grad = False
    s.outs = [t.detach() for t in results]


def _plain(target: str) -> bool:
    return not target.startswith(("autoshard.dropout_mask", "autoshard.time_")) and resolve(target) is not None


def _gradients(outs: Sequence[Tensor], cotangents: Sequence[Tensor | None], leaves: Mapping[str, Tensor], s: Sample) -> dict[str, Tensor]:
    pairs = [(o, g) for o, g in zip(outs, cotangents, strict=True) if g is not None and o.requires_grad]
    wanted = [n for n in leaves if s.graph.values[n].grad]
    if not pairs or not wanted:
        return {}
    found = torch.autograd.grad([o for o, _ in pairs], [leaves[n] for n in wanted], [g for _, g in pairs], allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(wanted, found, strict=True)}


def noise(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- shards ---------------------------------------------------------------------------------------------------------


def take(whole: Tensor, layout: Layout, sizes: Sequence[int], coords: Coords) -> Tensor:
    """What a rank holds of a whole tensor."""
    local = whole
    for axis, (t, k) in enumerate(zip(layout, sizes, strict=True)):
        if t.kind == "P" and k > 1:
            local = _terms(local, k, axis)[coords[axis]] if t.reduce == "sum" else _below(local, k, coords[axis])
    for d, n in enumerate(whole.shape):
        held = dim_positions(n, d, layout, tuple(sizes), coords)
        if len(held) < n:
            local = local.index_select(d, torch.from_numpy(held))
    return local


def _terms(x: Tensor, parts: int, seed: int) -> list[Tensor]:
    """Unequal terms that sum to x."""
    later = [(3.0 * (-1) ** c) * x + (c + 1) * noise(x.shape, 100 + 10 * seed + c).to(x.dtype) for c in range(1, parts)]
    return [x - sum(later[1:], later[0]), *later]


def _below(x: Tensor, parts: int, coord: int) -> Tensor:
    """x itself at some elements, less elsewhere; the maximum over the coordinates is x."""
    at = torch.arange(x.numel()).reshape(x.shape) % parts
    return torch.where(at == coord, x, x - 1 - coord)


def assemble(parts: Mapping[Coords, Tensor], shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> Tensor | str:
    """The whole tensor of what the ranks hold, or what is wrong with it."""
    some = next(iter(parts.values()))
    whole = torch.zeros(tuple(shape), dtype=some.dtype)
    seen: dict[Coords, Tensor] = {}
    for coords, part in parts.items():
        key = tuple(c if t.kind in "SP" else 0 for c, t in zip(coords, layout, strict=True))
        if key in seen:
            if not same(part, seen[key]):
                return "replicas differ"
            continue
        index = [torch.from_numpy(dim_positions(n, d, layout, tuple(sizes), coords)) for d, n in enumerate(shape)]
        if tuple(part.shape) != tuple(len(i) for i in index):
            return f"a rank holds {tuple(part.shape)}, expected {tuple(len(i) for i in index)}"
        grid = torch.meshgrid(*index, indexing="ij") if index else ()
        if any(t.reduce == "max" for t in layout):
            whole[grid] = torch.maximum(whole[grid], part) if seen else part
        else:
            whole[grid] = whole[grid] | part if part.dtype == torch.bool else whole[grid] + part
        seen[key] = part
    return whole


def same(a: Tensor, b: Tensor) -> bool:
    near = 1e-5 if torch.float32 in (a.dtype, b.dtype) else 1e-9
    return a.shape == b.shape and torch.allclose(a, b, rtol=near, atol=near, equal_nan=True)


def ranks(sizes: Sequence[int]) -> list[Coords]:
    return list(itertools.product(*(range(k) for k in sizes)))


def routine(s: Sample, pair: tuple[Strategy, Strategy], sizes: tuple[int, int], coords: Coords) -> Routine:
    """The partitioner's routine of the op on one rank."""
    held = {n: tuple(p.ins[i] for p in pair) for i, n in enumerate(s.op.inputs)}
    part = Partitioner(s.graph, {s.op.name: pair}, held, sizes, coords, s.microbatches)  # type: ignore[arg-type]
    return part.block([s.op], {}, [(n, tuple(p.outs[i] for p in pair)) for i, n in enumerate(s.op.outs)], "op")


Run = tuple[dict[str, Tensor], tuple[Tensor, ...]]


def on_shards(s: Sample, pair: tuple[Strategy, Strategy], sizes: tuple[int, int], tensors: Mapping[str, Tensor]) -> dict[Coords, Run]:
    """Each rank's leaves by operand name, and its outputs."""
    found = {}
    layouts = {n: tuple(p.ins[i] for p in pair) for i, n in enumerate(s.op.inputs)}
    named = {value_name(n, layout): n for n, layout in layouts.items()}
    for coords in ranks(sizes):
        made = routine(s, pair, sizes, coords)
        where = {"dp": coords[0], "tp": coords[1], "mb": s.microbatches - 1}
        leaves, given = {}, []
        for port in made.inputs:
            if spec := made.rank_inputs.get(port.name):
                axes = {"dp": sizes[0], "tp": sizes[1], "mb": s.microbatches}
                given.append(torch.tensor(7) if spec.kind == "seed" else spec.tensor(axes, where))
                continue
            name = named[port.name]
            local = tensors[name] if math.prod(sizes) == 1 else take(tensors[name].detach(), layouts[name], sizes, coords)
            leaves[name] = local if math.prod(sizes) == 1 else local.clone().requires_grad_(s.graph.values[name].grad)
            given.append(leaves[name])
        assert tuple(p.tensor.shape for p in made.inputs) == tuple(tuple(t.shape) for t in given), "local shapes"
        with torch.enable_grad():
            found[coords] = leaves, made(*given)
    return found


def disagreement(s: Sample, pair: tuple[Strategy, Strategy], sizes: tuple[int, int]) -> str:
    """What differs between shards and the whole, "" if nothing does."""
    try:
        runs = on_shards(s, pair, sizes, s.tensors)
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    for i, name in enumerate(s.op.outs):
        layout = tuple(p.outs[i] for p in pair)
        whole = assemble({c: outs[i].detach() for c, (_, outs) in runs.items()}, s.outs[i].shape, layout, sizes)
        if isinstance(whole, str) or not same(whole.to(s.outs[i].dtype), s.outs[i]):
            return f"output {name}: {whole if isinstance(whole, str) else 'values differ'}"
    return _gradient_disagreement(s, pair, sizes, runs)


def _gradient_disagreement(s: Sample, pair: tuple[Strategy, Strategy], sizes: tuple[int, int], runs: Mapping[Coords, Run]) -> str:
    if not s.gradients:
        return ""
    found: dict[str, dict[Coords, Tensor]] = {n: {} for n in s.gradients}
    for coords, (leaves, outs) in runs.items():
        given = [
            None if g is None else take(g, tuple(gradient(p.outs[i]) for p in pair), sizes, coords) for i, g in enumerate(s.cotangents)
        ]
        for n, g in _gradients(outs, given, leaves, s).items():
            found[n][coords] = g
    for i, n in enumerate(s.op.inputs):
        if n in s.gradients:
            parts = found[n] or {c: torch.zeros_like(leaves[n]) for c, (leaves, _) in runs.items()}
            whole = assemble(parts, s.gradients[n].shape, tuple(gradient(p.ins[i]) for p in pair), sizes)
            if isinstance(whole, str) or not same(whole, s.gradients[n]):
                return f"gradient of operand {i}: {whole if isinstance(whole, str) else 'values differ'}"
    return ""
