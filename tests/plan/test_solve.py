"""Elimination against HiGHS, and against brute force, on random problems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from autoshard.plan import solve
from autoshard.plan.solve import Problem


def random_problem(seed: int, variables: int, choices: int, edges: int) -> tuple[dict[str, int], dict[tuple[str, ...], np.ndarray]]:
    rng = np.random.default_rng(seed)
    names = [f"v{i}" for i in range(variables)]
    sizes = {n: int(rng.integers(2, choices + 1)) for n in names}
    tables: dict[tuple[str, ...], np.ndarray] = {(n,): rng.random(sizes[n]) for n in names}
    for _ in range(edges):
        i = int(rng.integers(variables - 1))
        j = min(variables - 1, i + 1 + int(rng.integers(3)))
        if i != j:
            table = rng.random((sizes[names[i]], sizes[names[j]]))
            table[rng.random(table.shape) < 0.1] = np.inf
            tables[names[i], names[j]] = table
    return sizes, tables


def build(sizes: dict[str, int], tables: dict[tuple[str, ...], np.ndarray]) -> Problem:
    problem = Problem(dict(sizes))
    for scope, table in tables.items():
        problem.add(scope, table)
    return problem


def cost(tables: dict[tuple[str, ...], np.ndarray], choice: dict[str, int]) -> float:
    return sum(float(t[tuple(choice[v] for v in scope)]) for scope, t in tables.items())


def highs(sizes: dict[str, int], tables: dict[tuple[str, ...], np.ndarray]) -> float:
    """The same problem as an integer program: one 0/1 variable per entry of each table."""
    columns: dict[tuple[tuple[str, ...], tuple[int, ...]], int] = {}
    prices: list[float] = []
    for scope, table in tables.items():
        for index in itertools.product(*(range(n) for n in table.shape)):
            columns[scope, index] = len(prices)
            prices.append(float(table[index]))
    rows, right = [], []
    for v in sizes:
        row = np.zeros(len(prices))
        row[[columns[(v,), (i,)] for i in range(sizes[v])]] = 1
        rows.append(row)
        right.append(1.0)
    for scope in (s for s in tables if len(s) == 2):
        for side, v in enumerate(scope):
            for i in range(sizes[v]):
                row = np.zeros(len(prices))
                for index in itertools.product(*(range(sizes[u]) for u in scope)):
                    if index[side] == i:
                        row[columns[scope, index]] = 1
                row[columns[(v,), (i,)]] -= 1
                rows.append(row)
                right.append(0.0)
    c = np.array(prices)
    upper = np.where(np.isfinite(c), 1.0, 0.0)
    found = milp(np.where(np.isfinite(c), c, 0.0), constraints=LinearConstraint(np.array(rows), right, right), integrality=np.ones(len(c)),
                 bounds=Bounds(0, upper))  # fmt: skip
    return float(found.fun)


@pytest.mark.parametrize("seed", range(12))
def test_the_minimum_is_that_of_an_integer_program(seed: int) -> None:
    sizes, tables = random_problem(seed, 9, 4, 16)
    best, choice = build(sizes, tables).minimum()
    assert best == pytest.approx(highs(sizes, tables), abs=1e-9)
    assert cost(tables, choice) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(6))
def test_folding_equal_blocks_changes_nothing(seed: int) -> None:
    """A chain of blocks with equal tables, folded with one key, against the same chain unfolded."""
    rng = np.random.default_rng(seed)
    inner = {(0,): rng.random(3), (0, 1): rng.random((3, 4)), (1, 2): rng.random((4, 2)), (0, 2): rng.random((3, 2))}
    link = rng.random((2, 3))
    sizes: dict[str, int] = {}
    tables: dict[tuple[str, ...], np.ndarray] = {}
    for block in range(5):
        names = [f"b{block}_{i}" for i in (9, 1, 5)]  # names sort differently from their positions
        sizes |= dict(zip(names, (3, 4, 2), strict=True))
        tables |= {tuple(names[i] for i in scope): t for scope, t in inner.items()}
        if block:
            tables[f"b{block - 1}_5", names[0]] = link
    plain, folded = build(sizes, tables), build(sizes, tables)
    for block in range(5):
        folded.fold([f"b{block}_1"], [f"b{block}_9", f"b{block}_5"], "block")
    expected, found = plain.minimum(), folded.minimum()
    assert found[0] == pytest.approx(expected[0])
    assert cost(tables, found[1]) == pytest.approx(expected[0])


def test_an_infeasible_problem_costs_infinity() -> None:
    problem = Problem({"a": 2, "b": 2})
    problem.add(("a", "b"), np.full((2, 2), np.inf))
    assert problem.minimum()[0] == np.inf


def shared(seed: int, layers: int = 5, weights: int = 3) -> tuple[dict[str, int], dict[tuple[str, ...], np.ndarray]]:
    """A chain in which every link uses the same few weights, as a layer that is applied again and again does."""
    rng = np.random.default_rng(seed)
    sizes = {f"w{i}": 4 for i in range(weights)} | {f"x{k}.{i}": 3 for k in range(layers) for i in range(weights)}
    tables: dict[tuple[str, ...], np.ndarray] = {(n,): rng.random(size) for n, size in sizes.items()}
    chain = [f"x{k}.{i}" for k in range(layers) for i in range(weights)]
    again = {i: rng.random((4, 3)) * 3 for i in range(weights)}
    for a, b in itertools.pairwise(chain):
        tables[a, b] = rng.random((3, 3))
    for name in chain:
        i = int(name.partition(".")[2])
        tables[f"w{i}", name] = again[i]
    return sizes, tables


@pytest.mark.parametrize("seed", range(5))
def test_variables_that_tie_too_much_together_are_set_one_at_a_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, tables = shared(seed)
    best, _ = build(sizes, tables).minimum()
    monkeypatch.setattr(solve, "LARGEST", 350)  # all at once need 3 · 3 · 4³; with the weights known, links of 3 · 3
    assert isinstance(build(sizes, tables)._given({}), solve.TooWide)
    found, choice = build(sizes, tables).minimum()
    assert found == pytest.approx(cost(tables, choice))
    assert best - 1e-12 <= found <= best * 1.1
    assert set(choice) == set(sizes)
