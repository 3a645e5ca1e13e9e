"""On a GPU: every kernel against its reference at the widths of real models, and under torch.compile."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness, kernels

SHAPES = "--tokens 2048 --seq 1024 --vocab 32000 --params 1000003 --no-compile --rounds 1 --repeat 1 --device cuda".split()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("group", kernels.CASES)
def test_kernels_are_their_references(group, dtype):
    a = kernels.arguments([*SHAPES, "--dtype", dtype])
    for case in kernels.CASES[group](kernels.Maker(a, torch.device("cuda"))):
        kernels.compare(case, {name: kernels.Step(case, run) for name, run in (("ours", case.ours), ("eager", case.eager))})
        harness.collect()


@pytest.mark.gpu
@pytest.mark.parametrize("group", kernels.CASES)
def test_kernels_under_inductor_and_in_a_graph(group):
    device = torch.device("cuda")
    for case in kernels.CASES[group](kernels.Maker(kernels.arguments(SHAPES), device)):
        compiled = torch.compile(case.ours, fullgraph=True, dynamic=False)
        kernels.compare(case, {name: kernels.Step(case, run) for name, run in (("ours", compiled), ("eager", case.ours))})
        step = kernels.Step(case, case.ours)
        _, captured = kernels.graphed(step, device, 1)
        assert captured, f"{case.kernel.name} waits for the host"
