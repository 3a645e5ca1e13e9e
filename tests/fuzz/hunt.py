"""Many graphs: `fuzz` compares one seed with one device, `hunt` looks for the first graph that shows a planted bug."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

from . import bugs
from .case import Case
from .generate import generate
from .run import Failure, Outcome, Skipped, reference, trial
from .shrink import report, shrink

FULL_EVERY = 20
"""One graph in so many goes through differentiated fx graphs too, which takes a second or two."""


@dataclass
class Result:
    """One graph. `failure`: the difference and the shrunk case, as text."""

    seed: int
    mesh: str
    ops: int
    targets: tuple[str, ...]
    seconds: float
    full: bool = False
    skipped: str = ""
    failure: str = ""


def fuzz(seed: int, full_every: int = FULL_EVERY, shrinking: float = 60.0) -> Result:
    """Run one graph; if it fails, make it small."""
    start = time.monotonic()
    case = generate(seed)
    result = Result(seed, case.mesh, len(case.graph.ops), tuple(op.target for op in case.graph.ops), 0.0, seed % full_every == 0)
    try:
        expected = reference(case)
        for full in (False, True)[: 1 + result.full]:
            if trial(case, full, expected):
                small, failure = shrink(case, functools.partial(trial, full=full), shrinking)
                result.failure = f"graph {seed}{', differentiated' if full else ''}: {report(small, failure)}"
                break
    except Skipped as skipped:
        result.skipped = str(skipped)
    result.seconds = time.monotonic() - start
    return result


@dataclass
class Find:
    """What became of a planted bug: the number of graphs tried, the failure, the shrunk case."""

    name: str
    seed: int | None
    tried: int
    seconds: float
    failure: Failure | None = None
    small: Case | None = None


@functools.cache
def _known(seed: int) -> tuple[Case, Outcome]:
    case = generate(seed)
    return case, reference(case)


def hunt(name: str, count: int, seed: int = 0, first: int | None = None, shrinking: float = 0.0) -> Find:
    """The first graph of `count` that fails with the bug in place and not without it. `first`: where to look before all others."""
    start = time.monotonic()
    seeds = [*([first] if first is not None else []), *range(seed, seed + count)]
    for tried, s in enumerate(seeds, 1):
        case, expected = _known(s)
        if failure := shows(name, case, expected):
            small = None
            if shrinking:
                small, failure = shrink(case, functools.partial(shows, name), shrinking)
            return Find(name, s, tried, time.monotonic() - start, failure, small)
    return Find(name, None, len(seeds), time.monotonic() - start)


def shows(name: str, case: Case, expected: Outcome | None = None) -> Failure | None:
    expected = expected or reference(case)
    try:
        with bugs.planted(name):
            failure = trial(case, expected=expected)
        return failure if failure and not trial(case, expected=expected) else None
    except Skipped:
        return None
