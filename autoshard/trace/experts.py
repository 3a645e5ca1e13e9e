"""`experts`: a matrix product in which every row chooses its matrix, as one op.

    x [t k]   w [E n k]   index [t] → out [t n],   out[i] = w[index[i]] x[i]   (0 where index[i] lies outside [0, E))

Backward: dx[i] = w[index[i]]ᵀ dout[i], dw[e] = Σ over rows i of e of dout[i] x[i]ᵀ. Rows are sorted by their matrix, so
that each matrix is one product and none is ever copied for a row. It is a `torch.library` custom op with a registered fake and backward:
how many rows each matrix has depends on data, and stays inside.

>>> w = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
>>> experts(torch.tensor([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]), w, torch.tensor([1, 0, 5]))
tensor([[8.],
        [5.],
        [0.]])
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def experts(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    """out[i] = w[index[i]] x[i]; 0 where the index is outside."""
    return torch.ops.autoshard.experts(x, w, index)  # type: ignore[no-any-return]


@torch.library.custom_op("autoshard::experts", mutates_args=())
def experts_forward(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    out = x.new_zeros((x.shape[0], w.shape[1]))
    for e, rows in _rows(index, w.shape[0]):
        out.index_copy_(0, rows, x.index_select(0, rows) @ w[e].T)
    return out


@experts_forward.register_fake
def _(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


@torch.library.custom_op("autoshard::experts_backward", mutates_args=())
def experts_backward(grad: Tensor, x: Tensor, w: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of w)."""
    dx, dw = torch.zeros_like(x, memory_format=torch.contiguous_format), torch.zeros_like(w, memory_format=torch.contiguous_format)
    for e, rows in _rows(index, w.shape[0]):
        g = grad.index_select(0, rows)
        dx.index_copy_(0, rows, g @ w[e])
        dw[e] = g.T @ x.index_select(0, rows)
    return dx, dw


@experts_backward.register_fake
def _(grad: Tensor, x: Tensor, w: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


def _rows(index: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """(matrix, its rows) for every matrix that has some; rows keep their order."""
    inside = torch.where((index >= 0) & (index < count), index, count)
    order = torch.argsort(inside, stable=True)
    ends = torch.bincount(inside, minlength=count + 1).cumsum(0)[:count].tolist()
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start < end:
            yield e, order[start:end]


def _context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return *torch.ops.autoshard.experts_backward(grad, *ctx.saved_tensors), None


experts_forward.register_autograd(_gradients, setup_context=_context)
