"""What layouts promise, over random dims, cuts and axes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.errors import PlanFileError
from autoshard.layout import (
    PMAX,
    TRANSITIONS,
    Cut,
    I,
    Layout,
    P,
    R,
    S,
    Type,
    canonical,
    compatible,
    divisible,
    gradient,
    legal,
    local_positions,
    local_shape,
    segments,
    split_sizes,
    transition,
)
from autoshard.lower.collectives import divide, lengths, local_cut, merge
from autoshard.plan.moves import path

few = settings(max_examples=150, deadline=None)
parts_ = st.integers(2, 4)
segment = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3))


@st.composite
def dims(draw: st.DrawFn, most: int = 3) -> tuple[int, Cut]:
    """A dim and a cut of it."""
    cut = tuple(draw(st.lists(segment, min_size=1, max_size=most)))
    return sum(map(math.prod, cut)), cut if draw(st.booleans()) or len(cut) > 1 else ()


@st.composite
def nested(draw: st.DrawFn) -> tuple[int, list[tuple[Cut, int]]]:
    """A dim and cuts of it for two axes, one inside the other."""
    a, b, c, d = (draw(st.integers(1, 4)) for _ in range(4))
    outer, inner = ((1, a, b * c * d),), ((a * b, c, d),)
    pairs = [(outer, draw(parts_)), (inner, draw(parts_))]
    return a * b * c * d, pairs[:: draw(st.sampled_from([1, -1]))]


@st.composite
def values(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout, tuple[int, int]]:
    """A shape, and a legal layout of it on two axes."""
    (n, cut), (m, _) = draw(dims()), draw(dims())
    sizes = (draw(parts_), draw(parts_))
    types = [R, I, P, S(0, cut), S(1), S(0)]
    layout = (draw(st.sampled_from(types)), draw(st.sampled_from(types)))
    return ((n, m), layout, sizes) if legal((n, m), layout, sizes) else ((n, m), (layout[0], R), sizes)


def ranks(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, sizes)))


@few
@given(dims(), parts_)
def test_positions_partition_the_dim(dim: tuple[int, Cut], parts: int) -> None:
    n, cut = dim
    held = [local_positions(n, (cut,), (parts,), (c,)) for c in range(parts)]
    assert sorted(np.concatenate(held).tolist()) == list(range(n))
    assert all((np.diff(h) > 0).all() for h in held)
    assert not divisible(cut, n, parts) or all(len(h) for h in held)


@few
@given(nested())
def test_positions_of_two_axes_partition_the_dim(case: tuple[int, list[tuple[Cut, int]]]) -> None:
    n, axes = case
    cuts, sizes = zip(*axes, strict=True)
    assert compatible(cuts[0], sizes[0], cuts[1], sizes[1], n)
    held = [local_positions(n, cuts, sizes, coords) for coords in ranks(sizes)]
    assert sorted(np.concatenate(held).tolist()) == list(range(n))


@few
@given(dims(), parts_)
def test_canonical_cuts_hold_the_same_and_are_canonical(dim: tuple[int, Cut], parts: int) -> None:
    n, cut = dim
    found = canonical(cut, n, parts)
    for c in range(parts):
        assert (local_positions(n, (cut,), (parts,), (c,)) == local_positions(n, (found,), (parts,), (c,))).all()
    assert canonical(found, n, parts) == found


@few
@given(dims(), dims(), parts_)
def test_even_cuts_that_hold_the_same_are_spelled_the_same(a: tuple[int, Cut], b: tuple[int, Cut], parts: int) -> None:
    n, even = a[0] * parts, tuple((o, s * parts, i) for o, s, i in segments(a[1], a[0]))
    other = tuple((o, s * parts, i) for o, s, i in segments(b[1], b[0]))
    if sum(map(math.prod, other)) != n:
        other = ((1, n, 1),)
    alike = all(
        local_positions(n, (even,), (parts,), (c,)).tolist() == local_positions(n, (other,), (parts,), (c,)).tolist() for c in range(parts)
    )
    assert (canonical(even, n, parts) == canonical(other, n, parts)) == alike


@few
@given(st.sampled_from([P, PMAX, R, I]) | st.builds(S, st.integers(0, 5), st.lists(segment, max_size=3).map(tuple)))
def test_text_round_trip(t: Type) -> None:
    assert Type.parse(str(t)) == t


@pytest.mark.parametrize("text", ["", "S", "S()", "S(-1)", "S(0:)", "S(0:1x2)", "S(0:1x2x3|)", "P(min)", "Q", "S(0) ", "R,R"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(PlanFileError):
        Type.parse(text)


@few
@given(values())
def test_local_shapes_tile_the_value(case: tuple[tuple[int, ...], Layout, tuple[int, int]]) -> None:
    shape, layout, sizes = case
    total = sum(math.prod(local_shape(shape, layout, sizes, coords)) for coords in ranks(sizes))
    copies = math.prod(k for t, k in zip(layout, sizes, strict=True) if t.kind != "S")
    assert total == copies * math.prod(shape)


@few
@given(values(), st.data())
def test_layouts_on_a_path_are_legal_and_steps_have_gradients(
    case: tuple[tuple[int, ...], Layout, tuple[int, int]], data: st.DataObject
) -> None:
    shape, a, sizes = case
    b = tuple(data.draw(st.sampled_from([t, R, I, S(1)])) for t in a)
    steps = path(shape, a, b, sizes) if legal(shape, b, sizes) else None
    if steps is None:
        return
    layout = list(a)
    for axis, source, target in steps:
        assert layout[axis] == source
        layout[axis] = target
        assert legal(shape, tuple(layout), sizes)
        assert transition(source, target) in set(TRANSITIONS.values())
        assert transition(gradient(target), gradient(source)) in {*TRANSITIONS.values(), "nothing"}
    assert tuple(layout) == b


def test_the_gradient_of_every_transition_is_in_the_table() -> None:
    kinds = {"S": S(0), "P": P, "R": R, "I": I}
    for a, b in TRANSITIONS:
        source, target = kinds[a], kinds[b] if b != "S" else S(1)
        back = gradient(target), gradient(source)
        assert back[0] == back[1] or (back[0].kind, back[1].kind) in TRANSITIONS, (a, b)
        assert gradient(gradient(source)) == source


def test_pending_maxima_only_become_whole() -> None:
    assert transition(PMAX, I) == "all_reduce"
    for target in (S(0), P):
        with pytest.raises(KeyError):
            transition(PMAX, target)


@few
@given(dims(), parts_, st.integers(0, 2))
def test_divide_gives_what_the_layout_says_and_merge_undoes_it(dim: tuple[int, Cut], parts: int, at: int) -> None:
    n, cut = dim
    shape = [2, 3]
    shape.insert(at, n)
    x = torch.arange(math.prod(shape)).reshape(shape)
    local = local_cut(segments(cut, n), parts, [])
    pieces = divide(x, at, local)
    assert lengths(local) == [p.shape[at] for p in pieces]
    for c, piece in enumerate(pieces):
        assert torch.equal(piece, x.index_select(at, torch.from_numpy(local_positions(n, (cut,), (parts,), (c,)))))
    assert torch.equal(merge(pieces, at, local), x)


@few
@given(nested())
def test_divide_under_another_axis(case: tuple[int, list[tuple[Cut, int]]]) -> None:
    """A rank that holds its part under one axis divides it along the other."""
    n, [(cut, k), (other, m)] = case
    x = torch.arange(n)
    for coord in range(m):
        here = x[torch.from_numpy(local_positions(n, (other,), (m,), (coord,)))]
        local = local_cut(segments(cut, n), k, [(segments(other, n)[0], m, coord)])
        pieces = divide(here, 0, local)
        for c, piece in enumerate(pieces):
            assert piece.tolist() == local_positions(n, (cut, other), (k, m), (c, coord)).tolist()
        assert torch.equal(merge(pieces, 0, local), here)


@given(st.integers(0, 50), st.integers(1, 9))
def test_split_sizes(n: int, parts: int) -> None:
    sizes = split_sizes(n, parts)
    assert sum(sizes) == n and len(sizes) == parts and max(sizes) - min(sizes) <= 1 and list(sizes) == sorted(sizes, reverse=True)
