"""Mixture of experts around the grouped matmul: routing, rows moved to their experts and back. Dropless, and nothing waits for the host.

route      s = softmax(x) or sigmoid(x);  experts = the k largest of s + bias;  w = s[experts] (/ Σ w) · factor
           dx by s = softmax: s (ds - Σ ds s), by sigmoid: ds s (1 - s);  ds = the gradient of w by s at the experts, 0 elsewhere
permute    moved[position[t, j]] = x[t]: slots (t, j) in a stable order by expert, whose rows end at `ends`
           dx[t] = Σ_j dmoved[position[t, j]]
unpermute  y[t] = Σ_j w[t, j] · moved[position[t, j]]
           dmoved[position[t, j]] = w[t, j] dy[t],   dw[t, j] = dy[t] · moved[position[t, j]]

`bias` moves the choice alone and gets no gradient (load balancing without a loss). Experts without tokens have no rows. Sums run in
the order of j, so that nothing depends on the order of threads. `mixture` puts all of it together.

Tolerance: float32 inside; one rounding of the dtype. Ties between experts go to the first, where torch's topk may take another.
"""

# shapes: logits [t e], bias [e], weights and experts [t k] (experts int64); x, y [t h]; moved [t·k h], position [t k] int32, ends [e] int32

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import backend, gated_mlp, grouped_matmul  # noqa: F401  (`mixture` calls their operators)

SLOTS = 128  # of a block of the sort
BLOCK = 1024  # elements of a row that a program moves at a time
WARPS = 4


# ---- routing


def route_reference(logits: Tensor, bias: Tensor | None, k: int, score: str, normalise: bool, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    s = _scores(logits, score)
    experts = (s if bias is None else s + bias).topk(k, -1).indices
    w = s.gather(-1, experts)
    return (w / (w.sum(-1, keepdim=True) + 1e-20) if normalise else w) * factor, experts


def _scores(logits: Tensor, score: str) -> Tensor:
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"moe_route: found the score {score!r}; expected softmax or sigmoid")
    wide = logits.to(backend.work(logits.dtype))
    return wide.softmax(-1) if score == "softmax" else wide.sigmoid()


def _rows_of(e: int) -> int:
    return max(1, 2048 // backend.power(e))


@torch.library.custom_op("autoshard::moe_route", mutates_args=())
def moe_route(logits: Tensor, bias: Tensor | None, k: int, score: str, normalise: bool, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    _check_route(logits, k)
    if not (backend.fused(logits) and route_applies(logits, bias, k, score, normalise)):
        w, found = route_reference(logits, bias, k, score, normalise, factor)
        return w.contiguous(), found
    from .device import moe as device

    t, e = logits.shape
    weights = logits.new_empty((t, k), dtype=backend.work(logits.dtype))
    experts = logits.new_empty((t, k), dtype=torch.int64)
    rows = _rows_of(e)
    device.route[(backend.blocks(t, rows),)](
        logits.contiguous(), bias, weights, experts, t, e, factor, K=k, NORMALISE=normalise, SIGMOID=score == "sigmoid",
        ACC=backend.accumulator(logits.dtype), ROWS=rows, EXPERTS=backend.power(e), CHOICES=backend.power(k), num_warps=WARPS,
    )  # fmt: skip
    return weights, experts


def _check_route(logits: Tensor, k: int) -> None:
    if logits.dim() != 2 or not 0 < k <= logits.shape[1]:
        raise ValueError(f"moe_route: found {k} choices of logits {tuple(logits.shape)}; expected [tokens, experts], and 1 to all experts")


@moe_route.register_fake
def _(logits: Tensor, bias: Tensor | None, k: int, score: str, normalise: bool, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    _check_route(logits, k)
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=backend.work(logits.dtype)), logits.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("autoshard::moe_route_backward", mutates_args=())
def moe_route_backward(grad: Tensor, logits: Tensor, experts: Tensor, score: str, normalise: bool, factor: float) -> Tensor:
    (t, e), k = logits.shape, experts.shape[1]
    if backend.fused(logits) and route_applies(logits, None, k, score, normalise):
        from .device import moe as device

        out = logits.new_empty((t, e))
        rows = _rows_of(e)
        device.route_backward[(backend.blocks(t, rows),)](
            grad.contiguous(), logits.contiguous(), experts, out, t, e, factor, K=k, NORMALISE=normalise, SIGMOID=score == "sigmoid",
            ACC=backend.accumulator(logits.dtype), ROWS=rows, EXPERTS=backend.power(e), num_warps=WARPS,
        )  # fmt: skip
        return out
    s = _scores(logits, score)
    w, g = s.gather(-1, experts), grad.to(s.dtype) * factor
    if normalise:
        whole = w.sum(-1, keepdim=True) + 1e-20
        g = (g - (g * w).sum(-1, keepdim=True) / whole) / whole
    ds = torch.zeros_like(s).scatter(-1, experts, g)
    dx = s * (ds - (ds * s).sum(-1, keepdim=True)) if score == "softmax" else ds * s * (1 - s)
    return dx.to(logits.dtype).contiguous()


@moe_route_backward.register_fake
def _(grad: Tensor, logits: Tensor, experts: Tensor, score: str, normalise: bool, factor: float) -> Tensor:
    return logits.new_empty(logits.shape)


def _route_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _bias, _k, *ctx.how = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _route_grad(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return torch.ops.autoshard.moe_route_backward(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None, None


moe_route.register_autograd(_route_grad, setup_context=_route_context)


# ---- rows to their experts


def permute_reference(x: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    position, ends = _order(experts, count)
    order = torch.empty_like(position.flatten()).scatter(0, position.flatten().long(), torch.arange(position.numel()).to(position))
    return x[order.long() // max(1, experts.shape[1])], position, ends


def _order(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """position and ends, by a stable sort."""
    flat = experts.flatten()
    found, order = flat.sort(stable=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
    ends = torch.searchsorted(found, torch.arange(count, device=flat.device), right=True)
    return position.to(torch.int32).view(experts.shape), ends.to(torch.int32)


def _counted(experts: Tensor, count: int, order: Tensor | None = None, rest: bool = False) -> tuple[Tensor, Tensor]:
    """The same, by counting. `order`: where to write which slot is at each place; `rest`: what is no expert counts as the last."""
    from .device import moe as device

    slots, flat = experts.numel(), experts.contiguous()
    blocks = backend.blocks(slots, SLOTS)
    counts = experts.new_empty((count, blocks), dtype=torch.int32)
    how: dict[str, Any] = {"BLOCK": SLOTS, "EXPERTS": backend.power(count), "REST": rest, "num_warps": WARPS}
    device.count[(blocks,)](flat, counts, slots, count, **how)
    upto = counts.flatten().cumsum(0, dtype=torch.int32)
    position = experts.new_empty(experts.shape, dtype=torch.int32)
    device.place[(blocks,)](flat, upto - counts.flatten(), position, order, slots, count, **how)
    return position, upto.view(count, blocks)[:, -1].contiguous()


def order_reference(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    inside = torch.where((index >= 0) & (index < count), index, count)
    order = inside.argsort(stable=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(inside[order], torch.arange(count, device=order.device), right=True)
    return order.int(), position.int(), ends.int()


@torch.library.custom_op("autoshard::moe_order", mutates_args=())
def moe_order(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stable order of rows by what they choose of 0, …, count - 1, those that choose none of these last; its inverse; where the rows
    of each end. All int32."""
    if index.dim() != 1 or index.is_floating_point():
        raise ValueError(f"moe_order: found an index {tuple(index.shape)} of {index.dtype}; expected whole numbers [rows]")
    if not (backend.fused(index) and order_applies(index, count)):
        return order_reference(index, count)
    order = index.new_empty(index.shape, dtype=torch.int32)
    position, ends = _counted(index, count + 1, order, rest=True)
    return order, position, ends[:count].clone()


@moe_order.register_fake
def _(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    order, position = (index.new_empty(index.shape, dtype=torch.int32) for _ in range(2))
    return order, position, index.new_empty(count, dtype=torch.int32)


def order_applies(index: Tensor, count: int, capability: backend.Capability = None) -> bool:
    return index.numel() > 0 and 0 < count < 1024


def _block(h: int) -> int:
    return min(BLOCK, backend.power(h))


@torch.library.custom_op("autoshard::moe_permute", mutates_args=())
def moe_permute(x: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    if not (backend.fused(x) and permute_applies(x, experts, count)):
        position, ends = _order(experts, count)
        moved = x.new_empty((experts.numel(), x.shape[1]))
        moved[position.flatten().long()] = x.repeat_interleave(experts.shape[1], 0)
        return moved, position, ends
    from .device import moe as device

    position, ends = _counted(experts, count)
    rows, (t, k), h = backend.rows(x), experts.shape, x.shape[1]
    moved = x.new_empty((t * k, h))
    device.spread[(t,)](
        rows,
        None,
        None,
        position,
        moved,
        None,
        h,
        rows.stride(0),
        0,
        K=k,
        ACC=backend.accumulator(x.dtype),
        BLOCK=_block(h),
        num_warps=WARPS,
    )
    return moved, position, ends


@moe_permute.register_fake
def _(x: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = experts.new_empty(experts.shape, dtype=torch.int32)
    return x.new_empty((experts.numel(), x.shape[1])), numbers, experts.new_empty(count, dtype=torch.int32)


def _gathered(moved: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_j (w[t, j] ·) moved[position[t, j]]"""
    t, k = position.shape
    if not (backend.fused(moved) and moved.numel() and moved.dtype in backend.FLOATING):
        wide = backend.work(moved.dtype)
        each = moved[position.long()].to(wide)
        return (each if weights is None else each * weights.to(wide).unsqueeze(-1)).sum(1).to(moved.dtype)
    from .device import moe as device

    rows, h = backend.rows(moved), moved.shape[1]
    out = moved.new_empty((t, h))
    device.gather[(t, backend.blocks(h, _block(h)))](
        rows, None if weights is None else weights.contiguous(), position, out, h, rows.stride(0), K=k,
        ACC=backend.accumulator(moved.dtype), BLOCK=_block(h), num_warps=WARPS,
    )  # fmt: skip
    return out


@torch.library.custom_op("autoshard::moe_permute_backward", mutates_args=())
def moe_permute_backward(grad: Tensor, position: Tensor) -> Tensor:
    return _gathered(grad, position, None)


@moe_permute_backward.register_fake
def _(grad: Tensor, position: Tensor) -> Tensor:
    return grad.new_empty((position.shape[0], grad.shape[1]))


def _permute_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])


def _permute_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return torch.ops.autoshard.moe_permute_backward(grad, *ctx.saved_tensors), None, None


moe_permute.register_autograd(_permute_grad, setup_context=_permute_context)


# ---- and back


def unpermute_reference(moved: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    wide = backend.work(moved.dtype)
    return (moved[position.long()].to(wide) * weights.to(wide).unsqueeze(-1)).sum(1).to(moved.dtype)


@torch.library.custom_op("autoshard::moe_unpermute", mutates_args=())
def moe_unpermute(moved: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    return _gathered(moved, position, weights)


@moe_unpermute.register_fake
def _(moved: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    return moved.new_empty((position.shape[0], moved.shape[1]))


@torch.library.custom_op("autoshard::moe_unpermute_backward", mutates_args=())
def moe_unpermute_backward(grad: Tensor, moved: Tensor, position: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """dmoved and dweights."""
    (t, k), h = position.shape, moved.shape[1]
    dmoved, dweights = moved.new_empty(moved.shape), weights.new_empty(weights.shape)
    if backend.fused(moved) and unpermute_applies(moved, position, weights):
        from .device import moe as device

        g, rows = backend.rows(grad), backend.rows(moved)
        device.spread[(t,)](
            g, weights.contiguous(), rows, position, dmoved, dweights, h, g.stride(0), rows.stride(0), K=k,
            ACC=backend.accumulator(moved.dtype), BLOCK=_block(h), num_warps=WARPS,
        )  # fmt: skip
        return dmoved, dweights
    wide = backend.work(moved.dtype)
    g = grad.to(wide).unsqueeze(1)
    at = position.long()
    dmoved[at.flatten()] = (g * weights.to(wide).unsqueeze(-1)).to(moved.dtype).flatten(0, 1)
    return dmoved, dweights.copy_((g * moved[at].to(wide)).sum(-1))


@moe_unpermute_backward.register_fake
def _(grad: Tensor, moved: Tensor, position: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return moved.new_empty(moved.shape), weights.new_empty(weights.shape)


def _unpermute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dmoved, dweights = torch.ops.autoshard.moe_unpermute_backward(grad, *ctx.saved_tensors)
    return dmoved, None, dweights


moe_unpermute.register_autograd(_unpermute_grad, setup_context=_unpermute_context)


# ---- all together


def mixture(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, activation: str) -> Tensor:
    """x [t h] through gated MLPs gate_up [e h 2f] and down [e f h], as routed; gate is the first half."""
    moved, position, ends = torch.ops.autoshard.moe_permute(x, experts, gate_up.shape[0])
    inner = torch.ops.autoshard.gated_mlp_packed(torch.ops.autoshard.grouped_matmul(moved, gate_up, ends), activation)
    return torch.ops.autoshard.moe_unpermute(torch.ops.autoshard.grouped_matmul(inner, down, ends), position, weights)


def route_applies(
    logits: Tensor, bias: Tensor | None, k: int, score: str, normalise: bool, factor: float = 1.0, capability: backend.Capability = None
) -> bool:
    return (
        score in ("softmax", "sigmoid") and logits.dtype in backend.FLOATING and logits.numel() > 0 and logits.shape[1] <= 1024 and k <= 32
    )


def permute_applies(x: Tensor, experts: Tensor, count: int, capability: backend.Capability = None) -> bool:
    return x.dtype in backend.FLOATING and x.numel() > 0 and experts.numel() > 0 and 0 < count <= 1024


def unpermute_applies(moved: Tensor, position: Tensor, weights: Tensor, capability: backend.Capability = None) -> bool:
    return moved.dtype in backend.FLOATING and moved.numel() > 0


def route_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    elements = math.prod(shapes[0])
    return 30.0 * elements, 3.0 * elements * itemsize


def permute_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Forward reads a row and writes it k times; backward the other way."""
    (t, h), k = shapes[0], shapes[1][1]
    return 1.0 * t * k * h, 2.0 * t * h * (k + 1) * itemsize


def unpermute_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Forward reads k rows and writes one; backward reads one and k, and writes k."""
    (n, h), (t, _) = shapes[0], shapes[1]
    return 5.0 * n * h, (3.0 * n * h + 2.0 * t * h) * itemsize
