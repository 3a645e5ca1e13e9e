"""Every sharding that the table claims gives the whole's outputs and gradients, on axes of 2, 3 and 4 ranks and on two axes at once."""

from __future__ import annotations

import itertools
import random

import pytest

from autoshard.layout import Cut, R, S, Type, legal
from autoshard.trace.ops import shapes
from autoshard.trace.ops.rule import Strategy, strategies
from autoshard.trace.ops.table import TABLE, rule_of

from .sample import Sample, disagreement
from .samples import POINTWISE, samples

MOVES = (shapes.reshape, shapes.permute, shapes.expand, shapes.slice_, shapes.cat, shapes.split)
UNTESTED = {"autoshard.opaque.default"}
"""Claims nothing: it runs whole."""


def cuts(n: int) -> list[Cut]:
    """Ways in which a neighbour may cut a dim of n."""
    found: list[Cut] = [()]
    for a in range(2, n):
        if n % a == 0:
            found += [((1, a, n // a),), ((a, n // a, 1),)]
    found += [((1, a, 1), (1, n - a, 1)) for a in (n // 2, n // 3, n // 4) if a > 1]
    return found


def seeds(s: Sample, rich: bool) -> dict[str, set[Type]]:
    """Shards in use around the op: every dim as a whole, and where ops move elements, by its parts too."""
    return {
        v.name: {S(d, cut) for d, n in enumerate(v.tensor.shape) if n > 1 for cut in (cuts(n) if rich else ((),))}
        for v in (*s.operands(), *s.results())
    }


def claims(s: Sample, parts: int) -> list[Strategy]:
    rule = rule_of(s.op, s.graph.values)
    rich = TABLE[s.op.target] not in POINTWISE
    return strategies(rule, s.operands(), s.results(), parts, seeds(s, rich))


def whole(s: Sample) -> Strategy:
    return Strategy((R,) * len(s.op.inputs), (R,) * len(s.op.outs))


def test_every_entry_has_a_sample() -> None:
    assert set(TABLE) - {s.op.target for s in samples()} == UNTESTED


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_claims_hold(parts: int) -> None:
    wrong = [
        f"{s.name} over {parts}: {claim}: {found}"
        for s in samples()
        for claim in claims(s, parts)
        if (found := disagreement(s, (whole(s), claim), (1, parts)))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3)])
def test_claims_of_two_axes_hold_together(sizes: tuple[int, int]) -> None:
    wrong = []
    for s in samples():
        if TABLE[s.op.target] in POINTWISE and s.op.target not in ("aten.add.Tensor", "aten.mul.Tensor", "aten.where.self"):
            continue
        pairs = list(itertools.product(claims(s, sizes[0]), claims(s, sizes[1])))
        random.Random(s.name).shuffle(pairs)
        for pair in itertools.islice((pair for pair in pairs if fits(s, pair, sizes)), 12):
            if found := disagreement(s, pair, sizes):
                wrong.append(f"{s.name} over {sizes}: {pair[0]} with {pair[1]}: {found}")
    assert not wrong, "\n".join(wrong)


def fits(s: Sample, pair: tuple[Strategy, Strategy], sizes: tuple[int, int]) -> bool:
    values, types = [*s.operands(), *s.results()], [(*p.ins, *p.outs) for p in pair]
    return all(legal(v.tensor.shape, tuple(layout), sizes) for v, *layout in zip(values, *types, strict=True))


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("aten.relu.default", "P -> P"),
        ("aten.softmax.int", "S(2) -> S(2)"),
        ("aten.add.Tensor same shape", "P, R -> P"),
        ("aten.linear.default", "S(2), S(1) -> R"),
        ("aten.linear.default", "I, S(0) -> S(2)"),  # the output is right, the gradient isn't
        ("aten.mm.default", "P, P -> P"),
        ("aten.embedding.default", "S(0), R -> P"),
        ("aten.mean.dim (0,) False", "S(0) -> P"),
    ],
)
def test_wrong_claims_are_found(name: str, wrong: str) -> None:
    s = next(s for s in samples() if s.name == name)
    assert disagreement(s, (whole(s), Strategy.parse(wrong)), (1, 2))
