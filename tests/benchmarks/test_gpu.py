"""The benchmarks on a GPU, small: every path that only a device takes."""

from __future__ import annotations

import pytest

from benchmarks import plans, profile, step

SMALL = "--layers 2 --hidden 512 --ffn 1024 --heads 4 --kv 2 --vocab 1024 --seq 256 --batch 2".split()

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("work", ["llama-8b-layers", "moe-8x2"])
def test_a_step_beside_all_peers(tmp_path, work):
    impl = "ours,ours-masters,plain-eager,plain-compile,megatron,megatron-fp8-tensorwise"
    found = step.main(["--work", work, *SMALL, "--model", "plain", "--impl", impl, "--steps", "2", "--results", str(tmp_path)])
    assert found["problems"] == []
    for name, run in found["runs"].items():
        assert run.get("problem", "").startswith("absent: ") if "problem" in run else run["peak_gib"] > 0 and run["times_floor"] > 1, name
    (floor,) = found["floors"].values()
    assert all(ms > 0 for row in floor["rows"] for ms in row["ms"].values()) and floor["copy_bytes_per_s"] > 1e11


def test_a_profile_finds_kernels(tmp_path):
    found = profile.main(["--work", "llama-8b-layers", *SMALL, "--impl", "ours", "--steps", "2", "--results", str(tmp_path)])
    parts = found["runs"]["ours"]["parts_ms"]
    assert all(parts[kind] > 0 for kind in ("matmul", "attention", "pointwise", "optimizer"))
    assert not any(k["kernel"].startswith("aten::") for k in found["runs"]["ours"]["busiest"])


def test_a_plan_counts_memory(tmp_path):
    found = plans.main(["--work", "llama-8b-layers", *SMALL, "--plan", "dp=1", "--steps", "2", "--results", str(tmp_path)])
    (row,) = found["rows"]
    assert not row["problem"] and row["peak_bytes"][0] > 0 and row["memory_error"] is not None
