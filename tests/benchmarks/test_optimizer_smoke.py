"""The optimizer's benchmark end to end, as small as it gets, in the kernels' interpreter."""

from __future__ import annotations

import json

from autoshard.kernels import many
from benchmarks import optimizer

from ..kernels.conftest import triton  # noqa: F401  (a fixture)

TINY = "--device cpu --layers 1 --hidden 16 --ffn 24 --heads 2 --kv 1 --head-dim 8 --vocab 9 --rounds 1 --only check,masters".split()


def test_all_is_measured_and_constants_are_put_back(triton, tmp_path):  # noqa: F811
    before = many.MASTER_BLOCK
    found = optimizer.main([*TINY, "--results", str(tmp_path), "--tune", "many.MASTER_BLOCK=512,1024"])
    assert list(found["cases"]) == ["check", "masters"] and many.MASTER_BLOCK == before
    assert all({"ours", "torch"} == runs.keys() and runs["ours"]["ms"] > 0 for runs in found["cases"].values())
    assert all(len(runs["ours"]["tuned"]) == 2 for runs in found["cases"].values())
    (written,) = tmp_path.iterdir()
    assert json.loads(written.read_text())["copy_bytes_per_s"] > 0
