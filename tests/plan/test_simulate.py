"""The simulator: closed forms, an independent oracle, and speed."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.errors import DeadlockError
from autoshard.plan.schedules import Action, build, parse
from autoshard.plan.simulate import simulate


def chain(stages: int) -> list[tuple[int, int]]:
    return [(s, s + 1) for s in range(stages - 1)]


def even(stages: int, forward: float = 1.0, backward: float = 2.0) -> dict[tuple[int, str], float]:
    return {(s, k): t for s in range(stages) for k, t in (("F", forward), ("B", backward))}


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 5), (2, 1), (4, 4), (4, 9), (6, 3)])
def test_closed_form(kind: str, stages: int, microbatches: int) -> None:
    """Even stages and free transfers: (m + p − 1) (f + b), of which (p − 1) / (m + p − 1) is bubble."""
    result = simulate(build(kind, stages, microbatches, chain(stages)), even(stages))
    assert result.step_seconds == pytest.approx(3 * (microbatches + stages - 1))
    assert result.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert result.in_flight == [microbatches if kind == "gpipe" else min(stages - s, microbatches) for s in range(stages)]


def test_transfers_ends_and_contention() -> None:
    lists = build("1f1b", 2, 1, [(0, 1)])
    costs = {**even(2), (0, "P"): 0.5, (1, "P"): 0.25, (0, "G"): 1.0, (1, "G"): 4.0, (0, "L"): 0.1, (1, "L"): 0.1}
    plain = simulate(lists, costs, {(0, 1): 0.5})
    # rank 0: P .5, F → 1.5, message there at 2, F and B of rank 1 → 5, back at 5.5, B → 7.5, G → 8.5; rank 1 reduces 5 → 9; L waits for it
    assert plain.step_seconds == pytest.approx(9.1)
    assert [str(e.action) for e in plain.timelines[1]] == ["P", "D", "RF0>1.0", "F1.0", "B1.0", "SB1>0.0", "G", "L", "U"]
    wait = plain.timelines[1][2]
    assert (wait.start, wait.end) == pytest.approx((0.25, 2.0))
    slow_back = simulate(lists, costs, {(0, 1): 0.5, (1, 0): 3.0})
    assert slow_back.step_seconds == pytest.approx(5 + 3 + 2 + 1 + 0.1)
    assert simulate(lists, costs, {(0, 1): 0.5}, contention=0.2).step_seconds == pytest.approx(9.1 + 0.1 + 0.1)


def test_sends_queue_on_the_link() -> None:
    lists = parse("0: P D F0.0 SF0>1.0 SF0>2.0 L\n1: P D RF0>1.0 F1.0 L\n2: P D RF0>2.0 F2.0 L")
    result = simulate(lists, {(s, "F"): 1.0 for s in range(3)}, {(0, 1): 2.0, (0, 2): 2.0})
    assert result.timelines[1][2].end == 3 and result.timelines[2][2].end == 5


def test_halves_fill_the_bubble() -> None:
    """With I and W apart, W can wait until there is nothing else to do."""
    edges = [(0, 1)]
    costs = {(s, k): t for s in (0, 1) for k, t in (("F", 1.0), ("B", 2.0), ("I", 1.0), ("W", 1.0))}
    whole = simulate(build("1f1b", 2, 2, edges), costs)
    text = """\
0: P D F0.0 SF0>1.0 F0.1 SF0>1.1 RB1>0.0 I0.0 W0.0 RB1>0.1 I0.1 W0.1 G L U
1: P D RF0>1.0 F1.0 I1.0 SB1>0.0 RF0>1.1 F1.1 I1.1 SB1>0.1 W1.0 W1.1 G L U"""
    halves = simulate(parse(text), costs)
    assert halves.step_seconds < whole.step_seconds and sum(halves.busy) == sum(whole.busy)


def oracle(lists: list[list[Action]], seconds: dict[tuple[int, str], float], p2p: dict[tuple[int, int], float]) -> float:
    """Longest path, relaxed until nothing moves: no queues, no events."""
    ends = {(r, i): 0.0 for r, actions in enumerate(lists) for i in range(len(actions))}
    arrives: dict[tuple[str, tuple[int, int], int], float] = {}
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            now, link = 0.0, 0.0
            for i, a in enumerate(actions):
                if a.kind in ("SF", "SB"):
                    link = max(link, now) + p2p[min(a.channel), max(a.channel)]
                    arrives[a.kind[1], a.channel, a.mb] = link
                elif a.kind in ("RF", "RB"):
                    now = max(now, arrives.get((a.kind[1], a.channel, a.mb), 0.0))
                else:
                    now += seconds.get((a.stage, a.kind), 0.0)
                if now != ends[rank, i]:
                    ends[rank, i], moved = now, True
    return max(ends.values())


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 5), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_against_an_oracle(kind: str, stages: int, microbatches: int, data: st.DataObject) -> None:
    pairs = [(a, b) for a in range(stages) for b in range(a + 1, stages)]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    durations = st.integers(0, 8).map(float)
    seconds = {(s, k): data.draw(durations) for s in range(stages) for k in "FB"}
    p2p = {edge: data.draw(durations) for edge in edges}
    lists = build(kind, stages, microbatches, edges)
    assert simulate(lists, seconds, p2p).step_seconds == pytest.approx(oracle(lists, seconds, p2p))


def test_deadlock_is_an_error() -> None:
    with pytest.raises(DeadlockError, match=r"rank 1 waits for ever at RF0>1\.0"):
        simulate(parse("0: P D F0.0 L\n1: P D RF0>1.0 F1.0 L"), {})


def test_large_schedules_are_quick() -> None:
    lists = build("1f1b", 64, 512, chain(64))
    costs = even(64)
    began = time.process_time()
    result = simulate(lists, costs, dict.fromkeys(chain(64), 0.01))
    assert time.process_time() - began < 2.0  # measured 0.28 s on one core; the rest is for slow test machines
    assert result.in_flight[0] == 64
