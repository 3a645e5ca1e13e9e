"""RMSNorm over the last dim, alone or of a sum that is kept.

forward:   r = 1 / sqrt(mean(x²) + eps),   y = x · r · (offset + w)
backward:  g = dy · (offset + w),  x̂ = x · r:   dx = r · (g - x̂ · mean(g · x̂)),   dw = Σ_rows dy · x̂

`add_rms_norm` normalises total = x + residual and returns both; what comes back for total is added to dx, which is the
residual's gradient too. `offset`: 1 where a model multiplies by 1 + w. `cast_first`: x · r is cast to x's dtype before the product,
which then has the promoted dtype of x and w; else the product is made wide and cast to x's dtype.

Tolerance: sums are float32 (float64 for float64), so that y differs from exact by one rounding of its dtype
(two with cast_first) plus ~n·2⁻²⁴ at worst.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend, norm
from .norm import How


def reference(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False) -> Tensor:
    return norm.reference(x, weight, None, How(eps, offset, cast_first))


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm.reference(total, weight, None, How(eps, offset, cast_first)), total


@torch.library.custom_op("autoshard::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False) -> Tensor:
    return norm.forward(x, None, weight, None, How(eps, offset, cast_first))[0]


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False) -> Tensor:
    return x.new_empty(x.shape, dtype=norm.result_dtype(x, weight, None, How(eps, offset, cast_first)))


@torch.library.custom_op("autoshard::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False
) -> tuple[Tensor, Tensor]:
    return norm.forward(x, residual, weight, None, How(eps, offset, cast_first))


@add_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False
) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x + residual, memory_format=torch.contiguous_format)
    return total.new_empty(total.shape, dtype=norm.result_dtype(total, weight, None, How(eps, offset, cast_first))), total


@torch.library.custom_op("autoshard::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, offset: float, need: bool
) -> tuple[Tensor, Tensor]:
    """dx, and dw as wide as it was summed (empty unless `need`ed)."""
    return norm.backward(grad, grad_total, x, weight, need, False, How(eps, offset))[:2]


@rms_norm_backward.register_fake
def _(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, offset: float, need: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need else 0, dtype=backend.work(x.dtype))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.numbers = inputs
    ctx.save_for_backward(x, weight)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad, None, ctx.needs_input_grad[1]), None, None, None


def _add_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, *ctx.numbers = inputs
    ctx.kinds = x.dtype, residual.dtype, x.shape, residual.shape
    ctx.save_for_backward(output[1], weight)


def _add_grad(ctx: Any, grad: Tensor, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dw = _gradients(ctx, grad, grad_total, ctx.needs_input_grad[2])
    assert dx is not None
    x_dtype, residual_dtype, x_shape, residual_shape = ctx.kinds
    return dx.sum_to_size(x_shape).to(x_dtype), dx.sum_to_size(residual_shape).to(residual_dtype), dw, None, None, None


def _gradients(ctx: Any, grad: Tensor, grad_total: Tensor | None, need: bool) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    eps, offset, _ = ctx.numbers
    dx, dw = torch.ops.autoshard.rms_norm_backward(grad, grad_total, x, weight, eps, offset, need)
    return dx, dw.to(weight.dtype) if need else None


rms_norm.register_autograd(_grad, setup_context=_context)
add_rms_norm.register_autograd(_add_grad, setup_context=_add_context)


def applies(x: Tensor, weight: Tensor | None, *_: Any, capability: backend.Capability = None) -> bool:
    return norm.applies(x, weight)


def add_applies(x: Tensor, residual: Tensor, weight: Tensor | None, *_: Any, capability: backend.Capability = None) -> bool:
    return norm.applies(x, weight) and residual.dtype == x.dtype and residual.shape == x.shape


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    return norm.cost(shapes[0], itemsize, streams=5)


def add_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    return norm.cost(shapes[0], itemsize, streams=8)
