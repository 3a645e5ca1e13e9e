"""Schedules: golden texts, round trip, and every way in which a list can be wrong."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.errors import DeadlockError, PlanFileError
from autoshard.plan.schedules import Action, build, check, parse, to_text

GOLDEN = {
    ("gpipe", 2, 2): """\
0: P D F0.0 SF0>1.0 F0.1 SF0>1.1 RB1>0.0 B0.0 RB1>0.1 B0.1 G L U
1: P D RF0>1.0 F1.0 RF0>1.1 F1.1 B1.0 SB1>0.0 B1.1 SB1>0.1 G L U""",
    ("1f1b", 3, 4): """\
0: P D F0.0 SF0>1.0 F0.1 SF0>1.1 F0.2 SF0>1.2 RB1>0.0 B0.0 F0.3 SF0>1.3 RB1>0.1 B0.1 RB1>0.2 B0.2 RB1>0.3 B0.3 G L U
1: P D RF0>1.0 F1.0 SF1>2.0 RF0>1.1 F1.1 SF1>2.1 RB2>1.0 B1.0 SB1>0.0 RF0>1.2 F1.2 SF1>2.2 RB2>1.1 B1.1 SB1>0.1 \
RF0>1.3 F1.3 SF1>2.3 RB2>1.2 B1.2 SB1>0.2 RB2>1.3 B1.3 SB1>0.3 G L U
2: P D RF1>2.0 F2.0 B2.0 SB2>1.0 RF1>2.1 F2.1 B2.1 SB2>1.1 RF1>2.2 F2.2 B2.2 SB2>1.2 RF1>2.3 F2.3 B2.3 SB2>1.3 G L U""",
    ("1f1b", 1, 2): "0: P D F0.0 B0.0 F0.1 B0.1 G L U",
    ("1f1b", 3, 1): """\
0: P D F0.0 SF0>1.0 RB1>0.0 B0.0 G L U
1: P D RF0>1.0 F1.0 SF1>2.0 RB2>1.0 B1.0 SB1>0.0 G L U
2: P D RF1>2.0 F2.0 B2.0 SB2>1.0 G L U""",
    ("forward", 2, 2): """\
0: P D F0.0 SF0>1.0 F0.1 SF0>1.1 L
1: P D RF0>1.0 F1.0 RF0>1.1 F1.1 L""",
}


def chain(stages: int) -> list[tuple[int, int]]:
    return [(s, s + 1) for s in range(stages - 1)]


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden(key: tuple[str, int, int]) -> None:
    kind, stages, microbatches = key
    lists = build(kind, stages, microbatches, chain(stages))
    assert to_text(lists) == GOLDEN[key]
    check(lists, chain(stages))


def test_skip_edges_and_edges_without_gradient() -> None:
    lists = build("1f1b", 3, 1, [(0, 1), (1, 2), (0, 2)], grad_edges=[(0, 1), (1, 2)])
    assert (
        to_text(lists)
        == """\
0: P D F0.0 SF0>1.0 SF0>2.0 RB1>0.0 B0.0 G L U
1: P D RF0>1.0 F1.0 SF1>2.0 RB2>1.0 B1.0 SB1>0.0 G L U
2: P D RF0>2.0 RF1>2.0 F2.0 B2.0 SB2>1.0 G L U"""
    )
    check(lists, [(0, 1), (1, 2), (0, 2)], [(0, 1), (1, 2)])


@given(st.sampled_from(["gpipe", "1f1b", "forward"]), st.integers(1, 6), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_any_edges(kind: str, stages: int, microbatches: int, data: st.DataObject) -> None:
    pairs = [(a, b) for a in range(stages) for b in range(a + 1, stages)]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    grads = data.draw(st.lists(st.sampled_from(edges), unique=True)) if edges else []
    lists = build(kind, stages, microbatches, edges, grads)
    check(lists, edges, grads)
    assert parse(to_text(lists)) == lists


def test_input_and_weight_halves() -> None:
    text = """\
0: P D F0.0 SF0>1.0 F0.1 SF0>1.1 RB1>0.0 I0.0 RB1>0.1 I0.1 W0.0 W0.1 G L U
1: P D RF0>1.0 F1.0 I1.0 SB1>0.0 RF0>1.1 F1.1 B1.1 SB1>0.1 W1.0 G L U"""
    check(parse(text), [(0, 1)])


def test_several_stages_on_a_rank() -> None:
    edges = chain(4)
    text = """\
0: P D F0.0 SF0>1.0 RF1>2.0 F2.0 SF2>3.0 RB3>2.0 B2.0 SB2>1.0 RB1>0.0 B0.0 G L U
1: P D RF0>1.0 F1.0 SF1>2.0 RF2>3.0 F3.0 B3.0 SB3>2.0 RB2>1.0 B1.0 SB1>0.0 G L U"""
    check(parse(text), edges)
    check(parse("0: P D F0.0 F1.0 B1.0 B0.0 G L U"), [(0, 1)])
    with pytest.raises(DeadlockError, match=r"F1.0 before F0.0"):
        check(parse("0: P D F1.0 F0.0 B1.0 B0.0 G L U"), [(0, 1)])


ONE = "0: P D F0.0 SF0>1.0 F0.1 SF0>1.1 RB1>0.0 B0.0 RB1>0.1 B0.1 G L U"
TWO = "1: P D RF0>1.0 F1.0 B1.0 SB1>0.0 RF0>1.1 F1.1 B1.1 SB1>0.1 G L U"
WRONG = {
    "receive before send in a cycle": (
        "0: P D F0.0 RB1>0.0 SF0>1.0 B0.0 G L U\n1: P D RF0>1.0 F1.0 B1.0 SB1>0.0 G L U",
        "rank 0 waits for ever at RB1>0.0: the rank that would send it waits too",
    ),
    "send missing": (ONE.replace("SF0>1.1 ", "") + "\n" + TWO, "rank 1 waits for ever at RF0>1.1: its message is never sent"),
    "send repeated": (ONE.replace("SF0>1.1", "SF0>1.0") + "\n" + TWO, "SF0>1.0 a second time"),
    "out of order": (ONE + "\n" + TWO.replace("RF0>1.0 F1.0", "RF0>1.1 F1.1"), "first in, first out"),
    "forward twice": (ONE.replace("F0.1 SF0>1.1", "F0.0 SF0>1.1") + "\n" + TWO, "F0.0 a second time"),
    "backward twice": (ONE.replace("B0.1 G", "B0.1 B0.1 G") + "\n" + TWO, "B0.1 a second time"),
    "weight half twice": (ONE.replace("B0.1 G", "B0.1 W0.1 G") + "\n" + TWO, "W0.1 a second time"),
    "weight half missing": (ONE.replace("B0.1 G", "I0.1 G") + "\n" + TWO, "W0.1 is missing"),
    "backward before forward": (ONE.replace("D F0.0", "D B0.0 F0.0") + "\n" + TWO, "B0.0 before F0.0"),
    "no receive": (ONE + "\n" + TWO.replace("RF0>1.0 ", ""), "F1.0 before RF0>1.0"),
    "compute after the reduction": (ONE.replace("B0.1 G", "G B0.1") + "\n" + TWO, "B0.1 stands after the end of the loop"),
    "no parameters": (ONE.replace("P D", "D") + "\n" + TWO, "rank 0 waits for ever at D: every rank must reach it"),
    "no reduction": ((ONE + "\n" + TWO).replace("G ", ""), "G is missing on rank 0"),
    "order of the ends differs": (ONE.replace("G L", "L G") + "\n" + TWO, "every rank must reach it"),
    "never received": (ONE.replace("RB1>0.1 B0.1 ", "") + "\n" + TWO, "B0.1 is missing"),
    "wrong edge": (ONE + "\n" + TWO.replace("F1.0", "F1.0 SF1>2.0", 1), "nothing passes between stages 1 and 2"),
    "stage on two ranks": (ONE + "\n" + TWO.replace("F1.0", "F1.0 F0.5", 1), "stage 0 is on rank 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lists_are_refused(name: str) -> None:
    text, message = WRONG[name]
    with pytest.raises(DeadlockError) as caught:
        check(parse(text), [(0, 1)])
    assert message in str(caught.value)


def test_the_grid_marks_the_cell() -> None:
    with pytest.raises(DeadlockError) as caught:
        check(parse(ONE.replace("SF0>1.1 ", "") + "\n" + TWO), [(0, 1)])
    assert (
        str(caught.value)
        == """\
rank 1 waits for ever at RF0>1.1: its message is never sent
          step 2  step 3 step 4  step 5    step 6    step 7 step 8  step 9 step 10
  rank 0    F0.0 SF0>1.0   F0.1 RB1>0.0      B0.0 [RB1>0.1]   B0.1       G       L
> rank 1 RF0>1.0    F1.0   B1.0 SB1>0.0 [RF0>1.1]      F1.1   B1.1 SB1>0.1       G
  hint: this list can't run; build it anew"""
    )


def test_one_action_moved_or_lost_is_never_silent() -> None:
    """Dropping any action is refused; swapping two neighbours is refused or leaves a list that still does all the work."""
    rng = random.Random(0)
    edges = [(0, 1), (1, 2), (0, 2)]
    lists = build("1f1b", 3, 3, edges)
    for rank, actions in enumerate(lists):
        for at in range(len(actions)):
            broken = [list(a) for a in lists]
            del broken[rank][at]
            with pytest.raises(DeadlockError):
                check(broken, edges)
    for _ in range(200):
        shuffled = [list(a) for a in lists]
        row = rng.choice(shuffled)
        at = rng.randrange(len(row) - 1)
        row[at], row[at + 1] = row[at + 1], row[at]
        try:
            check(shuffled, edges)
        except DeadlockError:
            continue
        assert sorted(map(str, row)) == sorted(map(str, lists[shuffled.index(row)]))


@pytest.mark.parametrize("text", ["X0.1", "F0", "F0.1.2", "SF1>0.1", "SB0>1.1", "RF1>1.0", "F-1.0", "f0.1", "P0", "F0.1\u0660", "F٠.1"])
def test_faulty_actions_are_refused(text: str) -> None:
    with pytest.raises(PlanFileError):
        Action.parse(text)


def test_faulty_lists_are_refused() -> None:
    with pytest.raises(PlanFileError, match="expected '1: '"):
        parse("0: P\n2: P")
    with pytest.raises(PlanFileError, match="unknown schedule"):
        build("2f2b", 2, 2, [(0, 1)])
    with pytest.raises(PlanFileError, match="at least 1"):
        build("1f1b", 2, 0, [(0, 1)])


def test_large_schedules_are_quick() -> None:
    began = time.process_time()
    check(build("1f1b", 64, 128, chain(64)), chain(64))
    assert time.process_time() - began < 5  # measured 0.4 s; a quadratic check would take minutes
