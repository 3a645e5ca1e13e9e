"""Transitions between placements, as autograd pairs over `torch.ops._c10d_functional`.

`move` runs one step of layout.TRANSITIONS on one axis; its backward is the transition g(B) → g(A) of the same table, so
gradients are right by construction. (The functional all_reduce is its own backward, which multiplies the gradient by the axis
size: none of these may be differentiated by itself.) Group names are mesh axes; `program.bind` puts process groups there.
Uneven shards are padded to the largest for the wire, and cut again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..layout import Type, gradient, split_sizes, transition

Op = torch.ops._c10d_functional
Local = tuple[tuple[int, tuple[int, ...], int], ...]
"""A cut as a rank sees it: per segment outer, the axis's sizes of the factor, inner, all counted under the other axes' cuts."""


@dataclass(frozen=True)
class Spot:
    """Where a move happens: the axis, its size and this rank's coordinate; for the shards of either side, how their dim divides."""

    axis: str
    parts: int
    coord: int
    source: Local = ()
    target: Local = ()


def lengths(local: Local) -> list[int]:
    """Elements of the dim that each coordinate holds."""
    return [sum(o * sizes[r] * i for o, sizes, i in local) for r in range(len(local[0][1]))]


def all_reduce(x: torch.Tensor, reduce: str, spot: Spot) -> torch.Tensor:
    return Op.wait_tensor(Op.all_reduce(x, reduce, spot.axis))


def all_gather(x: torch.Tensor, dim: int, local: Local, spot: Spot) -> torch.Tensor:
    held = lengths(local)
    most = max(held)
    wire = _pad(x, dim, most).contiguous()
    shape = list(wire.shape)
    out = Op.wait_tensor(Op.all_gather_into_tensor(wire, spot.parts, spot.axis))
    if _in_order(shape, dim, local):
        return out.reshape(*shape[:dim], most * spot.parts, *shape[dim + 1 :]) if dim else out
    pieces = out.reshape(spot.parts, *shape).unbind(0)
    return merge([p.narrow(dim, 0, n) if n < most else p for p, n in zip(pieces, held, strict=True)], dim, local)


def reduce_scatter(x: torch.Tensor, dim: int, local: Local, spot: Spot) -> torch.Tensor:
    held = lengths(local)
    most = max(held)
    if _in_order(list(x.shape), dim, local):
        wire = x.contiguous()
        out = Op.wait_tensor(Op.reduce_scatter_tensor(wire.flatten(0, dim) if dim else wire, "sum", spot.parts, spot.axis))
        return out.reshape(*x.shape[:dim], most, *x.shape[dim + 1 :]) if dim else out
    pieces = [_pad(p, dim, most) for p in divide(x, dim, local)]
    wire = torch.stack(pieces)
    out = Op.wait_tensor(Op.reduce_scatter_tensor(wire.flatten(0, 1), "sum", spot.parts, spot.axis))
    return out.narrow(dim, 0, held[spot.coord]) if held[spot.coord] < most else out


def _in_order(shape: list[int], dim: int, local: Local) -> bool:
    """Whether the ranks' parts of a dim lie one after another in memory, as they come from the wire."""
    return len(local) == 1 and local[0][0] == 1 and len(set(lengths(local))) == 1 and all(n == 1 for n in shape[:dim])


def all_to_all(x: torch.Tensor, here: int, there: int, source: Local, target: Local, spot: Spot) -> torch.Tensor:
    """From a shard of dim `here` (cut as `source`) to one of dim `there` (cut as `target`)."""
    if x.is_complex():  # the other collectives take complex numbers, this one doesn't
        return torch.view_as_complex(all_to_all(torch.view_as_real(x), here, there, source, target, spot))
    pieces = divide(x, there, target)
    mine, held = lengths(target)[spot.coord], lengths(source)
    shapes = []
    for n in held:
        shape = list(x.shape)
        shape[here], shape[there] = n, mine
        shapes.append(shape)
    receive = [_numel(s) for s in shapes]
    wire = torch.cat([p.reshape(-1) for p in pieces])
    out = Op.wait_tensor(Op.all_to_all_single(wire, receive, [p.numel() for p in pieces], spot.axis))
    parts = [p.reshape(s) for p, s in zip(out.split(receive), shapes, strict=True)]
    return merge(parts, here, source)


def divide(x: torch.Tensor, dim: int, local: Local) -> list[torch.Tensor]:
    """Each coordinate's part of a dim that is whole here."""
    parts: list[list[torch.Tensor]] = [[] for _ in local[0][1]]
    at = 0
    for o, sizes, i in local:
        n = o * sum(sizes) * i
        block = x.narrow(dim, at, n) if n < x.shape[dim] else x
        at += n
        view = block.reshape(*x.shape[:dim], o, sum(sizes), i, *x.shape[dim + 1 :])
        start = 0
        for r, size in enumerate(sizes):
            piece = view.narrow(dim + 1, start, size).reshape(*x.shape[:dim], o * size * i, *x.shape[dim + 1 :])
            parts[r].append(piece)
            start += size
    return [p[0] if len(p) == 1 else torch.cat(p, dim) for p in parts]


def merge(pieces: list[torch.Tensor], dim: int, local: Local) -> torch.Tensor:
    """The inverse of `divide`."""
    if len(local) == 1 and local[0][0] == 1:
        return torch.cat(pieces, dim)
    lead, tail = list(pieces[0].shape[:dim]), list(pieces[0].shape[dim + 1 :])
    whole, at = [], [0] * len(pieces)
    for o, sizes, i in local:
        views = []
        for r, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
            views.append(piece.narrow(dim, at[r], o * size * i).reshape(*lead, o, size, i, *tail))
            at[r] += o * size * i
        whole.append(torch.cat(views, dim + 1).reshape(*lead, o * sum(sizes) * i, *tail))
    return whole[0] if len(whole) == 1 else torch.cat(whole, dim)


def _pad(x: torch.Tensor, dim: int, n: int) -> torch.Tensor:
    missing = n - x.shape[dim]
    return torch.constant_pad_nd(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x


def _numel(shape: list[int]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


class _Pair(torch.autograd.Function):
    """A transition and its gradient's."""

    @staticmethod
    def forward(ctx, x, forward, backward):  # type: ignore[no-untyped-def]
        ctx.transition = backward
        return forward(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def,override]
        return ctx.transition(g), None, None


Index = torch.Tensor | None


def move(
    x: torch.Tensor, a: Type, b: Type, spot: Spot, grad: bool, source: Index = None, target: Index = None, first: Index = None
) -> torch.Tensor:
    """One axis from a to b. `source`, `target`: where this rank's part under a's and b's cut lies in the whole dim, where a step
    needs it (`indices`); `first`: 1 on coordinate 0, else 0. They are inputs, so that one traced module serves every rank."""
    forward = _step(a, b, spot, source, target, first)
    if not grad:
        return forward(x)
    flipped = Spot(spot.axis, spot.parts, spot.coord, spot.target, spot.source)
    return _Pair.apply(x, forward, _step(gradient(b), gradient(a), flipped, target, source, first))


def indices(a: Type, b: Type, grad: bool) -> tuple[bool, bool, bool]:
    """Which of `source`, `target` and `first` a move and its gradient need."""

    def of(a: Type, b: Type) -> tuple[bool, bool, bool]:
        kind = transition(a, b)
        same = kind == "all_to_all" and a.dim == b.dim
        return kind == "embed", kind == "slice" or same, kind == "mask"

    need = of(a, b)
    if grad:
        source, target, first = of(gradient(b), gradient(a))
        need = (need[0] or target, need[1] or source, need[2] or first)
    return need


def _step(a: Type, b: Type, spot: Spot, source: Index, target: Index, first: Index) -> Callable[[torch.Tensor], torch.Tensor]:
    kind = transition(a, b)

    def run(x: torch.Tensor) -> torch.Tensor:
        if kind == "nothing":
            return x.view_as(x)
        if kind == "all_reduce":
            return all_reduce(x, a.reduce, spot)
        if kind == "all_gather":
            return all_gather(x, a.dim, spot.source, spot)
        if kind == "reduce_scatter":
            return reduce_scatter(x, b.dim, spot.target, spot)
        if kind == "all_to_all" and a.dim != b.dim:
            return all_to_all(x, a.dim, b.dim, spot.source, spot.target, spot)
        if kind == "mask":
            assert first is not None
            return torch.where(first != 0, x, torch.zeros((), dtype=x.dtype, device=x.device))  # not a product: 0 · inf is nan
        if kind == "embed":
            assert source is not None
            n = sum(o * sum(sizes) * i for o, sizes, i in spot.source)
            return x.new_zeros([*x.shape[: a.dim], n, *x.shape[a.dim + 1 :]]).index_copy(a.dim, source, x)
        assert target is not None
        whole = all_gather(x, a.dim, spot.source, spot) if kind == "all_to_all" else x
        return whole.index_select(b.dim, target)

    return run


def local_cut(segs: tuple[tuple[int, int, int], ...], parts: int, others: list[tuple[tuple[int, int, int], int, int]]) -> Local:
    """A cut as a rank sees it, under other axes' cuts of the same dim: (segment, size, coordinate) each."""
    found = []
    for o, s, i in segs:
        for (ob, nb, _), kb, coord in others:
            held = split_sizes(nb, kb)[coord]
            if ob % (o * s) == 0:
                i = i // nb * held
            else:
                o = o // nb * held
        found.append((o, split_sizes(s, parts), i))
    return tuple(found)
