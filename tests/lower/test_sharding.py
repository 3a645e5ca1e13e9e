"""It really shards: parameters, matmuls and collectives of lowered programs, counted in their graphs."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import pytest

from autoshard.lower import compile
from autoshard.lower.program import Call, Program
from autoshard.plan.cluster import Cluster
from autoshard.plan.search import search
from autoshard.trace.capture import Captured, capture
from tests import zoo

DENSE = ("gpt2", "gpt_neox", "opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "starcoder2",
         "cohere", "granite", "glm4", "bert", "t5", "whisper", "clip")  # fmt: skip
SLOW = ("roberta", "bart", "vit")
"""As one of the others does; with --slow."""
MATMULS = ("aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default")


@cache
def captured_of(family: str) -> Captured:
    model, kwargs = zoo.case(family).build()
    return capture(model, kwargs=kwargs)


def matmul_flops(call: Call) -> float:
    graphs = [g for g in (call.module.forward, call.module.backward_input, call.module.backward_weight) if g]
    nodes = [n for g in graphs for n in g.graph.nodes if str(n.target) in MATMULS]
    return sum(2.0 * n.meta["val"].numel() * n.args[-2].meta["val"].shape[-1] for n in nodes)


def stored_elements(program: Program, rank: int) -> int:
    total = 0
    for slot in program.ranks[rank].params.values():
        total += math.prod(n if held is None else len(held) for n, held in zip(slot.tensor.shape, slot.positions(), strict=True))
    return total


QUICK = [(family, {"tp": 2}) for family in DENSE] + [(family, {"dp": 2, "tp": 2}) for family in ("gpt2", "llama", "bert", "gemma2", "t5")]
EVERY = [(family, mesh) for family in (*DENSE, *SLOW) for mesh in ({"tp": 2}, {"tp": 4}, {"dp": 2, "tp": 2})]
TRIALS = [*QUICK, *(pytest.param(*trial, marks=pytest.mark.slow) for trial in EVERY if trial not in QUICK)]


@pytest.mark.parametrize(("family", "mesh"), TRIALS, ids=str)
def test_each_rank_holds_and_computes_its_part(family: str, mesh: dict[str, int]) -> None:
    """Rank 0, which holds the most where a dim doesn't divide."""
    captured = captured_of(family)
    ranks = math.prod(mesh.values())
    whole = compile(captured, search(captured.graph, Cluster.load("h100x1"), {"dp": 1}, 1))
    program = compile(captured, search(captured.graph, Cluster.load(f"h100x{ranks}"), mesh, 1), ranks=[0])
    flops = sum(map(matmul_flops, whole.ranks[0].blocks))
    assert stored_elements(program, 0) <= stored_elements(whole, 0) * (1 / ranks + 0.05)
    assert sum(map(matmul_flops, program.ranks[0].blocks)) <= flops * (1 / ranks + 0.10)


def collectives(call: Call) -> list[Counter[str]]:
    graphs = [g for g in (call.module.forward, call.module.backward_input, call.module.backward_weight) if g]
    return [
        Counter(n for n in (str(n.target).split(".")[1] for n in g.graph.nodes if "_c10d" in str(n.target)) if n != "wait_tensor")
        for g in graphs
    ]


def test_a_llama_block_talks_as_megatron_does() -> None:
    """With the residual stream pinned to sequence shards, each half of a layer gathers and reduce-scatters once forward and
    once backward (Korthikanti et al., "Reducing activation recomputation", 2022, figure 5)."""
    captured = captured_of("llama")
    graph = captured.graph
    pins = {}
    for op in graph.ops:
        shape = graph.values[op.outs[0]].tensor.shape
        if graph.values[op.outs[0]].grad and shape[:2] == (8, 12) and shape[2:] in ((32,), (1,)) and "linear" not in op.target:
            ins = ["S(1)" if len(graph.values[n].tensor.shape) == 3 else "R" for n in op.inputs]
            if len(graph.values[op.inputs[0]].tensor.shape) <= 3 and op.target != "aten.embedding.default":
                pins[op.name] = f"{', '.join(ins)} -> S(1)"
    plan = search(graph, Cluster.load("h100x2"), {"tp": 2}, 1, pins={"ops": pins})
    blocks = compile(captured, plan, ranks=[0]).ranks[0].blocks
    once = Counter({"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1})
    middle = blocks[1:-1]
    assert len(middle) == 4
    for block in middle[1:]:
        forward, backward, weights = collectives(block)
        assert forward == once
        assert backward == once
        assert not weights
