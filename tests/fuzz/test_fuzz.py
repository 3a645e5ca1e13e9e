"""1,000 random graphs against one device, and every planted bug found."""

from __future__ import annotations

import functools

import pytest

from tests.fuzz import bugs
from tests.fuzz.case import Case
from tests.fuzz.generate import generate
from tests.fuzz.hunt import fuzz, hunt, shows
from tests.fuzz.run import trial
from tests.fuzz.shrink import shrink

GRAPHS, CHUNK = 1000, 25
WITHIN = 1000
"""Graphs in which a planted bug must show."""


@pytest.mark.parametrize("start", range(0, GRAPHS, CHUNK))
def test_random_graphs(start: int) -> None:
    results = [fuzz(seed) for seed in range(start, start + CHUNK)]
    failures = [r.failure for r in results if r.failure]
    assert not failures, "\n\n".join(failures)
    assert sum(bool(r.skipped) for r in results) <= CHUNK // 5, [r.skipped for r in results if r.skipped]


@pytest.mark.parametrize("name", bugs.BUGS)
def test_planted_bug_is_found(name: str) -> None:
    find = hunt(name, WITHIN, first=bugs.SEEN.get(name))
    assert find.seed is not None, f"{bugs.BUGS[name].text} No graph of {find.tried} shows it."


@pytest.mark.parametrize("name", ["segments gathered as one", "offset of an even split", "gradient of R taken for I"])
def test_failures_shrink(name: str) -> None:
    find = hunt(name, WITHIN, first=bugs.SEEN.get(name))
    assert find.seed is not None
    small, failure = shrink(generate(find.seed), functools.partial(shows, name), seconds=60)
    assert small.script.count("\n") < 15, f"{failure}\n{small.script}"
    with bugs.planted(name), pytest.raises(AssertionError):
        exec(small.script)
    exec(small.script)


def test_text_round_trips() -> None:
    for seed in range(40):
        case = generate(seed)
        again = Case.parse(case.text, case.mesh)
        assert again.text == case.text
        assert [(v.tensor, v.grad) for v in again.graph.values.values()] == [(v.tensor, v.grad) for v in case.graph.values.values()]


def test_a_graph_is_the_same_every_time() -> None:
    assert [generate(seed).script for seed in range(5)] == [generate(seed).script for seed in range(5)]
    assert trial(generate(0)) is None
