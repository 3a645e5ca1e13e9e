"""1,000 random graphs against one device, and every planted bug found."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from tests.fuzz import bugs
from tests.fuzz.case import Case
from tests.fuzz.generate import generate
from tests.fuzz.hunt import fuzz, hunt, shows
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
        assert again.graph.values == case.graph.values
        assert again.graph.updates == case.graph.updates


PLANS = """
from tests.fuzz.generate import generate
from autoshard.plan.search import random_plan
for case in map(generate, range(6)):
    print(case.script, random_plan(case.graph, {"dp": case.shape.size("dp"), "tp": case.shape.size("tp")}, 1, case.plan).to_yaml())
"""


def test_graphs_and_plans_are_the_same_in_every_process() -> None:
    """Also where sets are ordered otherwise: a seed must mean the same wherever it is run."""
    texts = set()
    for hash_seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        texts.add(subprocess.run([sys.executable, "-c", PLANS], env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(texts) == 1
