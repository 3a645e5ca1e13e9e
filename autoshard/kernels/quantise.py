"""fp8: casts with one scale a tensor, and a linear layer on torch._scaled_mm.

fp8_cast       q = round(clamp(x · scale)) in e4m3 or e5m2 with a scale that is known, and qᵀ from the same reading: what a program's fp8
               linears use, whose amax (`largest`, plain torch) a compiler fuses into whatever makes x
quantise       q = round(clamp(x · scale)) in e4m3 (for values) or e5m2 (for gradients), and its transpose from the same reading, which
the other
               matmuls of a linear layer need: fp8 matmuls take both operands along the summed dim.
               Without `scale` it is made of this tensor's amax (two readings); with one (delayed scaling, `delayed_scale` of earlier
               amaxes) one reading does. Returns 1 / scale, which a matmul multiplies by, and this tensor's amax, for the history.
scaled_matmul  a bᵀ · (a's 1 / scale) · (b's 1 / scale): torch._scaled_mm from Ada on, elsewhere the same numbers multiplied in float32
               (float64 for float64); also as an operator, fp8_matmul
fp8_linear     y = x Wᵀ, dx = dy W, dW = dyᵀ x, each of fp8 operands: x and W in e4m3, dy in e5m2, scaled by their amax. Between forward and
               backward it keeps the transposes in fp8, half of what bf16 takes.

Tolerance: a cast keeps 4 (e4m3) or 3 (e5m2) significant bits: |q / scale - x| ≤ 2⁻⁴ |x| or 2⁻³ |x|, and below the smallest normal number
an absolute 2⁻¹⁰ or 2⁻¹⁷ / scale. A product of such values of random sign errs by 2⁻⁴ of its typical size, whatever its length. The
reference makes the same casts, so that the operator agrees with it to float32's or the result's rounding.
"""

# shapes: x [r c], q [r c], transposed [c r] (or empty); scale, inverse, amax []

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from . import backend, cuda

KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
PREFER_CUDA = True  # to Triton, where it applies
ROWS, COLS = 64, 128  # of a Triton program's tile
WARPS = 4
WIDE = 128  # side of a tile of fp8_cast: a row of the transpose fills a cache line


def _dtype(kind: str) -> torch.dtype:
    if kind not in KINDS:
        raise ValueError(f"quantise: found the kind {kind!r}; expected one of {', '.join(KINDS)}")
    return KINDS[kind]


def _scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest magnitude becomes the largest number; 1 where that means nothing."""
    scale = torch.finfo(dtype).max / amax
    return torch.where((amax > 0) & scale.isfinite(), scale, torch.ones_like(scale))


def largest(x: Tensor) -> Tensor:
    """amax of a matrix, in float32. By rows first: a reduction over rows fuses with the norm or the product that makes x, one over all
    doesn't."""
    return x.abs().amax(-1).amax().float()


def scale_of(amax: Tensor, kind: str) -> Tensor:
    """The scale under which the largest magnitude becomes the format's largest number."""
    return _scale(amax, _dtype(kind))


def delayed_scale(history: Tensor, kind: str, margin: int = 0) -> Tensor:
    """For the next tensor, from the amaxes of earlier ones [n]; 2^margin of room above them."""
    return _scale(history.max().float(), _dtype(kind)) * 2.0**-margin


def reference(x: Tensor, scale: Tensor | None, kind: str, transpose: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _dtype(kind)
    amax = x.float().abs().amax() if x.numel() else torch.zeros((), device=x.device)
    used = _scale(amax, dtype) if scale is None else scale.float()
    top = torch.finfo(dtype).max
    q = (x.float() * used).clamp(-top, top).to(dtype)
    return q, q.t().clone(memory_format=torch.contiguous_format) if transpose else q.new_empty(0), 1 / used, amax


@torch.library.custom_op("autoshard::quantise", mutates_args=())
def quantise(x: Tensor, scale: Tensor | None, kind: str, transpose: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _quantise(x, scale, kind, transpose)


def _quantise(x: Tensor, scale: Tensor | None, kind: str, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _dtype(kind)
    if x.dim() != 2:
        raise ValueError(f"quantise: found {x.dim()} dims; expected a matrix")
    if not (backend.fused(x) and applies(x, scale, kind, transpose, capability=backend.capability(x))):
        return reference(x, scale, kind, transpose)
    if _cuda_applies(x):
        return _cast(x, scale, kind, transpose)
    from .device import quantise as device

    (r, c), rows = x.shape, backend.rows(x)
    grid = backend.blocks(r, ROWS), backend.blocks(c, COLS)
    partial = x.new_empty(grid, dtype=torch.float32)
    delayed = scale is not None
    if scale is None:
        device.largest[grid](rows, partial, r, c, rows.stride(0), ROWS=ROWS, COLS=COLS, num_warps=WARPS)
        amax = partial.amax()
        used = _scale(amax, dtype)
    else:
        used = scale.float()
    q = x.new_empty((r, c), dtype=dtype)
    turned = x.new_empty((c, r) if transpose else 0, dtype=dtype)
    device.cast[grid](
        rows, used, q, turned if transpose else None, partial if delayed else None, r, c, rows.stride(0), torch.finfo(dtype).max,
        BITS=3 if kind == "e4m3" else 2, LOWEST=-6 if kind == "e4m3" else -14, BY_HAND=x.device.type == "cpu", ROWS=ROWS, COLS=COLS,
        num_warps=WARPS,
    )  # fmt: skip
    return q, turned, 1 / used, partial.amax() if delayed else amax


def _cuda_applies(x: Tensor) -> bool:
    """`cuda/cast.cu`: rows and columns in eights, 16 bytes at a time. Triton writes the transpose in short runs, and the scale costs it
    five small kernels: it came to 0.62 of the bytes' ceiling."""
    r, c = x.shape
    aligned = r % 8 == 0 and c % 8 == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return PREFER_CUDA and aligned and x.dtype == torch.bfloat16 and r < 1 << 31 and cuda.available(x)


def _cast(x: Tensor, scale: Tensor | None, kind: str, transpose: bool, look: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`look`: with a scale, whether this tensor's amax is wanted too."""
    (r, c), dtype = x.shape, _dtype(kind)
    amax, inverse = x.new_zeros((), dtype=torch.float32), x.new_empty((), dtype=torch.float32)
    q, turned = x.new_empty((r, c), dtype=dtype), x.new_empty((c, r) if transpose else 0, dtype=dtype)
    pitch = ctypes.c_longlong(x.stride(0) // 8)
    if scale is None:
        blocks = min(backend.blocks(r * c // 8, 512), 4 * backend.multiprocessors(x))
        cuda.function("cast.cu", "largest", x.device)((blocks, 1, 1), 512, x, amax, ctypes.c_longlong(r), c // 8, pitch)
    given, seen = (None, None) if scale is None else (scale.float(), amax if look else None)
    grid = (backend.blocks(c, 128), backend.blocks(r, 128), 1)
    cast = cuda.function("cast.cu", f"cast_{kind}", x.device)
    cast(grid, 256, x, given, amax, q, turned if transpose else None, inverse, seen, r, c, pitch)
    return q, turned, inverse, amax


@quantise.register_fake
def _(x: Tensor, scale: Tensor | None, kind: str, transpose: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r, c = x.shape
    dtype = _dtype(kind)
    one = x.new_empty((), dtype=torch.float32)
    return x.new_empty((r, c), dtype=dtype), x.new_empty((c, r) if transpose else 0, dtype=dtype), one, torch.empty_like(one)


@torch.library.custom_op("autoshard::fp8_cast", mutates_args=())
def fp8_cast(x: Tensor, scale: Tensor, kind: str, transpose: bool) -> tuple[Tensor, Tensor]:
    """q [r c], and qᵀ [c r] (empty unless `transpose`)."""
    dtype = _dtype(kind)
    if x.dim() != 2:
        raise ValueError(f"fp8_cast: found {x.dim()} dims; expected a matrix")
    if not (backend.fused(x) and applies(x, scale, kind, transpose, capability=backend.capability(x))):
        return cast_reference(x, scale, kind, transpose)
    if _cuda_applies(x):
        return _cast(x, scale, kind, transpose, look=False)[:2]
    from .device import quantise as device

    (r, c), rows = x.shape, backend.rows(x)
    q = x.new_empty((r, c), dtype=dtype)
    turned = x.new_empty((c, r) if transpose else 0, dtype=dtype)
    device.cast[backend.blocks(r, WIDE), backend.blocks(c, WIDE)](
        rows, scale.float(), q, turned if transpose else None, None, r, c, rows.stride(0), torch.finfo(dtype).max,
        BITS=3 if kind == "e4m3" else 2, LOWEST=-6 if kind == "e4m3" else -14, BY_HAND=x.device.type == "cpu", ROWS=WIDE, COLS=WIDE,
        CLAMP=x.device.type == "cpu", num_warps=2 * WARPS,  # a GPU's cast saturates by itself
    )  # fmt: skip
    return q, turned


@fp8_cast.register_fake
def _(x: Tensor, scale: Tensor, kind: str, transpose: bool) -> tuple[Tensor, Tensor]:
    (r, c), dtype = x.shape, _dtype(kind)
    return x.new_empty((r, c), dtype=dtype), x.new_empty((c, r) if transpose else 0, dtype=dtype)


# ---- the matmul


def scaled_matmul(a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a [m k] · b [n k]ᵀ. `fast`: Hopper may add up with fewer bits, which is for forward alone."""
    if _scaled_mm_applies(a, b):
        return torch._scaled_mm(a, b.t(), scale_a=a_inverse, scale_b=b_inverse, out_dtype=dtype, use_fast_accum=fast)
    work = backend.work(dtype)
    return ((a.to(work) @ b.to(work).t()) * (a_inverse * b_inverse)).to(dtype)


@torch.library.custom_op("autoshard::fp8_matmul", mutates_args=())
def fp8_matmul(a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    return scaled_matmul(a, b, a_inverse, b_inverse, dtype, fast)


@fp8_matmul.register_fake
def _(a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def _scaled_mm_applies(a: Tensor, b: Tensor) -> bool:
    return (
        a.device.type == "cuda"
        and (backend.capability(a) or (0, 0)) >= (8, 9)
        and not (a.dtype == b.dtype == torch.float8_e5m2)
        and all(n % 16 == 0 and n > 0 for n in (*a.shape, *b.shape))
    )


# ---- the linear layer


class _Cast(torch.autograd.Function):
    """What an operand is after its cast, and (`gradient`) what its gradient is: the identity otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: bool) -> Tensor:
        ctx.gradient = gradient
        return x.clone() if gradient else _there_and_back(x, "e4m3")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _there_and_back(grad, "e5m2") if ctx.gradient else grad, None


def _there_and_back(x: Tensor, kind: str) -> Tensor:
    q, _, inverse, _ = reference(x, None, kind)
    return (q.float() * inverse).to(x.dtype)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """In x's dtype, of operands that were cast."""
    x8, w8 = (_Cast.apply(t, False) for t in (x, weight))
    return _Cast.apply(x8 @ w8.t(), True)


@torch.library.custom_op("autoshard::fp8_linear", mutates_args=())
def fp8_linear(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [r n], and for the backward xᵀ and Wᵀ in fp8, with their 1 / scale."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"fp8_linear: x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}; expected [r, k], [n, k], one dtype"
        )
    x8, xt, x_inverse, _ = _quantise(x, None, "e4m3", True)
    w8, wt, w_inverse, _ = _quantise(weight, None, "e4m3", True)
    return scaled_matmul(x8, w8, x_inverse, w_inverse, x.dtype, fast=True), xt, wt, x_inverse, w_inverse


@fp8_linear.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (r, k), n, e4m3 = x.shape, weight.shape[0], torch.float8_e4m3fn
    one = x.new_empty((), dtype=torch.float32)
    return x.new_empty((r, n)), x.new_empty((k, r), dtype=e4m3), x.new_empty((k, n), dtype=e4m3), one, torch.empty_like(one)


@torch.library.custom_op("autoshard::fp8_linear_backward", mutates_args=())
def fp8_linear_backward(
    grad: Tensor, xt: Tensor, wt: Tensor, x_inverse: Tensor, w_inverse: Tensor, need: list[bool]
) -> tuple[Tensor, Tensor]:
    """dx and dW, empty unless `need`ed."""
    g8, gt, inverse, _ = _quantise(grad, None, "e5m2", need[1])
    dx = scaled_matmul(g8, wt, inverse, w_inverse, grad.dtype) if need[0] else grad.new_empty(0)
    dw = scaled_matmul(gt, xt, inverse, x_inverse, grad.dtype) if need[1] else grad.new_empty(0)
    return dx, dw


@fp8_linear_backward.register_fake
def _(grad: Tensor, xt: Tensor, wt: Tensor, x_inverse: Tensor, w_inverse: Tensor, need: list[bool]) -> tuple[Tensor, Tensor]:
    (r, n), k = grad.shape, xt.shape[0]
    return grad.new_empty((r, k) if need[0] else 0), grad.new_empty((n, k) if need[1] else 0)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad)
    found = torch.ops.autoshard.fp8_linear_backward(grad, *ctx.saved_tensors, need)
    return tuple(f if n else None for f, n in zip(found, need, strict=True))


fp8_linear.register_autograd(_grad, setup_context=_context)


def applies(x: Tensor, scale: Tensor | None, kind: str, transpose: bool = False, capability: backend.Capability = None) -> bool:
    return (capability is None or capability >= (8, 9)) and x.dtype in (torch.float32, *backend.HALF) and x.numel() > 0 and x.dim() == 2


def cast_reference(x: Tensor, scale: Tensor, kind: str, transpose: bool) -> tuple[Tensor, Tensor]:
    return reference(x, scale, kind, transpose)[:2]


def linear_applies(x: Tensor, weight: Tensor, capability: backend.Capability = None) -> bool:
    """Where fp8 is a gain: Ada and later, and sizes that its matmul takes."""
    return applies(x, None, "e4m3", capability=capability) and all(n % 16 == 0 and n > 0 for n in (*x.shape, *weight.shape))


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Two readings, and two writings of a byte."""
    elements = math.prod(shapes[0])
    return 4.0 * elements, elements * (2.0 * itemsize + 2.0)


def cast_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """A reading, and two writings of a byte."""
    elements = math.prod(shapes[0])
    return 3.0 * elements, elements * (itemsize + 2.0)


def linear_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Three matmuls in fp8, whose FLOPs count half, being twice as quick; and the casts of x, W and dy."""
    (r, k), n = shapes[0], shapes[1][0]
    cast = sum(cost((a, b), itemsize=itemsize)[1] for a, b in ((r, k), (n, k), (r, n)))
    return 3.0 * r * n * k, cast + 2.0 * (r * k + n * k + r * n) + itemsize * (r * n + r * k + n * k)
