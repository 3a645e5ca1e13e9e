"""The k largest of few, as comparisons: what torch's topk finds, and its gradient."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autoshard.lower import compile
from autoshard.lower.topk import MOST, largest
from autoshard.plan.search import search
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture
from tests.differential.compare import compare
from tests.differential.reference import FLOAT64, Plain, follow


def test_values_and_places() -> None:
    for shape, k in (((50, 8), 3), ((2, 3, 1), 1), ((7, MOST), MOST), ((5,), 0), ((0, 4), 2)):
        for dtype in (torch.float64, torch.bfloat16):
            x = torch.stack([torch.randperm(shape[-1]) for _ in range(x_rows(shape))] or [torch.zeros(shape[-1])])[: x_rows(shape)]
            x = x.reshape(shape).to(dtype)
            values, index = largest(x, k)
            expected = x.topk(k, -1)
            assert torch.equal(values, expected.values) and torch.equal(index, expected.indices)


def x_rows(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape[:-1]).numel())


def test_ties_infinities_and_no_numbers() -> None:
    inf, nan = float("inf"), float("nan")
    values, index = largest(torch.tensor([[1.0, 2.0, 2.0, -inf], [-inf, -inf, 3.0, -inf], [inf, 0.0, inf, 1.0]]), 3)
    assert index.tolist() == [[1, 2, 0], [2, 0, 1], [0, 2, 3]] and values.tolist() == [[2, 2, 1], [3, -inf, -inf], [inf, inf, 1]]
    values, index = largest(torch.tensor([[nan, nan, nan, 1.0]]), 2)
    assert values[0, 0].isnan() and 0 <= index.min() and index.max() < 4


class Routers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Linear(6, 8), nn.Linear(6, MOST + 1)

    def forward(self, x: Tensor) -> Tensor:
        few, place = self.few(x).softmax(-1).topk(3)
        return (few * (place + 1)).square().sum() + self.many(x).topk(2, -1).values.square().sum() + self.few(x).topk(2, 0).values.sum()


def test_in_a_program() -> None:
    torch.manual_seed(0)
    model, kwargs = Routers().double(), {"x": torch.randn(5, 6, dtype=torch.float64)}
    captured = capture(model, kwargs=kwargs)
    program = compile(captured, search(captured.graph, mesh={"dp": 1}, microbatches=1))
    assert program.source(0).count("aten.topk(") == 2  # of many, and of another dim
    expected = follow(Plain(copy.deepcopy(model), None), kwargs, FLOAT64)
    worst = compare(expected, follow(InProcess(program, copy.deepcopy(model)), kwargs, FLOAT64), FLOAT64)[0]
    assert worst.ratio <= 1, worst
