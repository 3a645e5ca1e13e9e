"""Products with a matrix that each row chooses: every spelling becomes one op, and computes what it did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .agree import assert_agrees


class Experts(nn.Module):
    """Two of five matrices for every row, gathered and multiplied one by one."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.router = nn.Linear(6, 5, dtype=torch.float64)
        shape = (5, 6, 4) if spelling == "rows" else (5, 4, 6)
        self.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        weights, choice = self.router(x).softmax(-1).topk(2)
        each = x.unsqueeze(1).expand(-1, 2, -1).reshape(-1, 6)
        index = choice.reshape(-1)
        if self.spelling == "from the end":
            index = index - 5
        if self.spelling == "rows":
            out = torch.bmm(each.unsqueeze(1), self.w[index]).squeeze(1)
        elif self.spelling == "swapped":
            out = torch.bmm(each.unsqueeze(1), self.w[index].transpose(1, 2)).squeeze(1)
        else:
            out = (self.w[index] @ each.unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1, 1)).square().sum()


@pytest.mark.parametrize("spelling", ["columns", "rows", "swapped", "from the end"])
def test_spellings(spelling: str) -> None:
    torch.manual_seed(0)
    captured = assert_agrees(Experts(spelling), kwargs={"x": torch.randn(7, 6, dtype=torch.float64)})
    names = [op.target.split(".")[1] for op in captured.graph.ops]
    assert names.count("experts") == 1 and "bmm" not in names
    assert not any(v.tensor.shape in ((14, 4, 6), (14, 6, 4)) for v in captured.graph.values.values())


def test_no_matrix_is_copied_and_gradients_are_right() -> None:
    from autoshard.trace.experts import experts

    x, w = torch.randn(9, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 0, 0, -1, 4, 1, 3, 0, 1])  # none chooses 2; two choose what isn't there
    torch.library.opcheck(torch.ops.autoshard.experts.default, (x, w, index))
    assert torch.autograd.gradcheck(lambda x, w: experts(x, w, index), (x, w))
