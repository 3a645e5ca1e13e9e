"""On a GPU: every kernel against its reference at the widths of real models, and under torch.compile."""

from __future__ import annotations

import pytest
import torch

from autoshard.kernels import cuda, quantise
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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", [(8, 8), (136, 264), (4096, 1032)])
def test_casts_in_cuda_are_the_reference(shape, kind):
    r, c = shape
    wide = torch.randn(r, c + 16, device="cuda", dtype=torch.bfloat16)
    wide[0, 0], wide[r - 1, c - 1] = 0.0, 1e4
    for x in (wide[:, :c], wide[:, :c].contiguous() * 0, wide[:, 8 : 8 + c]):
        assert cuda.available(x) and quantise._cuda_applies(x)
        for scale in (None, torch.tensor(3.0, device="cuda")):
            for transpose in (False, True):
                found = quantise._cast(x, scale, kind, transpose)
                wanted = quantise.reference(x.contiguous(), scale, kind, transpose)
                for mine, theirs in zip(found[:2], wanted[:2], strict=True):
                    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
                torch.testing.assert_close(found[2:], wanted[2:], rtol=1e-6, atol=0)
        q, turned = torch.ops.autoshard.fp8_cast(x, torch.tensor(3.0, device="cuda"), kind, True)
        assert torch.equal(q.view(torch.uint8).t(), turned.view(torch.uint8))
        assert torch.equal(q.view(torch.uint8), wanted[0].view(torch.uint8))
