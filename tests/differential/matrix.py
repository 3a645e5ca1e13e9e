"""The matrix of trials, family × mesh × microbatches × plan, and what one trial does.

`run(trial)` captures the family's model (once), plans, compiles and plays all ranks in this process, and compares with the
plain run; on request it then starts real ranks, forked from here so that they share the program, and compares them with the player.
It never raises: a `Row` tells what came of it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests import zoo

from .compare import Difference, compare
from .ranks import on_ranks
from .reference import FLOAT32, FLOAT64, RANKS, Outcome, Settings, build, follow, precision, reference

MESHES: dict[str, dict[str, int]] = {
    "dp2": {"dp": 2},
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "pp2": {"pp": 2},
    "dp2.tp2": {"dp": 2, "tp": 2},
    "tp2.pp2": {"pp": 2, "tp": 2},
    "pp2.dp2.tp2": {"pp": 2, "dp": 2, "tp": 2},
}
MICROBATCHES = (1, 4)
PLANS = ("best", "random0", "random1", "random2")
"""The planner's own, and random legal ones by seed."""


@dataclass(frozen=True)
class Trial:
    family: str
    mesh: str
    microbatches: int
    plan: str
    dtype: str = "float64"

    def __str__(self) -> str:
        return f"{self.family}-{self.mesh}-mb{self.microbatches}-{self.plan}-{self.dtype}"

    @property
    def axes(self) -> dict[str, int]:
        return MESHES[self.mesh]

    @property
    def ranks(self) -> int:
        return math.prod(self.axes.values())

    @property
    def settings(self) -> Settings:
        return FLOAT64 if self.dtype == "float64" else FLOAT32


@dataclass(frozen=True)
class Row:
    """What came of a trial: ok, fail (too far apart), error (an exception) or n/a (no legal plan)."""

    trial: Trial
    status: str
    ratio: float = 0.0
    worst: str = ""
    notes: str = ""
    seconds: float = 0.0
    trace: str = ""

    @property
    def passed(self) -> bool:
        return self.status in ("ok", "n/a")


def trials(
    families: Sequence[str] = zoo.LISTED, meshes: Sequence[str] = tuple(MESHES), microbatches: Sequence[int] = MICROBATCHES,
    plans: Sequence[str] = PLANS, dtype: str = "float64",
) -> list[Trial]:  # fmt: skip
    return [Trial(*choice, dtype) for choice in itertools.product(families, meshes, microbatches, plans)]


def sample(choices: Sequence[Trial], each: int, seed: int) -> list[Trial]:
    """`each` trials a family, the same for the same seed, spread so that meshes, microbatches and plans come up equally often."""
    used: Counter[object] = Counter()
    chosen = []
    for family, group in itertools.groupby(choices, key=lambda trial: trial.family):
        rest = list(group)
        random.Random(f"{seed} {family}").shuffle(rest)
        for _ in range(min(each, len(rest))):
            trial = min(rest, key=lambda t: (used[t.mesh], used[t.mesh, t.plan, t.microbatches], used[t.plan], used[t.microbatches]))
            rest.remove(trial)
            chosen.append(trial)
            used.update((trial.mesh, (trial.mesh, trial.plan, trial.microbatches), trial.plan, trial.microbatches))
    return chosen


@dataclass(frozen=True)
class Subject:
    """What all trials of a family share. The model stays as built: each trial trains a copy."""

    case: zoo.Case
    model: Any
    kwargs: dict[str, Any]
    captured: Any
    expected: Outcome


@functools.lru_cache(maxsize=1)
def subject(family: str, settings: Settings) -> Subject:
    from autoshard.trace.capture import capture

    case = zoo.case(family)
    model, kwargs = build(case, settings)
    with precision(settings):
        captured = capture(model, kwargs=kwargs, loss=case.loss)
    return Subject(case, model, kwargs, captured, reference(case, settings))


def plan_of(trial: Trial, graph: Any) -> Any:
    from autoshard.plan.cluster import Cluster
    from autoshard.plan.search import random_plan, search

    if trial.plan == "best":
        return search(graph, cluster=Cluster.local(trial.ranks), mesh=trial.axes, microbatches=trial.microbatches)
    seed = int(trial.plan.removeprefix("random"))
    return random_plan(graph, mesh=trial.axes, microbatches=trial.microbatches, seed=seed)


def judge(subject: Subject, plan: Any, settings: Settings, ranks: int) -> list[Difference]:
    """All ranks of the plan played in this process against the plain model; and, if `ranks`, as many real ones against the player."""
    from autoshard.lower import compile
    from autoshard.runtime.in_process import InProcess

    program = compile(subject.captured, plan, dropout="exact")

    def played(settings: Settings) -> Outcome:
        return follow(InProcess(program, copy.deepcopy(subject.model)), subject.kwargs, settings)

    worst = [compare(subject.expected, played(settings), settings)[0]]
    if ranks:
        from autoshard.runtime.module import Sharded

        worst += on_ranks(ranks, lambda: Sharded(program, copy.deepcopy(subject.model)), subject.kwargs, RANKS, played(RANKS))
    return worst


def run(trial: Trial, limit: float = 300.0, ranks: bool = False) -> Row:
    """One trial, in at most `limit` seconds; on real gloo ranks too if `ranks`."""
    from autoshard.errors import NoPlanError

    start = time.monotonic()
    try:
        with time_limit(limit):
            it = subject(trial.family, trial.settings)
            plan = plan_of(trial, it.captured.graph)
            worst = max(judge(it, plan, trial.settings, trial.ranks if ranks else 0), key=lambda d: d.ratio)
        fewer = f"{plan.microbatches} microbatches: {'; '.join(plan.notes) or 'unexplained'}"
        notes = fewer if plan.microbatches != trial.microbatches else ""
        status = "ok" if worst.ratio <= 1 else "fail"
        return Row(trial, status, worst.ratio, str(worst), notes, time.monotonic() - start)
    except NoPlanError as error:
        return Row(trial, "n/a", notes=str(error), seconds=time.monotonic() - start)
    except Exception as error:
        summary = f"{type(error).__name__}: {error}"
        return Row(trial, "error", math.inf, summary, seconds=time.monotonic() - start, trace=traceback.format_exc())


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block when it runs too long (in the main thread, where there are signals)."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"ran past {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
