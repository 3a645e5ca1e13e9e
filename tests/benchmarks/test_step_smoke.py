"""The step benchmark end to end, as small as it gets, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, peers, step, summary

TINY = "--tiny --device cpu --steps 1 --losses 2".split()


def run(tmp_path: Path, *argv: str) -> dict:
    return step.main([*TINY, *argv, "--results", str(tmp_path)])


def test_ours_and_plain_stay_in_step_and_ours_runs_compiled(tmp_path):
    argv = ["--work", "llama-1.2b", "--layers", "1", "--model", "plain", "--impl", "ours,plain-eager,megatron"]
    found = run(tmp_path, *argv)
    ours = found["runs"]["ours"]["compiled"]
    assert ours["graphs"] >= ours["with_ops"] > 0
    assert not ours["graph_breaks"] and ours["ran_uncompiled"] == ours["never_compiled"] == 0
    assert found["problems"] == []
    assert found["runs"]["megatron"]["problem"].startswith("absent: ")
    assert found["runs"]["ours"]["times_floor"] > 0 and found["finished"]
    (written,) = tmp_path.iterdir()
    content = json.loads(written.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["ratios"].keys() == {"ours / plain-eager"}


@pytest.mark.parametrize("work", ["vit-350m", *(pytest.param(w, marks=pytest.mark.slow) for w in ("gpt2-350m", "bert-350m"))])
def test_other_families_in_float32(tmp_path, work):
    argv = ["--work", work, "--dtype", "float32", "--layers", "1", "--no-floor", "--impl", "ours[compile=false],plain-eager"]
    found = run(tmp_path, *argv)
    assert found["problems"] == [] and all("problem" not in each for each in found["runs"].values())


def test_what_fails_is_reported_and_the_others_go_on(tmp_path):
    argv = ["--work", "llama-8b-layers", "--model", "plain", "--no-floor", "--impl", "ours[nonsense=1],plain-eager,ddp-compile"]
    found = run(tmp_path, *argv)
    assert found["runs"]["ours[nonsense=1]"]["problem"].startswith("failed: TypeError")
    assert found["runs"]["ddp-compile"]["problem"] == "absent: needs several devices"
    assert found["runs"]["plain-eager"]["ms"] > 0
    assert "nonsense" in summary.table(found).markdown()


def ranks(tmp_path: Path, work: str, impl: str) -> dict:
    """In processes of its own, as it starts its ranks by itself."""
    argv = ["--work", work, "--model", "plain", "--no-floor", "--impl", impl, "--results", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.step", *TINY, *argv], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (written,) = tmp_path.iterdir()
    return json.loads(written.read_text())


def test_two_ranks(tmp_path):
    found = ranks(tmp_path, "llama-8b-layers-12-dp2", "ours[compile=false],ddp-compile[compile=false],fsdp2-compile[compile=false]")
    assert found["problems"] == [] and all("problem" not in each for each in found["runs"].values())
    assert {each["devices"] for each in found["runs"].values()} == {2}


@pytest.mark.slow
def test_two_stages_beside_half_the_layers(tmp_path):
    found = ranks(tmp_path, "llama-8b-layers-12-pp2", "ours[compile=false],half-compile[compile=false],plain-eager")
    assert found["problems"] == [] and not found["runs"]["half-compile[compile=false]"]["same_work"]
    pair = "ours[compile=false] / half-compile[compile=false]"
    assert found["ratios"][f"{pair}, bubble apart"] == pytest.approx(found["ratios"][pair] * 8 / 9)


def row(losses: list[float], ms: float = 1.0, **more) -> dict:
    facts = {"same_work": True, "precise": True, "noisy": False, "coarse": False, "compiled": {}, "flops_per_device": 1.0, "bubble": 1.0}
    return {"losses": losses, "ms": ms, "relative": None, **facts, **more}


def test_losses_that_part_are_found():
    runs = {"ours": row([5.0, 4.9]), "plain-eager": row([5.0, 4.8])}
    (problem,) = summary.check(runs, torch.bfloat16)
    assert problem.startswith("step 1: ours has the loss 4.9")
    assert summary.check({"ours": row([5.0, 4.81]), "plain-eager": row([5.0, 4.8])}, torch.bfloat16) == []
    assert summary.check({"ours": row([float("nan")]), "plain-eager": row([5.0])}, torch.bfloat16)


def test_what_ran_uncompiled_is_found():
    bad = {"graphs": 3, "with_ops": 3, "graph_breaks": {}, "ran_uncompiled": 1, "never_compiled": 0}
    (problem,) = summary.check({"ours": row([5.0], compiled=bad)}, torch.bfloat16)
    assert "uncompiled" in problem


def test_ratios_are_of_times_in_turns_and_per_device():
    runs = {
        "ours": row([], ms=10.0),
        "plain-eager": row([], ms=8.0, relative=0.5),
        "half-compile": row([], ms=8.0, relative=0.5, flops_per_device=0.5),
    }
    assert summary.ratios(runs) == {"ours / plain-eager": 2.0, "ours / half-compile": 1.0}


def test_options_and_unknown_names():
    first, last = peers.parse("megatron,ours[pins.zero=false,mesh=dp=1]")
    assert (first.name, first.options, last.name) == ("ours", {"pins": {"zero": False}, "mesh": "dp=1"}, "megatron")
    with pytest.raises(ValueError, match="no implementation 'theirs'"):
        peers.parse("theirs")


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
