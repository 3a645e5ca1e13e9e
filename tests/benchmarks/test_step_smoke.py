"""The step benchmark end to end, as small as it gets, on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import harness, step

TINY = "--layers 1 --hidden 32 --ffn 48 --heads 4 --kv 2 --vocab 67 --seq 16 --batch 2 --device cpu --steps 1 --losses 2".split()


def test_ours_and_plain_stay_in_step_and_ours_runs_compiled(tmp_path):
    found = step.main([*TINY, "--dtype", "bfloat16", "--impl", "ours,plain-eager", "--results", str(tmp_path)])
    ours = found["runs"]["ours"]["compiled"]
    assert ours["graphs"] >= ours["with_ops"] > 0
    assert not ours["graph_breaks"] and ours["ran_uncompiled"] == ours["never_compiled"] == 0
    (written,) = tmp_path.iterdir()
    content = json.loads(written.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert set(content["runs"]) == {"ours", "plain-eager"} and "ours / plain-eager" in content["ratios"]


def test_losses_that_part_are_an_error():
    runs = [step.Run("ours", lambda ids: ids, losses=[5.0, 4.9]), step.Run("plain-eager", lambda ids: ids, losses=[5.0, 4.8])]
    with pytest.raises(AssertionError, match="step 1"):
        step.check(runs, torch.bfloat16)


def test_frames_see_what_runs_as_python():
    def plain(x):
        return x + 1

    def other(x):
        return x + 2

    compiled = torch.compile(other, backend="eager")
    compiled(torch.ones(1))
    with harness.frames({plain.__code__, other.__code__}) as ran:
        plain(torch.ones(1))
        compiled(torch.ones(1))
    assert ran == {plain.__code__: 1, other.__code__: 0}
