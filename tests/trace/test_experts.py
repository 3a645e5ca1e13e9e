"""Products with a matrix that each row chooses: every spelling becomes one op, and computes what it did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoshard.trace.capture import Captured, capture

from .agree import assert_agrees, run_captured


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


class Sorted(nn.Module):
    """Rows sorted by expert, multiplied group by group and brought back: as Hugging Face's grouped experts, and in other ways."""

    def __init__(self, back: str) -> None:
        super().__init__()
        self.back = back
        self.router = nn.Linear(8, 4)
        self.into, self.out = nn.Parameter(torch.randn(4, 32, 8) * 0.3), nn.Parameter(torch.randn(4, 16, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        weights, choice = self.router(x).softmax(-1).topk(2)
        index, order = torch.sort(choice.reshape(-1))
        counts = torch.histc(index.float(), bins=4, min=0, max=3)
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = x[order // 2]
        gate, up = torch._grouped_mm(rows, self.into.transpose(1, 2), offs=ends).chunk(2, -1)
        y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.out, offs=ends)
        if self.back == "rows mixed":
            y = y.cumsum(0)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        if self.back == "added":
            return torch.zeros_like(x).index_add(0, order // 2, y).square().sum()
        if self.back == "written":
            y = torch.zeros_like(y).index_put((order,), y)
        elif self.back == "sorted again":
            y = y[torch.argsort(order)]
        else:
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(len(order))
            y = y[inverse]
        return y.view(-1, 2, 8).sum(1).square().sum()


def agrees_in_bfloat16(model: nn.Module, kwargs: dict[str, Tensor]) -> Captured:
    """Grouped products take no wider dtype. Both sides round alike but where rows are summed."""
    model = model.bfloat16()
    captured = capture(model, kwargs=kwargs)
    found, grads, _ = run_captured(captured, model, captured.flatten((), kwargs))
    expected = model(**kwargs)
    expected.backward()
    assert torch.allclose(found.float(), expected.detach().float(), rtol=2e-2)
    for path, p in model.named_parameters():
        assert p.grad is not None and (grads[path] - p.grad).float().norm() <= 3e-2 * p.grad.float().norm(), path
    return captured


@pytest.mark.parametrize("back", ["counted", "sorted again", "added", "written", "rows mixed"])
def test_sorts_around_grouped_products_are_undone(back: str) -> None:
    torch.manual_seed(0)
    captured = agrees_in_bfloat16(Sorted(back), {"x": torch.randn(24, 8, dtype=torch.bfloat16)})
    names = [op.target.split(".")[1] for op in captured.graph.ops]
    assert names.count("experts") == 2 and "_grouped_mm" not in names
    kept = back == "rows mixed"  # then the order matters
    assert ("sort" in names) == ("index" in names) == kept and "histc" not in names


def test_groups_that_no_sorted_index_counts_stay() -> None:
    class Groups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.w, offs=ends).square().sum()

    kwargs = {"x": torch.randn(16, 8, dtype=torch.bfloat16), "ends": torch.tensor([8, 16], dtype=torch.int32)}
    captured = agrees_in_bfloat16(Groups(), kwargs)
    assert [op.target for op in captured.graph.ops if "grouped" in op.target]


def test_hugging_faces_grouped_experts_are_its_batched_ones() -> None:
    from collections import Counter

    from tests import zoo

    found = []
    for spelling in ("batched_mm", "grouped_mm"):
        model, kwargs = zoo.case("mixtral").build()
        model = model.bfloat16()
        model.config._experts_implementation = spelling
        graph = capture(model, kwargs=kwargs).graph
        found.append(Counter(op.target for op in graph.ops if op.target != "aten.reshape.default"))
    assert found[0] == found[1] and found[0]["autoshard.experts.default"] > 0
