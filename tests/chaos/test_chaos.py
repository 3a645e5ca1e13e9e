"""A part of each count; `python -m tests.chaos` runs them in full."""

from __future__ import annotations

import pytest

from . import damage, full, hostile, kills


def test_damage_is_refused_with_the_file_named(tmp_path):
    assert damage.run(tmp_path, 100).startswith("100 of 100 refused")


def test_hostile_checkpoints_are_refused(tmp_path):
    assert "no code run" in hostile.run(tmp_path, len(hostile.CASES) + 50)


def test_a_full_disk_is_one_clean_error(tmp_path):
    if full.why_not():
        pytest.skip(full.why_not())
    said = full.run(tmp_path, 10)
    assert said.startswith("10 of 10") and "'full'" in said and "'room'" in said and "real ranks" in said, said


@pytest.mark.parametrize(("ranks", "count", "wait"), [(1, 8, True), (1, 6, False), (4, 2, True), (4, 2, False)])
def test_killed_runs_go_on(tmp_path, ranks, count, wait):
    assert "0 acknowledged steps lost" in kills.run(tmp_path, count, ranks=ranks, wait=wait)


@pytest.mark.slow
@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_hundred_kills(tmp_path, ranks, wait):
    assert "0 acknowledged steps lost" in kills.run(tmp_path, 100, seed=1, ranks=ranks, wait=wait)
