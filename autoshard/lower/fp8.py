"""fp8: a linear whose operands are cast to 8 bits, one scale a tensor, and its backward of such operands.

In: local tensors. y = x Wᵀ with x and W in e4m3; dx = dy W and dW = dyᵀ x with dy in e5m2. A matmul of fp8 takes both operands along the
dim that is summed, so each is needed as it is and transposed; both come from one reading. Between forward and backward only the transposes
are kept, a byte an element. x is cast where it is first used; a weight once a step, before the loop (`Routine`s "casts" of `build`), so
that many microbatches don't cast it again and don't keep copies of it.

A scale is 448 / amax (57344 / amax of a gradient) of the tensor itself. The amax is plain torch, by rows first: the compiler fuses that
into the norm, the product or the backward that makes the tensor. Then one kernel reads it and writes both casts.

On shards a rank scales its own: a matmul is local, and its result, summed over ranks or not, is what it was but for the casts' rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..trace.graph import Tensor as Spec


class Cast(NamedTuple):
    """Names of an operand's casts, or their tensors' specs: as it lies, transposed, 1 / scale."""

    plain: Any
    turned: Any
    inverse: Any


def names(env: str, transpose: bool) -> Cast:
    kind = "fp8+ᵀ" if transpose else "fp8"
    return Cast(f"{kind}:{env}", f"{kind} turned:{env}", f"{kind} 1/scale:{env}")


def specs(weight: Spec, transpose: bool) -> Cast:
    """Of a weight's casts."""
    n, k = weight.shape
    return Cast(Spec((n, k), "float8_e4m3fn"), Spec((k, n) if transpose else (0,), "float8_e4m3fn"), Spec((), "float32"))


def cast(x: Tensor, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [… k] in e4m3 as a matrix, its transpose (empty unless asked for), and 1 / scale."""
    x = x.detach()
    return _cast([x.reshape(-1, x.shape[-1])], "e4m3", transpose)


def _cast(parts: Sequence[Tensor], kind: str, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of matrices side by side. Each has its own amax taken, which is fused into what makes it; the compiler has them made in place."""
    from ..kernels.quantise import fp8_cast, largest, scale_of

    scale = scale_of(functools.reduce(torch.maximum, [largest(part) for part in parts]), kind)
    q, turned = fp8_cast(parts[0] if len(parts) == 1 else torch.cat(list(parts), -1), scale, kind, transpose)
    return q, turned, 1 / scale


class _Linear(torch.autograd.Function):
    """x and W stand for their gradients; the casts are what is computed with."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, x8: Tensor, xt: Tensor, x_inverse: Tensor, w8: Tensor, wt: Tensor, w_inverse: Tensor,
        rows: Sequence[int],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        from ..kernels.quantise import fp8_matmul

        ctx.save_for_backward(xt, x_inverse, wt, w_inverse)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        y = fp8_matmul(x8, w8, x_inverse, w_inverse, x.dtype, True)
        return tuple(y.reshape(*x.shape[:-1], -1).split(list(rows), -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ..kernels.quantise import fp8_matmul

        xt, x_inverse, wt, w_inverse = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        g8, gt, inverse = _cast([g.reshape(-1, g.shape[-1]) for g in grads], "e5m2", of_weight)
        dx = fp8_matmul(g8, wt, inverse, w_inverse, ctx.dtype, False).reshape(ctx.shape) if of_x else None
        dw = fp8_matmul(gt, xt, inverse, x_inverse, ctx.dtype, False) if of_weight else None
        return dx, dw, *(None,) * 7


def linears(x: Tensor, weight: Tensor, bias: Tensor | None, casts: Sequence[Tensor], rows: Sequence[int]) -> tuple[Tensor, ...]:
    """x Wᵀ (+ bias) of casts of x and of W; each part's columns of the result."""
    found: tuple[Tensor, ...] = _Linear.apply(x, weight, *casts, rows)
    return found if bias is None else (found[0] + bias,)
