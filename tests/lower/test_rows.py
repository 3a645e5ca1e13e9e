"""Products with chosen matrices in sorted rows: one sort a layer, no more gathers than needed, and the plain model's numbers."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard.lower import compile
from autoshard.lower.program import Program
from autoshard.plan.search import random_plan, search
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import Captured, capture
from tests.differential.compare import compare
from tests.differential.reference import FLOAT64, Plain, follow

TOKENS, HIDDEN, INNER, EXPERTS, TOP = 12, 8, 6, 4, 2


class Mixture(nn.Module):
    """Gated experts as batched products, chosen by the input. `how`: what stands between and behind the products."""

    def __init__(self, how: str = "gated") -> None:
        super().__init__()
        self.how = how
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.into = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.3)
        self.bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER) * 0.3)
        self.scale = nn.Parameter(torch.rand(2 * INNER) + 0.5)
        self.out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        weight = self.router(x).softmax(-1).gather(-1, choice).reshape(-1, 1)
        index = choice.reshape(-1)
        rows = x.repeat_interleave(TOP, 0)
        wide = torch.bmm(self.into[index], rows.unsqueeze(-1)).squeeze(-1)
        if self.how == "biased":
            wide = wide * self.scale + self.bias[index]
        if self.how == "scaled inside":
            wide = wide * weight
        gate, up = wide.chunk(2, -1)
        inner = F.silu(gate) * up
        if self.how == "mixes rows":
            inner = inner.cumsum(0)
        y = torch.bmm(self.out[index], inner.unsqueeze(-1)).squeeze(-1) * weight
        if self.how == "read twice":
            y = y + inner.sum(-1, keepdim=True)
        return x + y.view(-1, TOP, HIDDEN).sum(1)


class Model(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixture(how) for _ in range(2))

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, choice)
        return x.square().mean()


def choices(kind: str) -> Tensor:
    if kind == "one":
        return torch.full((TOKENS, TOP), 2)
    return torch.rand(TOKENS, EXPERTS - (kind == "some empty"), generator=torch.Generator().manual_seed(3)).topk(TOP, -1).indices


def build(how: str, kind: str) -> tuple[nn.Module, dict[str, Tensor], Captured]:
    torch.manual_seed(0)
    model, kwargs = Model(how).double(), {"x": torch.randn(TOKENS, HIDDEN, dtype=torch.float64), "choice": choices(kind)}
    return model, kwargs, capture(model, kwargs=kwargs)


def agrees(model: nn.Module, kwargs: dict[str, Tensor], program: Program) -> None:
    expected = follow(Plain(copy.deepcopy(model), None), kwargs, FLOAT64)
    worst = compare(expected, follow(InProcess(program, copy.deepcopy(model)), kwargs, FLOAT64), FLOAT64)[0]
    assert worst.ratio <= 1, worst


def forwards(text: str, what: str) -> list[int]:
    """How often it stands in each forward that has grouped products."""
    parts = [part for part in re.split(r"^def ", text, flags=re.M) if "_forward" in part[:20] and "grouped_matmul" in part]
    return [len(re.findall(what, part)) for part in parts]


HOWS = ("gated", "biased", "scaled inside", "mixes rows", "read twice")


@pytest.mark.parametrize("how", HOWS)
def test_one_device(how: str) -> None:
    model, kwargs, captured = build(how, "all")
    program = compile(captured, search(captured.graph, mesh={"dp": 1}, microbatches=1))
    agrees(model, kwargs, program)
    text = program.source(0)
    layers = forwards(text, r"moe_order\(")
    products = forwards(text, r"= autoshard\.grouped_matmul\(")
    assert sum(products) == 2 * sum(layers) and "autoshard.experts" not in text
    # tokens into the order and rows back, a layer; where rows are mixed between the products, back and into it once more; a bias's index
    gathers = {"mixes rows": 4, "biased": 3, "scaled inside": 3, "read twice": 3}.get(how, 2)
    assert forwards(text, r"aten\.index_select\(") == [gathers * n for n in layers]
    assert how == "biased" or ("index_put" not in text and "index_add" not in text)


@pytest.mark.parametrize("kind", ["one", "some empty"])
def test_uneven_choices(kind: str) -> None:
    model, kwargs, captured = build("gated", kind)
    agrees(model, kwargs, compile(captured, search(captured.graph, mesh={"dp": 1}, microbatches=1)))


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"dp": 2}, {"dp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_meshes(mesh: dict[str, int], seed: int | None) -> None:
    model, kwargs, captured = build("biased", "all")
    chosen = search(captured.graph, mesh=mesh, microbatches=1) if seed is None else random_plan(captured.graph, mesh=mesh, seed=seed)
    agrees(model, kwargs, compile(captured, chosen))


def test_experts_of_other_ranks_are_left_out() -> None:
    model, kwargs, captured = build("gated", "all")
    products = [op for op in captured.graph.ops if op.target == "autoshard.experts.default"]
    kept = {op.name: "I" if captured.graph.values[op.inputs[0]].grad else "R" for op in products}
    pins = {"ops": {name: f"{x}, I, R -> I ; R, S(0), R -> P [experts]" for name, x in kept.items()}}
    plan = search(captured.graph, mesh={"tp": 2}, microbatches=1, pins=pins)
    program = compile(captured, plan)
    text = program.source(0)
    # the index counted from the shard's offset, sorted once
    assert sum(forwards(text, r"moe_order\(sub")) == sum(forwards(text, r"moe_order\(")) > 0
    agrees(model, kwargs, program)
