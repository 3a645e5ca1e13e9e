"""Under torch.compile a kernel is one operator forward and one backward, and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from benchmarks import kernels

TINY = (
    "--tokens 8 --seq 4 --hidden 16 --ffn 24 --heads 4 --kv 2 --head-dim 8 --vocab 33 --experts 4 --expert-ffn 8 --params 100 "
    "--device cpu --dtype float32"
).split()


@pytest.mark.parametrize("group", [g for g in kernels.CASES if g not in ("adamw", "accumulate", "fp8")])
def test_it_stays_whole_and_computes_the_same(group):
    seen: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append([str(n.target) for n in graph.graph.nodes if "autoshard" in str(n.target)])
        return make_boxed_func(graph.forward)

    for case in kernels.CASES[group](kernels.Maker(kernels.arguments(TINY), torch.device("cpu"))):
        seen.clear()
        torch._dynamo.reset()
        compiled = torch.compile(case.ours, backend=aot_autograd(fw_compiler=look, bw_compiler=look), fullgraph=True, dynamic=False)
        steps = {name: kernels.Step(case, run) for name, run in (("ours", compiled), ("eager", case.ours))}
        assert kernels.compare(case, steps) <= 1e-6
        back = case.kernel.op.replace(".default", "_backward.default").replace(".add_", ".")
        backward = [[] if case.kernel.name == "linear_cross_entropy" else [back]] if case.wanted else []
        assert seen == [[case.kernel.op], *backward]
