"""The placement algebra: S, P, R, I; what a rank holds of a value; every transition and its gradient.

On each mesh axis a value has one of four types. The forward and the gradient meaning together are the type:

    S(d)  each rank holds its shard of dim d           gradient S(d)
    P     each rank holds a term of a pending sum      gradient R
    R     every rank holds the whole value             gradient P
    I     every rank holds the whole value             gradient I, identical on every rank

A shard names the *factor* of the dim that it cuts. A dim of n elements is a concatenation of segments, each an ordered
product outer × size × inner, and the axis divides `size` (as evenly as it goes: 3 over 2 ranks is 2 and 1). So a fused
`q ‖ k ‖ v` dim of 4, 2 and 2 heads of 8 is cut by heads with the segments 1x4x8, 1x2x8, 1x2x8. What a rank holds is its
positions in ascending order, so layouts of several axes on one dim combine by intersection.

>>> print(Type("S", 2, ((1, 4, 8), (1, 2, 8), (1, 2, 8))))
S(2:1x4x8|1x2x8|1x2x8)
>>> Type.parse("S(2:1x4x8|1x2x8|1x2x8)").cut[1]
(1, 2, 8)
>>> local_positions(12, (((1, 3, 4),),), (2,), (1,)).tolist()
[8, 9, 10, 11]
>>> local_positions(12, (((3, 2, 2),),), (2,), (1,)).tolist()
[2, 3, 6, 7, 10, 11]
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

import numpy as np

from .errors import PlanFileError

Segment = tuple[int, int, int]
"""outer × size × inner; the axis divides size."""
Cut = tuple[Segment, ...]
"""The segments of a dim; () stands for the whole dim as one factor, ((1, n, 1),)."""


@dataclass(frozen=True, slots=True)
class Type:
    """How one value lies on one mesh axis. `reduce` says what a P still has to do: "sum" or "max"."""

    kind: str
    dim: int = -1
    cut: Cut = ()
    reduce: str = "sum"
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # the planner looks layouts up millions of times
        object.__setattr__(self, "_hash", hash((self.kind, self.dim, self.cut, self.reduce)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Type], tuple[object, ...]]:
        return Type, (self.kind, self.dim, self.cut, self.reduce)  # hashes of texts differ between processes

    def __str__(self) -> str:
        if self.kind == "S":
            return f"S({self.dim}" + (":" + "|".join("x".join(map(str, seg)) for seg in self.cut) if self.cut else "") + ")"
        return f"P({self.reduce})" if self.kind == "P" and self.reduce != "sum" else self.kind

    __repr__ = __str__

    @classmethod
    def parse(cls, text: str) -> Type:
        """Read what `str` wrote. Raises PlanFileError."""
        if text in ("P", "R", "I"):
            return cls(text)
        if text == "P(max)":
            return PMAX
        match = re.fullmatch(r"S\((\d+)(?::(\d+x\d+x\d+(?:\|\d+x\d+x\d+)*))?\)", text)
        if not match:
            raise PlanFileError(f"{text!r} is not a placement; expected S(dim), S(dim:outer x size x inner|…), P, P(max), R or I")
        cut = tuple(tuple(int(i) for i in seg.split("x")) for seg in match[2].split("|")) if match[2] else ()
        return cls("S", int(match[1]), cut)  # type: ignore[arg-type]


P, R, I, PMAX = Type("P"), Type("R"), Type("I"), Type("P", reduce="max")  # noqa: E741
Layout = tuple[Type, ...]
"""One type per mesh axis, in the mesh's order."""


@functools.lru_cache(maxsize=65536)
def S(dim: int, cut: Cut = ()) -> Type:
    return Type("S", dim, cut)


def gradient(t: Type) -> Type:
    """The type of a value's gradient: g(S) = S, g(P) = R, g(R) = P, g(I) = I."""
    return {"P": R, "R": P, "I": I}.get(t.kind, t)


TRANSITIONS: dict[tuple[str, str], str] = {
    ("P", "I"): "all_reduce", ("P", "R"): "all_reduce", ("P", "S"): "reduce_scatter",
    ("S", "R"): "all_gather", ("S", "I"): "all_gather", ("S", "S"): "all_to_all", ("S", "P"): "embed",
    ("R", "S"): "slice", ("I", "S"): "slice", ("R", "I"): "nothing", ("I", "R"): "nothing", ("R", "P"): "mask", ("I", "P"): "mask",
}  # fmt: skip
"""The whole table. The backward of A → B is the transition g(B) → g(A), so it stands here too. `slice`, `embed` (a shard
set into zeros), `mask` (the whole on coordinate 0, zeros elsewhere) and `nothing` move no bytes between ranks."""


def transition(a: Type, b: Type) -> str:
    """What a → b runs: a name of TRANSITIONS, or "nothing" if they are equal. Raises KeyError where no transition exists."""
    if a == b:
        return "nothing"
    if a.kind == "P" and (b.kind == "P" or (a.reduce == "max" and b.kind == "S")):
        raise KeyError((a, b))
    return TRANSITIONS[a.kind, b.kind]


@functools.cache
def split_sizes(n: int, parts: int) -> tuple[int, ...]:
    """As even as it goes, larger parts first."""
    return tuple(n // parts + (i < n % parts) for i in range(parts))


def segments(cut: Cut, n: int) -> Cut:
    return cut or ((1, n, 1),)


@functools.lru_cache(maxsize=65536)
def canonical(cut: Cut, n: int, parts: int) -> Cut:
    """The one spelling of all cuts that give each of `parts` ranks the same positions of a dim of n."""
    segs = segments(cut, n)
    if all(s % parts == 0 for _, s, _ in segs):
        merged: list[Segment] = []
        for o, s, i in segs:
            chunk = s // parts * i
            if merged and merged[-1][2] == chunk:
                merged[-1] = (merged[-1][0] + o, parts, chunk)
            else:
                merged.append((o, parts, chunk))
        segs = tuple(merged)
        if segs == ((1, parts, n // parts),):
            return ()
    return () if segs == ((1, n, 1),) else segs


@functools.lru_cache(maxsize=65536)
def _owned(cut: Cut, n: int, parts: int, coord: int) -> np.ndarray:
    """Boolean mask over the dim: which positions this coordinate holds."""
    masks = []
    for o, s, i in segments(cut, n):
        sizes = split_sizes(s, parts)
        start = sum(sizes[:coord])
        part = np.zeros((o, s, i), dtype=bool)
        part[:, start : start + sizes[coord]] = True
        masks.append(part.reshape(-1))
    return np.concatenate(masks)


@functools.lru_cache(maxsize=65536)
def local_positions(n: int, cuts: tuple[Cut, ...], parts: tuple[int, ...], coords: tuple[int, ...]) -> np.ndarray:
    """Ascending positions of a dim of n that a rank holds under several axes' cuts."""
    mask = np.ones(n, dtype=bool)
    for cut, k, c in zip(cuts, parts, coords, strict=True):
        mask &= _owned(cut, n, k, c)
    return np.flatnonzero(mask)


def dim_positions(n: int, dim: int, layout: Layout, sizes: tuple[int, ...], coords: tuple[int, ...]) -> np.ndarray:
    """Positions of `dim` (of n elements) that the rank at `coords` holds of a value of this layout."""
    on = [a for a, t in enumerate(layout) if t.kind == "S" and t.dim == dim and sizes[a] > 1]
    return local_positions(n, tuple(layout[a].cut for a in on), tuple(sizes[a] for a in on), tuple(coords[a] for a in on))


def local_shape(shape: tuple[int, ...], layout: Layout, sizes: tuple[int, ...], coords: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the rank at `coords` holds."""
    if not any(t.kind == "S" for t in layout):
        return shape
    return tuple(len(dim_positions(n, d, layout, sizes, coords)) for d, n in enumerate(shape))


def divisible(cut: Cut, n: int, parts: int) -> bool:
    """Whether every rank gets something of every segment."""
    return all(s >= parts for _, s, _ in segments(cut, n)) and n >= parts


@functools.lru_cache(maxsize=65536)
def compatible(a: Cut, ka: int, b: Cut, kb: int, n: int) -> bool:
    """Whether two axes may cut one dim together: their factors are nested, one inside the other's inner part."""
    sa, sb = segments(a, n), segments(b, n)
    if len(sa) > 1 or len(sb) > 1:
        return False
    (oa, na, _), (ob, nb, _) = sa[0], sb[0]
    return ob % (oa * na) == 0 or oa % (ob * nb) == 0


def legal(shape: tuple[int, ...], layout: Layout, sizes: tuple[int, ...]) -> bool:
    """Whether several axes' shards of one value fit together."""
    shards = [(t, k) for t, k in zip(layout, sizes, strict=True) if t.kind == "S" and k > 1]
    return len(shards) < 2 or all(
        t.dim != u.dim or compatible(t.cut, k, u.cut, m, shape[t.dim]) for i, (t, k) in enumerate(shards) for u, m in shards[i + 1 :]
    )
