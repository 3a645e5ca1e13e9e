"""The k largest of few: routers take the best of 8 or 64 experts for each token, for which a sort in memory is far too much.

In: a routine's steps. Out: those with `topk` over a short last dim as comparisons of each with each, which the compiler fuses: an element's
place is the number of those that are larger, or as large and earlier. The gradient is a comparison too, not a scatter. Ties go to the
first; where there is a NaN, so is the value, and the index stays inside.

>>> largest(torch.tensor([[1.0, 5.0, 3.0, 5.0]]), 3)
(tensor([[5., 5., 3.]]), tensor([[1, 3, 2]]))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..trace.graph import Op, Tensor
from .routine import Step

MOST = 64
"""Elements of the last dim, up to which each is compared with each."""


def compare_few(steps: list[Step], tensors: Mapping[str, Tensor]) -> list[Step]:
    """The steps with short `topk`s as comparisons."""
    return [_compared(step, tensors) for step in steps]


def _compared(step: Step, tensors: Mapping[str, Tensor]) -> Step:
    op = step.op
    if op is None or op.target != "aten.topk.default" or not _fits(op, tensors[step.ins[0]]):
        return step
    k = op.args[1]
    return replace(step, fn=lambda x: _Largest.apply(x, k), text=f"{k} largest of few")  # type: ignore[no-untyped-call]


def _fits(op: Op, x: Tensor) -> bool:
    dim = op.args[2] if len(op.args) > 2 else -1
    upwards = op.args[3] if len(op.args) > 3 else True
    return bool(x.shape) and dim in (-1, len(x.shape) - 1) and upwards and not op.kwargs and x.shape[-1] <= MOST and x.floating


def largest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices) of the k largest of the last dim, the largest first."""
    at = torch.arange(x.shape[-1], device=x.device)
    this, other = x.unsqueeze(-1), x.unsqueeze(-2)
    place = ((other > this) | ((other == this) & (at < at.unsqueeze(-1)))).sum(-1)
    chosen = place.unsqueeze(-2) == torch.arange(k, device=x.device).unsqueeze(-1)
    values = torch.where(chosen, x.unsqueeze(-2), 0).sum(-1)
    return values, torch.where(chosen, at, 0).sum(-1).clamp(max=max(0, x.shape[-1] - 1))


class _Largest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, index = largest(x, k)
        ctx.save_for_backward(index)
        ctx.mark_non_differentiable(index)
        ctx.count = x.shape[-1]
        return values, index

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
        (index,) = ctx.saved_tensors
        at = torch.arange(ctx.count, device=grad.device)
        return torch.where(index.unsqueeze(-1) == at, grad.unsqueeze(-1), 0).sum(-2), None
