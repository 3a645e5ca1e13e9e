"""Fold: cut the graph into blocks where little crosses, and find which blocks are the same.

A transformer's residual stream is a place where one value crosses from what is done to what is to come. `find_blocks` cuts at
every such place and merges what holds no heavy op into its neighbour, so a decoder layer becomes its attention and its MLP, and
`kind_of` hashes each block's structure. Planning, lowering and compilation then work per distinct kind. Nothing here
is needed for correctness: any cut is legal, values that cross are passed on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

from .graph import Graph, Op, map_refs

HEAVY = tuple("linear mm bmm matmul einsum attention convolution conv1d conv2d conv3d embedding experts opaque".split())


@dataclass(frozen=True)
class Block:
    """Consecutive ops (by name) and the hash of their structure."""

    ops: tuple[str, ...]
    kind: str


def is_heavy(op: Op) -> bool:
    return op.target.split(".")[1] in HEAVY


def data_only(graph: Graph) -> set[str]:
    """Names of the ops whose results depend on inputs, constants and buffers alone: no parameter, nothing random."""
    tainted = {v.name for v in graph.sources("param")}
    found = set()
    for op in graph.ops:
        if op.target.startswith("autoshard.dropout_mask") or any(n in tainted for n in op.inputs):
            tainted.update(op.outs)
        else:
            found.add(op.name)
    return found


def find_blocks(graph: Graph, apart: Collection[str]) -> list[Block]:
    """Cut the ops, those in `apart` left out, into blocks at places that at most one value crosses.

    Values that live long (an encoder's output, a bias table) don't count as crossing.
    """
    ops = [op for op in graph.ops if op.name not in apart]
    if not ops:
        return []
    made = {out: i for i, op in enumerate(ops) for out in op.outs}
    uses: dict[str, list[int]] = {}
    for i, op in enumerate(ops):
        for name in op.inputs:
            if name in made:
                uses.setdefault(name, []).append(i)
    spans = {name: at[-1] - made[name] for name, at in uses.items()}
    long_lived = {
        name
        for name, at in uses.items()
        # used all along, or made early for a late use (the noise that a diffusion's loss compares with)
        if spans[name] > max(40, len(ops) // 4) and (spans[name] > len(ops) // 2 or len({i * 8 // len(ops) for i in at}) >= 3)
    }
    crossing = [0] * (len(ops) + 1)
    for name, at in uses.items():
        if name not in long_lived:
            for i in range(made[name] + 1, at[-1] + 1):
                crossing[i] += 1
    starts = [0] + [i for i in range(1, len(ops)) if crossing[i] <= 1]
    pieces = [ops[a:b] for a, b in zip(starts, [*starts[1:], len(ops)], strict=True)]
    merged: list[list[Op]] = []
    pending: list[Op] = []
    for piece in pieces:
        pending += piece
        if any(map(is_heavy, piece)):
            merged.append(pending)
            pending = []
    if merged:
        merged[-1] += pending
    else:
        merged = [pending]
    roots = set(graph.roots)
    return [Block(tuple(op.name for op in piece), kind_of(piece, graph, roots)) for piece in merged]


def kind_of(ops: list[Op], graph: Graph, roots: Collection[str] = ()) -> str:
    """A hash of what the ops compute: targets, arguments, shapes and how values pass between them, not names."""
    number: dict[str, str] = {}
    lines = []

    def label(name: str) -> str:
        if name not in number:
            v = graph.values[name]
            number[name] = f"%{len(number)}:{v.role}:{v.tensor}:{v.grad}"
        return number[name]

    for op in ops:
        args = map_refs((op.args, op.kwargs if "dropout" not in op.target else {}), lambda r: label(r.name))
        if "dropout_mask" in op.target:
            args = (args[0][:3], args[0][4:])  # two masks differ by their ordinal alone
        lines.append(f"{op.target}{args!r}->{[label(o) for o in op.outs]}{[o in roots for o in op.outs]}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
