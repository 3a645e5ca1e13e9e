"""The kernels' benchmark end to end, as small as it gets, on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from autoshard.kernels.registry import KERNELS
from benchmarks import kernels

TINY = (
    "--tokens 32 --seq 16 --hidden 32 --ffn 48 --heads 4 --kv 2 --head-dim 8 --vocab 67 --experts 4 --expert-ffn 16 --params 1000 "
    "--device cpu --rounds 1 --repeat 1 --no-compile"
).split()


def test_every_kernel_is_measured_beside_its_reference(tmp_path):
    found = kernels.main([*TINY, "--results", str(tmp_path)])
    assert {k["kernel"] for k in found["kernels"]} == {k.name for k in KERNELS}
    assert all({"ours", "eager"} <= set(k["runs"]) and not k["failed"] for k in found["kernels"])
    (written,) = tmp_path.iterdir()
    content = json.loads(written.read_text())
    assert content["machine"]["torch"] == torch.__version__ and content["copy_bytes_per_s"] > 0
    assert all(k["error"] <= 3e-2 and k["runs"]["ours"]["of_ceiling"] > 0 for k in content["kernels"])


def test_constants_are_tried_and_put_back():
    from autoshard.kernels import norm

    before = norm.TILE
    found = kernels.main([*TINY, "--only", "rms_norm", "--results", "", "--tune", "norm.TILE=16,64", "--tune", "norm.WAVES=1,3"])
    assert len(found["kernels"][0]["tuned"]) == 4 and norm.TILE == before
    with pytest.raises(SystemExit):
        kernels.main([*TINY, "--tune", "norm.NONSENSE=1"])


def test_a_wrong_kernel_is_not_timed():
    case = kernels.Case(KERNELS["rms_norm"], [torch.ones(2, 4)], [0], lambda x: 2 * x, lambda x: x)
    with pytest.raises(AssertionError, match="from its reference"):
        kernels.compare(case, {name: kernels.Step(case, run) for name, run in (("ours", case.ours), ("eager", case.eager))})
