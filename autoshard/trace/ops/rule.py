"""What a factor rule is, and what follows from it.

A *factor* is an index space that an op shares between dims of its operands and outputs, as a letter of an einsum is. If
an axis cuts the factor, every operand that has it is sharded, every other operand is whole (R: its gradient is a sum),
and an output that lacks it is a pending sum (P). A `Place` says where in a dim the factor sits: dim = outer · factor ·
inner, or a window of it. From the factors follow all ways to run the op on one axis, its `Strategy`s.

>>> matmul = parse("m k, k n -> m n", [(4, 6), (6, 8)], [(4, 8)])
>>> for f in matmul: print(f)
m=4: 0, - -> 0
k=6: 1, 0 -> sum
n=8: -, 1 -> 1
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...layout import PMAX, Cut, I, P, R, S, Type, canonical, divisible, segments
from ..graph import Value

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a factor sits in a dim: `outer` × factor × `inner`; or only its part [start, start + length) is there (`window`)."""

    dim: int
    outer: int = 1
    inner: int = 1
    window: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = str(self.dim)
        if (self.outer, self.inner) != (1, 1):
            text += f"[{self.outer}·x·{self.inner}]"
        return text + (f"[{self.window[0]}:{sum(self.window)}]" if self.window else "")

    def cut_of(self, cut: Cut, size: int) -> Cut | None:
        """The cut of the dim that a cut of the factor (of `size` elements) means; None if it has none."""
        segs = segments(cut, size)
        if self.window:
            start, length = self.window
            inside, at = [], 0
            for o, s, i in segs:
                n = o * s * i
                if at >= start and at + n <= start + length:
                    inside.append((o, s, i))
                elif at < start + length and at + n > start:
                    return None
                at += n
            return tuple(inside) if sum(map(math.prod, inside)) == length else None
        scaled = tuple((o, s, i * self.inner) for o, s, i in segs)
        if self.outer == 1:
            return scaled
        if len(scaled) == 1:
            (o, s, i) = scaled[0]
            return ((self.outer * o, s, i),)
        return scaled * self.outer if self.outer * len(scaled) <= 64 else None

    def factor_cut(self, cut: Cut, n: int, size: int, parts: int) -> Cut | None:
        """The cut of the factor that a cut of the dim (of n elements) means for an axis of `parts`; None if it is another factor's."""
        if self.window:
            start, length = self.window
            segs = segments(cut, length)
            grain = segs[0][2] if segs[0][0] == 1 else segs[0][1] * segs[0][2]
            before, after = start, size - start - length
            if len({s[2] for s in segs}) == 1:
                grain = segs[0][2]
            if before % grain or after % grain:
                return None
            outer = segs[0][0]

            def filler(m: int) -> Cut:
                if not m:
                    return ()
                return ((outer, m // grain // outer, grain),) if (m // grain) % outer == 0 else ((1, m // grain, grain),)

            return filler(before) + segs + filler(after)
        segs = segments(cut, n)
        if self.outer > 1:
            if len(segs) % self.outer == 0 and len(segs) > 1 and segs == segs[: len(segs) // self.outer] * self.outer:
                segs = segs[: len(segs) // self.outer]
            elif len(segs) == 1 and segs[0][0] % self.outer == 0:
                (o, s, i) = segs[0]
                segs = ((o // self.outer, s, i),)
            else:
                return None
        found = []
        for o, s, i in segs:
            if i % self.inner == 0:
                found.append((o, s, i // self.inner))
            elif s % parts == 0 and (s // parts * i) % self.inner == 0:
                found.append((o, parts, s // parts * i // self.inner))
            else:
                return None
        return tuple(found) if sum(map(math.prod, found)) == size else None


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor: its places in the operands (None: absent) and in the outputs (None: the output doesn't depend on it;
    "sum" or "max": cutting it leaves the output pending). `seeds`: the cuts it suggests. `body`: the local body it needs."""

    name: str
    size: int
    ins: tuple[Place | None, ...]
    outs: tuple[Place | str | None, ...]
    seeds: tuple[Cut, ...] = ((),)
    body: str = ""

    def __str__(self) -> str:
        def text(p: Place | str | None) -> str:
            return "-" if p is None else str(p)

        return f"{self.name}={self.size}: {', '.join(map(text, self.ins))} -> {', '.join(map(text, self.outs))}" + (
            f" [{self.body}]" if self.body else ""
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """All that the compiler knows of one op call. `linear`: groups of operands in which the op is jointly linear, so that a
    pending sum may pass; () means none. `why`: why nothing more is claimed (an op without a rule runs whole)."""

    factors: tuple[Factor, ...] = ()
    linear: tuple[frozenset[int], ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run an op on one mesh axis."""

    ins: tuple[Type, ...]
    outs: tuple[Type, ...]
    body: str = ""

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.ins))} -> {', '.join(map(str, self.outs))}" + (f" [{self.body}]" if self.body else "")

    @classmethod
    def parse(cls, text: str) -> Strategy:
        text, _, body = text.partition(" [")
        ins, _, outs = text.partition("->")
        parts = [tuple(Type.parse(t.strip()) for t in side.split(",") if t.strip()) for side in (ins, outs)]
        return cls(parts[0], parts[1], body.rstrip("]"))


def parse(text: str, ins: Sequence[Shape], outs: Sequence[Shape]) -> tuple[Factor, ...]:
    """Read the notation: letters name the dims of each operand and output; `…` stands for leading dims, aligned from the
    right and broadcast; a name ending in `!` may not be cut; a name that no output has is summed."""
    left, right = text.split("->")
    operands = [side.split() for side in left.split(",")] if left.strip() else []
    results = [side.split() for side in right.split(",")]
    named_in = [_name_dims(t, s) for t, s in zip(operands, ins, strict=True)]
    named_out = [_name_dims(t, s) for t, s in zip(results, outs, strict=True)]
    sizes: dict[str, int] = {}
    for names, shape in zip(named_in + named_out, [*ins, *outs], strict=True):
        for name, n in zip(names, shape, strict=True):
            sizes[name] = max(n, sizes.get(name, 1))
    found = []
    for name, size in sizes.items():
        if name.endswith("!") or size == 1:
            continue
        places = [_place(name, size, names, shape) for names, shape in zip(named_in, ins, strict=True)]
        results_ = [_place(name, size, names, shape) for names, shape in zip(named_out, outs, strict=True)]
        found.append(Factor(name, size, tuple(places), tuple("sum" if p is None else p for p in results_)))
    return tuple(found)


def _name_dims(tokens: list[str], shape: Shape) -> list[str]:
    if "…" not in tokens:
        assert len(tokens) == len(shape), (tokens, shape)
        return tokens
    at = tokens.index("…")
    lead = len(shape) - len(tokens) + 1
    return tokens[:at] + [f"…{lead - i}" for i in range(lead)] + tokens[at + 1 :]


def _place(name: str, size: int, names: list[str], shape: Shape) -> Place | None:
    return next((Place(d) for d, n in enumerate(names) if n == name and shape[d] == size), None)


def strategies(rule: Rule, operands: Sequence[Value], outs: Sequence[Value], parts: int, seeds: Mapping[str, set[Type]]) -> list[Strategy]:
    """Every way to run the op on an axis of `parts` ranks: whole (I, and R where a gradient flows), one factor cut in one of
    the ways that it or its neighbours (`seeds`: value → shards in use there) suggest, and pending sums passed through."""
    found: dict[Strategy, None] = {}

    def whole(t: Type, v: Value) -> Type:
        return t if v.grad else R

    for t in (I, R):
        found[Strategy(tuple(whole(t, v) for v in operands), tuple(whole(t, v) for v in outs))] = None
    for factor in rule.factors:
        for cut in factor_cuts(factor, operands, outs, parts, seeds):
            strategy = _with_cut(factor, cut, operands, outs, parts)
            if strategy:
                found[strategy] = None
    for group in rule.linear:
        if all(v.tensor.floating for v in outs) and all(operands[i].tensor.floating for i in group):
            ins = tuple(P if i in group else R for i in range(len(operands)))
            found[Strategy(ins, tuple(P for _ in outs))] = None
    return list(found)


def factor_cuts(factor: Factor, operands: Sequence[Value], outs: Sequence[Value], parts: int, seeds: Mapping[str, set[Type]]) -> list[Cut]:
    """The factor's own seeds, and every shard in use on an operand or output, read as a cut of the factor."""
    cuts: dict[Cut, None] = {canonical(c, factor.size, parts): None for c in factor.seeds}
    for v, place in [*zip(operands, factor.ins, strict=True), *zip(outs, factor.outs, strict=True)]:
        if not isinstance(place, Place):
            continue
        for t in sorted(seeds.get(v.name, ()), key=str):  # a set's own order differs between processes
            if t.dim == place.dim:
                cut = place.factor_cut(t.cut, v.tensor.shape[t.dim], factor.size, parts)
                if cut is not None:
                    cuts[canonical(cut, factor.size, parts)] = None
    return list(cuts)


def _with_cut(factor: Factor, cut: Cut, operands: Sequence[Value], outs: Sequence[Value], parts: int) -> Strategy | None:
    if not divisible(cut, factor.size, parts) or (factor.body in _OFFSET and (len(cut) > 1 or any(o > 1 for o, _, _ in cut))):
        return None

    def shard(v: Value, place: Place) -> Type | None:
        n = v.tensor.shape[place.dim]
        of_dim = place.cut_of(cut, factor.size)
        return S(place.dim, canonical(of_dim, n, parts)) if of_dim is not None and divisible(of_dim, n, parts) else None

    ins: list[Type] = []
    for v, place in zip(operands, factor.ins, strict=True):
        t = R if place is None else shard(v, place)
        if t is None:
            return None
        ins.append(t)
    results: list[Type] = []
    for v, result in zip(outs, factor.outs, strict=True):
        if result == "max" and (v.grad or any(o.grad for o in operands)):
            return None
        if result == "sum" and not v.tensor.floating and v.tensor.dtype != "int64":
            return None
        out = P if result == "sum" else PMAX if result == "max" else R if result is None else shard(v, result)  # type: ignore[arg-type]
        if out is None:
            return None
        results.append(out)
    return Strategy(tuple(ins), tuple(results), factor.body)


_OFFSET = ("embedding", "pick", "experts")
"""Bodies that know of their shard only where it starts, so that it has to be contiguous."""
