"""One matmul for each expert, of rows that lie together by expert; how many each has, only the device knows.

forward:   y[rows of e] = x[rows of e] · W_e
backward:  dx[rows of e] = dy[rows of e] · W_eᵀ,   dW_e = x[rows of e]ᵀ · dy[rows of e], 0 for an expert without rows

The rows of expert e end at `ends[e]` and begin where those before it end; rows behind the last end are nobody's: they give zeros, take no
time in the matmuls, and get no gradient. dW lies in memory as W does, so that experts stored as [e m k] get a dense gradient.

bf16 on Hopper goes through torch's own grouped matmul where sizes and strides allow it (`_torch_applies`), everything else through Triton,
whose programs read the ends themselves: as many are started as there could be tiles, and those that are too many stop at once.

Tolerance: sums of k (or rows) products in float32, one rounding of the dtype; as a matmul's.
"""

# shapes: x [n k], w [e k m] (any strides: experts stored as [e m k] are passed transposed), ends [e] int32; y [n m]

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend

PREFER_TORCH = True  # on Hopper, where it applies
CLEARED = (32, 128)  # rows and columns of those that are nobody's that a program writes at a time
LARGEST, DEPTH, STAGES = 128, 64, 3  # Triton's tiles: rows and columns at most, summed elements at a time, loads in flight


def reference(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    first, outs = 0, []
    for e, end in enumerate(ends.tolist()):
        outs.append(x[first:end] @ w[e])
        first = end
    return torch.cat([*outs, x.new_zeros((x.shape[0] - first, w.shape[2]))])


def _check(x: Tensor, w: Tensor, ends: Tensor) -> None:
    if x.dim() != 2 or w.dim() != 3 or w.shape[1] != x.shape[1] or ends.shape != w.shape[:1] or ends.dtype != torch.int32:
        raise ValueError(
            f"grouped_matmul: found x {tuple(x.shape)}, w {tuple(w.shape)}, ends {tuple(ends.shape)} {ends.dtype}; "
            "expected [n, k], [experts, k, m] and int32 [experts]"
        )


def _torch_applies(a: Tensor, b: Tensor) -> bool:
    """torch._grouped_mm: bf16 on Hopper; 16-byte rows."""

    def aligned(t: Tensor) -> bool:
        dense = [i for i in range(-2, 0) if t.stride(i) == 1]
        return bool(dense) and t.data_ptr() % 16 == 0 and all(s % 8 == 0 for i, s in enumerate(t.stride()) if i - t.dim() != dense[0])

    return (
        PREFER_TORCH
        and hasattr(torch, "_grouped_mm")
        and a.dtype == b.dtype == torch.bfloat16
        and (backend.capability(a) or (0, 0))[0] == 9
        and all(n % 8 == 0 for n in (*a.shape[-2:], *b.shape[-2:])[1:])
        and aligned(a)
        and aligned(b)
    )


def _tile(n: int) -> int:
    return max(16, min(LARGEST, backend.power(n)))


def _product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x [n k] · w[expert] [k m], without gradients."""
    (n, k), (e, _, m) = x.shape, w.shape
    if not (n and k and m and e):
        return x.new_zeros((n, m))
    if _torch_applies(x, w):
        return _cleared(torch._grouped_mm(x, w, offs=ends), ends)
    if not (backend.fused(x) and applies(x, w, ends)):
        return reference(x, w, ends)
    from .device import grouped_matmul as device

    out = x.new_empty((n, m))
    bm, bn, bk = _tile(max(1, n // e)), _tile(m), min(DEPTH, _tile(k))
    tiles = backend.blocks(n, bm) + e  # each expert may leave one tile part full
    device.forward[(backend.blocks(m, bn), tiles)](
        x, w, out, ends, k, m, e, *x.stride(), *w.stride(), BM=bm, BN=bn, BK=bk, EXPERTS=backend.power(e),
        ACC=backend.accumulator(x.dtype), WIDEN=x.device.type == "cpu", num_warps=8 if bm * bn > 8192 else 4, num_stages=STAGES,
    )  # fmt: skip
    return _cleared(out, ends)


def _cleared(out: Tensor, ends: Tensor) -> Tensor:
    """The same memory, with zeros in the rows that are nobody's."""
    if not backend.fused(out):
        out[int(ends[-1]) :] = 0
        return out
    from .device import grouped_matmul as device

    (n, m), (rows, columns) = out.shape, CLEARED
    device.clear[(backend.blocks(n, rows),)](out, ends, n, m, out.stride(0), ends.shape[0], ROWS=rows, BLOCK=columns, num_warps=4)
    return out


def _columns_first(w: Tensor) -> bool:
    """Whether the matrices lie in memory transposed."""
    return w.stride(1) < w.stride(2)


def _like(w: Tensor) -> Tensor:
    """Memory for W's gradient, in W's order of dims."""
    e, k, m = w.shape
    return w.new_empty((e, m, k)).transpose(1, 2) if _columns_first(w) else w.new_empty((e, k, m))


def _weights(x: Tensor, g: Tensor, ends: Tensor) -> Tensor:
    """x[rows of e]ᵀ · g[rows of e] -> [e k m]."""
    k, m, e = x.shape[1], g.shape[1], ends.shape[0]
    if not (x.shape[0] and k and m and e):
        return x.new_zeros((e, k, m))
    if _torch_applies(x.t(), g):
        return torch._grouped_mm(x.t(), g, offs=ends)
    if not (backend.fused(x) and x.dtype in backend.FLOATING):
        starts = [0, *ends.tolist()[:-1]]
        return torch.stack([x[a:b].t() @ g[a:b] for a, b in zip(starts, ends.tolist(), strict=True)])
    from .device import grouped_matmul as device

    dw = x.new_empty((e, k, m))
    bm, bn, bk = _tile(k), _tile(m), min(DEPTH, _tile(max(1, x.shape[0] // e)))
    device.weights[(backend.blocks(m, bn), backend.blocks(k, bm), e)](
        x, g, dw, ends, k, m, *x.stride(), *g.stride(), BM=bm, BN=bn, BK=bk, ACC=backend.accumulator(x.dtype),
        WIDEN=x.device.type == "cpu", num_warps=8 if bm * bn > 8192 else 4, num_stages=STAGES,
    )  # fmt: skip
    return dw


@torch.library.custom_op("autoshard::grouped_matmul", mutates_args=())
def grouped_matmul(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    _check(x, w, ends)
    return _product(x, w, ends)


@grouped_matmul.register_fake
def _(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    _check(x, w, ends)
    return x.new_empty((x.shape[0], w.shape[2]))


@torch.library.custom_op("autoshard::grouped_matmul_backward", mutates_args=())
def grouped_matmul_backward(grad: Tensor, x: Tensor, w: Tensor, ends: Tensor, need: list[bool]) -> tuple[Tensor, Tensor]:
    """dx and dW, empty unless `need`ed."""
    grad = grad.contiguous()  # what comes from a sum is expanded
    dx = _product(grad, w.transpose(1, 2), ends) if need[0] else x.new_empty(0)
    dw = w.new_empty(0)
    if need[1]:
        dw = _weights(grad, x, ends).transpose(1, 2) if _columns_first(w) else _weights(x, grad, ends)
    return dx, dw


@grouped_matmul_backward.register_fake
def _(grad: Tensor, x: Tensor, w: Tensor, ends: Tensor, need: list[bool]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need[0] else 0), _like(w) if need[1] else w.new_empty(0)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[:2])
    found = torch.ops.autoshard.grouped_matmul_backward(grad, *ctx.saved_tensors, need)
    return *(f if n else None for f, n in zip(found, need, strict=True)), None


grouped_matmul.register_autograd(_grad, setup_context=_context)


def applies(x: Tensor, w: Tensor, ends: Tensor, capability: backend.Capability = None) -> bool:
    return x.dtype == w.dtype and x.dtype in backend.FLOATING and ends.dtype == torch.int32 and x.numel() > 0 and w.shape[0] <= 1024


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Each row meets one expert's weights, in three matmuls; weights and their gradient pass once each time."""
    (n, k), (e, _, m) = shapes[0], shapes[1]
    return 6.0 * n * k * m, 3.0 * (n * k + n * m + e * k * m) * itemsize
