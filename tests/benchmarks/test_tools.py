"""Plans, profiles and the suite, as small as they get, on the CPU."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import plans, profile, suite, traces

TINY = ["--tiny", "--device", "cpu", "--layers", "1", "--model", "plain"]


def test_plans_of_one_device(tmp_path):
    argv = ["--plan", "dp=1", "--plan", "dp=1 x 2", "--no-compile", "--steps", "1", "--results", str(tmp_path)]
    found = plans.main([*TINY, *argv])
    assert [row["microbatches"] for row in found["rows"]] == [1, 2]
    assert all(row["ms"] > 0 and not row["problem"] for row in found["rows"]) and found["loss_spread"] < 0.02
    (written,) = tmp_path.iterdir()
    assert json.loads(written.read_text())["rows"][1]["predicted_ms"] > 0


def test_predictions_are_judged():
    rows = [{"problem": "", "predicted_ms": p, "ms": m, "peak_bytes": [0, b], "predicted_peak_bytes": [b, 2 * b], "loss": 1.0}
            for p, m, b in ((1, 2, 8), (2, 2, 8), (4, 3, 8))]  # fmt: skip
    found = plans.judge([*rows, {"problem": "out of memory"}])
    assert found["mean_time_error"] == pytest.approx((1 / 2 + 0 + 1 / 3) / 3)
    assert found["mean_memory_error"] == 1.0 and found["chosen_over_best"] == 1.0
    assert found["rank_correlation"] == pytest.approx(math.sqrt(3) / 2)


def test_a_profile_adds_up(tmp_path):
    found = profile.main([*TINY, "--impl", "plain-eager,megatron", "--steps", "1", "--results", str(tmp_path)])
    run = found["runs"]["plain-eager"]
    assert run["parts_ms"]["matmul"] > 0 and run["parts_ms"]["pointwise"] > 0
    assert sum(run["parts_ms"].values()) == pytest.approx(run["profiled_ms"])
    assert found["runs"]["megatron"]["problem"].startswith("absent: ")
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"trace", "profile"}


def test_communication_is_hidden_or_exposed():
    def event(name: str, start: float, seconds: float) -> dict:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": start * 1e6, "dur": seconds * 1e6, "tid": 7}

    events = [event("nvjet", 0, 4), event("ncclAllGather", 1, 2), event("ncclReduceScatter", 3, 3), event("flash_fwd", 5, 2)]
    # beside them what is no kernel
    events.append({"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9e6, "tid": 1})
    found = traces.breakdown(traces.kernels({"traceEvents": events}))
    assert found.hidden == pytest.approx(2 + 1 + 1)  # the gather, and both ends of the scatter
    assert {k: v for k, v in found.seconds.items() if v} == pytest.approx({"matmul": 4, "attention": 2, traces.EXPOSED: 1})
    assert found.span == pytest.approx(7)


def test_the_suite_goes_on_whatever_happens(tmp_path, monkeypatch):
    chosen = {
        job.name: job
        for job in (
            suite.Job("broken", "nonsense", ()),
            suite.Job("many", "step", (), ranks=8),
            suite.Job("floor", "ceilings", ("--work", "llama-8b-layers")),
        )
    }
    monkeypatch.setattr(suite, "jobs", lambda: chosen)
    found = suite.main(["--tiny", "--device", "cpu", "--devices", "1", "--only", "broken,many,floor", "--out", str(tmp_path)])
    assert [r["status"] for r in found.values()] == ["exit code 1", "needs 8 devices, 1 are here", "done"]
    assert found["floor"]["record"]["work"] == "llama-8b-layers"
    assert "No module named" in (tmp_path / "broken" / "log.txt").read_text()
    summary = (tmp_path / "summary.md").read_text()
    assert all(name in summary for name in ("broken", "many", "floor"))


def test_a_job_past_its_limit_is_ended_with_all_its_ranks(tmp_path):
    job = suite.Job("long", "step", ("--work", "llama-8b-layers-12-tp2", "--tiny", "--device", "cpu", "--steps", "100000"), 2)
    ended: list[str] = []
    end = suite.end
    suite.end = lambda process, mark: (ended.append(mark), end(process, mark))[1]
    try:
        found = suite.run(job, 4.0, tmp_path, [])
    finally:
        suite.end = end
    assert found["status"] == "ended after 4 s" and suite.marked(ended[0]) == []
