"""The planner's benchmark, as small as it gets; and that planning works per distinct block, not per layer."""

from __future__ import annotations

import json

from benchmarks import planner

TINY = "--hidden 64 --ffn 128 --heads 4 --kv 2 --vocab 128 --seq 32 --batch 8 --cluster cpux4".split()


def test_a_record_is_written(tmp_path):
    found = planner.main(["--layers", "2,3", *TINY, "--results", str(tmp_path)])
    assert [row["layers"] for row in found["rows"]] == [2, 3]
    assert all(row["search_s"] > 0 and row["lower_s"] > 0 and row["source_lines"] > 50 for row in found["rows"])
    (written,) = tmp_path.iterdir()
    assert json.loads(written.read_text())["cluster"] == "cpux4"
