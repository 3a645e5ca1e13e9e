"""The sample of the matrix that every change must pass, one test a family; `python -m tests.differential` runs all of it."""

from __future__ import annotations

import itertools

import pytest

from tests import zoo

from .matrix import MESHES, MICROBATCHES, PLANS, Trial, run, sample, trials

SAMPLE = sample(trials(), each=2, seed=0)
UNPROMOTED = sample(trials(zoo.LISTED[::4], dtype="float32"), each=1, seed=1)


def by_family(chosen: list[Trial]) -> list[object]:
    groups = itertools.groupby(chosen, key=lambda trial: trial.family)
    return [pytest.param(list(group), id=family) for family, group in groups]


def check(chosen: list[Trial]) -> None:
    rows = [run(trial) for trial in chosen]
    bad = [row for row in rows if row.status != "ok"]
    assert not bad, "\n\n".join(f"{row.trial}: {row.status}: {row.worst or row.notes}\n{row.trace}" for row in bad)


@pytest.mark.parametrize("chosen", by_family(SAMPLE))
def test_float64(chosen: list[Trial]) -> None:
    check(chosen)


@pytest.mark.parametrize("chosen", by_family(UNPROMOTED))
def test_float32(chosen: list[Trial]) -> None:
    check(chosen)


def test_the_sample_covers_everything() -> None:
    assert {trial.family for trial in SAMPLE} == set(zoo.LISTED)
    assert {(t.mesh, t.microbatches) for t in SAMPLE} == set(itertools.product(MESHES, MICROBATCHES))
    assert {(t.mesh, t.plan) for t in SAMPLE} == set(itertools.product(MESHES, PLANS))
