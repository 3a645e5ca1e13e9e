"""Each family, and each mesh, once on real gloo ranks: equal to the same plan played in process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import zoo

from .gloo import WORLD, assign
from .matrix import MESHES, sample, trials

TRIALS = {trial.family: trial for trial in sample(trials(), each=1, seed=2)}
pytestmark = [pytest.mark.xdist_group("gloo"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All trials served by one start of the ranks."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    todo, done = folder / "trials.jsonl", folder / "rows.jsonl"
    todo.write_text("".join(json.dumps(dataclasses.asdict(trial)) + "\n" for trial in TRIALS.values()))
    subprocess.run([sys.executable, "-m", "tests.differential.gloo", str(todo), str(done)], check=True, timeout=840)
    found = [json.loads(line) for line in done.read_text().splitlines()]
    return {row["trial"]["family"]: row for row in found}


@pytest.mark.parametrize("family", zoo.LISTED)
def test_real_ranks_equal_the_in_process_player(family: str, rows: dict[str, dict[str, Any]]) -> None:
    row = rows[family]
    assert row["status"] == "ok", f"{TRIALS[family]}: {row['status']}: {row['worst'] or row['notes']}\n{row['trace']}"


def test_every_mesh_is_served() -> None:
    assert {trial.mesh for trial in TRIALS.values()} == set(MESHES)


def test_no_two_ranks_of_a_trial_share_a_process() -> None:
    for trial, members in assign(list(TRIALS.values())):
        assert len(set(members)) == trial.ranks and set(members) <= set(range(WORLD))
