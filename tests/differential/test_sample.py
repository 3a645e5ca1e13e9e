"""The sample of the matrix that every change must pass, one test a family; `python -m tests.differential` runs all of it.

The first trial of each family is played on real gloo ranks too; these alone cover every family and every mesh.
"""

from __future__ import annotations

import itertools

import pytest

from tests import zoo

from .matrix import MESHES, MICROBATCHES, PLANS, Trial, run, sample, trials

SAMPLE = sample(trials(), each=2, seed=0)
UNPROMOTED = sample(trials(zoo.LISTED[::4], dtype="float32"), each=1, seed=1)


def by_family(chosen: list[Trial]) -> dict[str, list[Trial]]:
    return {family: list(group) for family, group in itertools.groupby(chosen, key=lambda trial: trial.family)}


def check(trial: Trial, ranks: bool = False) -> None:
    row = run(trial, ranks=ranks)
    assert row.status == "ok", f"{trial}: {row.status}: {row.worst or row.notes}\n{row.trace}"


@pytest.mark.parametrize("family", zoo.LISTED)
def test_float64(family: str) -> None:
    first, *others = by_family(SAMPLE)[family]
    check(first, ranks=True)
    for trial in others:
        check(trial)


@pytest.mark.parametrize("trial", UNPROMOTED, ids=str)
def test_float32(trial: Trial) -> None:
    check(trial)


def test_a_dim_that_a_rank_holds_nothing_of() -> None:
    """This plan cuts a dim of one element over two ranks, and reduce-scatters another dim of the same tensor."""
    check(Trial("phi3", "tp2", 1, "random0"))


def test_the_sample_covers_everything() -> None:
    assert {trial.family for trial in SAMPLE} == set(zoo.LISTED)
    assert {(t.mesh, t.microbatches) for t in SAMPLE} == set(itertools.product(MESHES, MICROBATCHES))
    assert {(t.mesh, t.plan) for t in SAMPLE} == set(itertools.product(MESHES, PLANS))
    on_ranks = [group[0] for group in by_family(SAMPLE).values()]
    assert {trial.mesh for trial in on_ranks} == set(MESHES)
