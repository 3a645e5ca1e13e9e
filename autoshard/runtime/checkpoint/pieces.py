"""Tensors in pieces: which part of a whole each piece is, whether pieces make up the whole, and any part put together from them.

A part of a dim is written as *runs*: the flat tuple (start, stop, start, stop, …) of what it holds, ascending, or None for all of it.
In: pieces as runs per dim, and positions that a rank needs (of another plan than the one that wrote them). Out: the rank's shard.

>>> runs_of(np.array([0, 1, 2, 6, 7]))
(0, 3, 6, 8)
>>> positions((0, 3, 6, 8), 9).tolist()
[0, 1, 2, 6, 7]
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

Runs = tuple[int, ...] | None


class Piece(NamedTuple):
    """A part of a tensor, in a file, under the tensor's own key."""

    file: str
    runs: tuple[Runs, ...]


@dataclass(frozen=True)
class Logical:
    """A whole tensor and where its pieces are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def runs_of(held: np.ndarray | None) -> Runs:
    """Ascending positions as runs."""
    if held is None:
        return None
    if not len(held):
        return ()
    breaks = np.flatnonzero(np.diff(held) != 1)
    starts, stops = held[np.r_[0, breaks + 1]], held[np.r_[breaks, len(held) - 1]] + 1
    return tuple(int(i) for pair in zip(starts, stops, strict=True) for i in pair)


@functools.lru_cache(maxsize=4096)
def positions(runs: Runs, n: int) -> np.ndarray:
    if runs is None:
        return np.arange(n)
    return np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in zip(runs[::2], runs[1::2], strict=True))])


def length(runs: Runs, n: int) -> int:
    return n if runs is None else sum(runs[1::2]) - sum(runs[::2])


def piece_shape(shape: tuple[int, ...], runs: tuple[Runs, ...]) -> tuple[int, ...]:
    return tuple(length(r, n) for r, n in zip(runs, shape, strict=True))


def well_formed(runs: Runs, n: int) -> bool:
    """Whether these runs are a part of a dim of n: at least one, none empty, ascending, apart."""
    if runs is None:
        return True
    return len(runs) >= 2 and len(runs) % 2 == 0 and runs[0] >= 0 and runs[-1] <= n and all(a < b for a, b in itertools.pairwise(runs))


def covers(shape: tuple[int, ...], pieces: Sequence[Piece]) -> str:
    """Why the pieces don't make up the whole, each element once; "" if they do. They have to form a grid, as those of a layout do."""
    if not math.prod(shape):
        return "pieces of a tensor without elements" if pieces else ""
    if not pieces:
        return "no pieces"
    counts = []
    for dim, n in enumerate(shape):
        parts = {piece.runs[dim] for piece in pieces}
        if len(parts) > 1 or None not in parts:
            flat = sorted(pair for part in parts for pair in zip((part or (0, n))[::2], (part or (0, n))[1::2], strict=True))
            ends = [0, *(stop for _, stop in flat)]
            overlap = next((f"overlap at {start}" for (start, _), end in zip(flat, ends, strict=False) if start < end), "")
            gap = next((f"leave out {end}" for (start, _), end in zip(flat, ends, strict=False) if start > end), "")
            if overlap or gap or ends[-1] != n:
                return f"along dim {dim}, the pieces {overlap or gap or f'leave out {ends[-1]}'}"
        counts.append(len(parts))
    if len({piece.runs for piece in pieces}) != len(pieces):
        return "a piece is there twice"
    return "" if len(pieces) == math.prod(counts) else f"{len(pieces)} pieces, expected {math.prod(counts)}"


Index = slice | np.ndarray


@functools.lru_cache(maxsize=65536)
def overlap(piece: Runs, needed: Runs, n: int) -> tuple[Index, Index] | None:
    """Where what both hold lies in the piece and in the needed part; None if they have nothing in common."""
    if piece is None and needed is None:
        return slice(0, n), slice(0, n)
    _, source, target = np.intersect1d(positions(piece, n), positions(needed, n), assume_unique=True, return_indices=True)
    return (_tight(source), _tight(target)) if len(source) else None


def _tight(index: np.ndarray) -> Index:
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first == len(index) - 1 else index


def gather(whole: Logical, needed: tuple[Runs, ...], read: Callable[[Piece, int, int], torch.Tensor]) -> torch.Tensor:
    """The needed part of a tensor. `read(piece, first, last)` gives rows [first, last) of a piece (all of it, if it has no dims)."""
    out = torch.empty(piece_shape(whole.shape, needed), dtype=whole.dtype)
    if not out.numel():
        return out
    for piece in whole.pieces:
        both = [overlap(p, q, n) for p, q, n in zip(piece.runs, needed, whole.shape, strict=True)]
        found = [b for b in both if b is not None]
        if len(found) < len(both):
            continue
        if not found:
            return read(piece, 0, 1)
        rows, first = found[0][0], _first(found[0][0])
        part = read(piece, first, _last(rows))
        sources = [slice(0, rows.stop - first) if isinstance(rows, slice) else rows - first, *(source for source, _ in found[1:])]
        for dim, source in enumerate(sources):
            if isinstance(source, slice):
                part = part.narrow(dim, source.start, source.stop - source.start)
            else:
                part = part.index_select(dim, torch.from_numpy(source))
        _put(out, part, [target for _, target in found])
    return out


def _first(index: Index) -> int:
    return int(index.start if isinstance(index, slice) else index[0])


def _last(index: Index) -> int:
    return int(index.stop if isinstance(index, slice) else index[-1] + 1)


def _put(out: torch.Tensor, part: torch.Tensor, targets: Sequence[Index]) -> None:
    if all(isinstance(target, slice) for target in targets):
        out[tuple(targets)] = part  # type: ignore[index]
        return
    whole = [np.arange(t.start, t.stop) if isinstance(t, slice) else t for t in targets]
    out[tuple(torch.from_numpy(t).view([-1 if d == i else 1 for d in range(len(whole))]) for i, t in enumerate(whole))] = part
