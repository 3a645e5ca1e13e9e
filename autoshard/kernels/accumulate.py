"""A product added to a sum that is kept wide: the weights' gradients of several microbatches in float32, without the product in memory.

into ← into + a · b

bf16 and fp16 on CUDA go through cuBLAS with a float32 result, which reads and writes the sum in the matmul's epilogue: 8 bytes an
element instead of 12 for a product that is written, read and added. Equal dtypes are one addmm. Else the operands are widened: slower,
and the same.

Tolerance: sums of k products in float32 (float64 for float64), added without a rounding to the operands' dtype between.
"""

# shapes: into [m n], a [m k], b [k n]

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backend


@torch.no_grad()
def reference(into: Tensor, a: Tensor, b: Tensor) -> None:
    into.add_(a.to(into.dtype) @ b.to(into.dtype))


@torch.library.custom_op("autoshard::matmul_into", mutates_args=("into",))
def matmul_into(into: Tensor, a: Tensor, b: Tensor) -> None:
    if into.dtype == a.dtype:
        into.addmm_(a, b)
    elif applies(into, a, b) and a.device.type == "cuda":
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
    else:
        reference(into, a, b)


@matmul_into.register_fake
def _(into: Tensor, a: Tensor, b: Tensor) -> None:
    return None


def applies(into: Tensor, a: Tensor, b: Tensor, capability: backend.Capability = None) -> bool:
    return a.dtype == b.dtype and (into.dtype == a.dtype or (into.dtype == torch.float32 and a.dtype in backend.HALF))


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """One matmul; its operands read, the float32 sum read and written."""
    (m, n), (_, k) = shapes[0], shapes[1]
    return 2.0 * m * n * k, itemsize * k * (m + n) + 8.0 * math.prod(shapes[0])
