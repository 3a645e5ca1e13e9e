"""LayerNorm over the last dim, alone or of a sum that is kept.

forward:   c = x - mean(x),  r = 1 / sqrt(mean(c²) + eps),   y = c · r · (offset + w) + b
backward:  g = dy · (offset + w),  x̂ = c · r:   dx = r · (g - mean(g) - x̂ · mean(g · x̂)),   dw = Σ_rows dy · x̂,   db = Σ_rows dy

`add_layer_norm` normalises total = x + residual and returns both; what comes back for total is added to dx, which is the
residual's gradient too. `offset`: 1 where a model multiplies by 1 + w. `cast_first`: c · r is cast to x's dtype before the product,
which then has the promoted dtype of x, w and b; else y is made wide and cast to x's dtype, as torch's layer_norm does.

Tolerance: sums are float32 (float64 for float64), so that y differs from exact by one rounding of its dtype
(two with cast_first) plus ~n·2⁻²⁴ at worst. The mean is taken off before squaring, so that a large common offset costs only the digits
that x itself lacks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend, norm
from .norm import How


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False) -> Tensor:
    return norm.reference(x, weight, bias, How(eps, offset, cast_first, True))


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm.reference(total, weight, bias, How(eps, offset, cast_first, True)), total


@torch.library.custom_op("autoshard::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False) -> Tensor:
    return norm.forward(x, None, weight, bias, How(eps, offset, cast_first, True))[0]


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False) -> Tensor:
    return x.new_empty(x.shape, dtype=norm.result_dtype(x, weight, bias, How(eps, offset, cast_first, True)))


@torch.library.custom_op("autoshard::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False
) -> tuple[Tensor, Tensor]:
    return norm.forward(x, residual, weight, bias, How(eps, offset, cast_first, True))


@add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False
) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x + residual, memory_format=torch.contiguous_format)
    return total.new_empty(total.shape, dtype=norm.result_dtype(total, weight, bias, How(eps, offset, cast_first, True))), total


@torch.library.custom_op("autoshard::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, offset: float, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and dw and db as wide as they were summed (empty unless `need`ed)."""
    return norm.backward(grad, grad_total, x, weight, need[0], need[1], How(eps, offset, False, True))


@layer_norm_backward.register_fake
def _(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, offset: float, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    n, wide = x.shape[-1], backend.work(x.dtype)
    return x.new_empty(x.shape), x.new_empty(n if need[0] else 0, dtype=wide), x.new_empty(n if need[1] else 0, dtype=wide)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps, ctx.offset, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad, None, list(ctx.needs_input_grad[1:3])), None, None, None


def _add_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, ctx.eps, ctx.offset, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.kinds = x.dtype, residual.dtype, x.shape, residual.shape
    ctx.save_for_backward(output[1], weight)


def _add_grad(ctx: Any, grad: Tensor, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dw, db = _gradients(ctx, grad, grad_total, list(ctx.needs_input_grad[2:4]))
    assert dx is not None
    x_dtype, residual_dtype, x_shape, residual_shape = ctx.kinds
    return dx.sum_to_size(x_shape).to(x_dtype), dx.sum_to_size(residual_shape).to(residual_dtype), dw, db, None, None, None


def _gradients(ctx: Any, grad: Tensor, grad_total: Tensor | None, need: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    dx, dw, db = torch.ops.autoshard.layer_norm_backward(grad, grad_total, x, weight, ctx.eps, ctx.offset, need)
    return dx, dw.to(weight.dtype) if need[0] else None, db.to(ctx.bias_dtype) if need[1] else None


layer_norm.register_autograd(_grad, setup_context=_context)
add_layer_norm.register_autograd(_add_grad, setup_context=_add_context)


def applies(x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any, capability: backend.Capability = None) -> bool:
    return norm.applies(x, weight, bias)


def add_applies(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any, capability: backend.Capability = None
) -> bool:
    return norm.applies(x, weight, bias) and residual.dtype == x.dtype and residual.shape == x.shape


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    return norm.cost(shapes[0], itemsize, streams=5)


def add_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    return norm.cost(shapes[0], itemsize, streams=8)
