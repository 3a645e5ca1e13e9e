"""Cross entropy with the head's matmul, in chunks of rows, so that the logits never exist whole.

z = cap(scale · x Wᵀ), cap(y) = c · tanh(y / c) where c > 0,   lse = log Σ_v exp z_v
loss_i = lse - (1 - ε) z_label - ε/V Σ_v z_v + λ lse²,   0 where the label is ignored          (ε: label smoothing, λ: z-loss)

Two operators:

`head_partials`: what each row comes to over this shard of the vocabulary (W's rows from `start` on):
    top = max z,  total = Σ exp(z - top),  target = z_label, 0 if it is elsewhere,  plain = Σ z
  `combine` puts shards together (an all-reduce of the maximum, then one of the sums), `row_losses` makes the losses of it: plain torch,
  a few numbers a row. Backward makes the logits again: dz = g_total · exp(z - top) + g_target · [v = label] + g_plain; `top` gets no
  gradient, since it cancels. 4 matmuls; kept between: x, W, labels and 4 numbers a row.
`linear_cross_entropy`: Σ loss_i / divisor over a whole vocabulary, with dx and dW made in the forward, chunk by chunk, while the logits
are there.
  Backward multiplies. 3 matmuls; kept between: dx and dW, as large as x and W. dW is added up in W's dtype, one rounding a
  chunk (`wide_sum`: in float32, which costs passes over dW).

Besides, both hold one chunk of logits: `chunk_bytes`, or one row.
Tolerance: the logits are rounded to x's dtype, as the matmul leaves them; then everything is float32 (float64 for float64).
"""

# shapes: x [r h], weight [v h], labels [r] (int64), start [] (int64); top, total, target, plain [r]

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import backend

CHUNK_BYTES = 256 << 20
BLOCK = 4096  # elements of a row that a program holds at a time
WARPS = 8


# ---- meaning


def reference(
    x: Tensor, weight: Tensor, labels: Tensor, start: Tensor, scale: float = 1.0, softcap: float = 0.0, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = _shaped((x @ weight.t()).to(backend.work(x.dtype)), scale, softcap)
    return _statistics(z, labels - start)


def row_losses(
    top: Tensor, total: Tensor, target: Tensor, plain: Tensor, labels: Tensor, vocab: int, ignore: int = -100, smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Losses [r] of the whole vocabulary's partials."""
    log = total.log()
    loss = log + (1 - smoothing) * (top - target)  # what all logits have in common goes first, with the digits that it would cost
    if smoothing:
        loss = loss + smoothing * (top - plain / vocab)
    if z_loss:
        loss = loss + z_loss * (top + log).square()
    return torch.where(labels != ignore, loss, torch.zeros((), dtype=loss.dtype, device=loss.device))


def combine(
    partials: tuple[Tensor, Tensor, Tensor, Tensor], all_max: Callable[[Tensor], Tensor], all_sum: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole vocabulary's partials, on every shard. `all_max` and `all_sum` reduce over the shards."""
    top, total, target, plain = partials
    most = all_max(top.detach())
    return most, all_sum(total * torch.exp(top.detach() - most)), all_sum(target), all_sum(plain)


def full_reference(
    x: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor, ignore: int = -100, smoothing: float = 0.0, z_loss: float = 0.0,
    scale: float = 1.0, softcap: float = 0.0, weight_grad: bool = True, wide_sum: bool = False, chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:  # fmt: skip
    partials = reference(x, weight, labels, labels.new_zeros(()), scale, softcap)
    return row_losses(*partials, labels, weight.shape[0], ignore, smoothing, z_loss).sum() / divisor


def _shaped(logits: Tensor, scale: float, softcap: float) -> Tensor:
    z = logits * scale if scale != 1 else logits
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def _statistics(z: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not z.shape[1]:
        zero = z.sum(1)
        return torch.full_like(zero, -torch.inf), zero, zero.clone(), zero.clone()
    top = z.detach().amax(1)
    inside = (here >= 0) & (here < z.shape[1])
    found = z.gather(1, torch.where(inside, here, 0).unsqueeze(1)).squeeze(1)
    return top, torch.exp(z - top.unsqueeze(1)).sum(1), torch.where(inside, found, torch.zeros_like(found)), z.sum(1)


# ---- chunks


class Chunks:
    """The logits, a chunk of rows at a time in one buffer."""

    def __init__(self, x: Tensor, weight: Tensor, labels: Tensor, start: Tensor, scale: float, softcap: float, chunk_bytes: int) -> None:
        self.x, self.weight, self.labels, self.start = x, weight, labels.contiguous(), start
        self.scale, self.softcap = scale, softcap
        rows, v = x.shape[0], weight.shape[0]
        each = max(1, min(rows, chunk_bytes // max(1, v * x.element_size())))
        self.each = each // 128 * 128 if 128 < each < rows else each
        self.buffer = x.new_empty((self.each, v))
        self.triton = backend.fused(x) and applies(x, weight, labels)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, self.x.shape[0], self.each):
            at = slice(first, min(first + self.each, self.x.shape[0]))
            logits = self.buffer[: at.stop - first]
            torch.mm(self.x[at], self.weight.t(), out=logits)
            yield at, logits

    def statistics(self, at: slice, logits: Tensor, outs: tuple[Tensor, ...]) -> None:
        """Write top, total, target and plain of these rows."""
        if not self.triton:
            z = _shaped(logits.to(outs[0].dtype), self.scale, self.softcap)
            for out, found in zip(outs, _statistics(z, self.labels[at] - self.start), strict=True):
                out[at] = found
            return
        from .device import cross_entropy as device

        block = min(BLOCK, backend.power(logits.shape[1]))
        device.statistics[(logits.shape[0],)](
            logits, self.labels[at], self.start, *(o[at] for o in outs), logits.shape[1], logits.stride(0), self.scale, self.softcap or 1.0,
            CAP=self.softcap > 0, ACC=backend.accumulator(self.x.dtype), BLOCK=block, num_warps=WARPS,
        )  # fmt: skip

    def gradient(self, at: slice, logits: Tensor, top: Tensor, g_total: Tensor, g_target: Tensor, g_plain: Tensor) -> None:
        """Logits become their gradient; the others are these rows' alone."""
        if not self.triton:
            z = _shaped(logits.to(top.dtype), self.scale, self.softcap)
            g = g_total.unsqueeze(1) * torch.exp(z - top.unsqueeze(1)) + g_plain.unsqueeze(1)
            here = self.labels[at] - self.start
            col = torch.arange(logits.shape[1], device=logits.device)
            g = g + torch.where(col == here.unsqueeze(1), g_target.unsqueeze(1), torch.zeros((), dtype=g.dtype, device=g.device))
            if self.softcap > 0:
                g = g * (1 - (z / self.softcap).square())
            logits.copy_(g * self.scale)
            return
        from .device import cross_entropy as device

        block = min(BLOCK, backend.power(logits.shape[1]))
        device.gradient[(logits.shape[0], backend.blocks(logits.shape[1], block))](
            logits, self.labels[at], self.start, top, g_total, g_target, g_plain, logits.shape[1], logits.stride(0), self.scale,
            self.softcap or 1.0, CAP=self.softcap > 0, ACC=backend.accumulator(self.x.dtype), BLOCK=block, num_warps=WARPS,
        )  # fmt: skip


def _check(x: Tensor, weight: Tensor, labels: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1] or x.dtype != weight.dtype:
        raise ValueError(
            f"cross entropy: x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}, labels {tuple(labels.shape)}; "
            "expected [r, h], [v, h] of the same dtype and [r]"
        )


# ---- partials, and logits made again


@torch.library.custom_op("autoshard::head_partials", mutates_args=())
def head_partials(
    x: Tensor, weight: Tensor, labels: Tensor, start: Tensor, scale: float = 1.0, softcap: float = 0.0, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, labels)
    outs = _rows(x)
    if weight.shape[0] == 0:
        for out, value in zip(outs, (-torch.inf, 0, 0, 0), strict=True):
            out.fill_(value)
        return outs
    chunks = Chunks(x, weight, labels, start, scale, softcap, chunk_bytes)
    for at, logits in chunks:
        chunks.statistics(at, logits, outs)
    return outs


def _rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top, total, target, plain = (x.new_empty(x.shape[0], dtype=backend.work(x.dtype)) for _ in range(4))
    return top, total, target, plain


@head_partials.register_fake
def _(
    x: Tensor, weight: Tensor, labels: Tensor, start: Tensor, scale: float = 1.0, softcap: float = 0.0, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, labels)
    return _rows(x)


@torch.library.custom_op("autoshard::head_partials_backward", mutates_args=())
def head_partials_backward(
    g_total: Tensor, g_target: Tensor, g_plain: Tensor, x: Tensor, weight: Tensor, labels: Tensor, start: Tensor, top: Tensor,
    scale: float, softcap: float, chunk_bytes: int, need: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dW, empty unless `need`ed."""
    dx, dw = (t.new_zeros(t.shape if n else 0) for t, n in zip((x, weight), need, strict=True))
    if not x.numel() or not weight.numel():
        return dx, dw
    chunks = Chunks(x, weight, labels, start, scale, softcap, chunk_bytes)
    for at, logits in chunks:
        chunks.gradient(at, logits, *(t[at].contiguous() for t in (top, g_total, g_target, g_plain)))
        if need[0]:
            torch.mm(logits, weight, out=dx[at])
        if need[1]:
            dw.addmm_(logits.t(), x[at])
    return dx, dw


@head_partials_backward.register_fake
def _(
    g_total: Tensor, g_target: Tensor, g_plain: Tensor, x: Tensor, weight: Tensor, labels: Tensor, start: Tensor, top: Tensor,
    scale: float, softcap: float, chunk_bytes: int, need: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if need[0] else 0), weight.new_empty(weight.shape if need[1] else 0)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, labels, start, *ctx.how = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(x, weight, labels, start, output[0])


def _grad(ctx: Any, _top: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[:2])
    found = torch.ops.autoshard.head_partials_backward(*grads, *ctx.saved_tensors, *ctx.how, need)
    return *(f if n else None for f, n in zip(found, need, strict=True)), None, None, None, None, None


head_partials.register_autograd(_grad, setup_context=_context)


# ---- the loss, with gradients made at once


@torch.library.custom_op("autoshard::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor, ignore: int = -100, smoothing: float = 0.0, z_loss: float = 0.0,
    scale: float = 1.0, softcap: float = 0.0, weight_grad: bool = True, wide_sum: bool = False, chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and its gradients by x and weight (empty without `weight_grad`)."""
    _check(x, weight, labels)
    dx = x.new_empty(x.shape)
    sums = weight.new_zeros(weight.shape if weight_grad else 0, dtype=backend.work(weight.dtype) if wide_sum else weight.dtype)
    outs, late = _rows(x), x.dtype == torch.float16  # float16 has no room for small gradients: there the division comes last
    chunks = Chunks(x, weight, labels, labels.new_zeros(()), scale, softcap, chunk_bytes)
    for at, logits in chunks:
        chunks.statistics(at, logits, outs)
        top, total, _, _ = (o[at] for o in outs)
        counted = (labels[at] != ignore).to(top.dtype)
        counted = counted if late else counted / divisor
        by_lse = counted if not z_loss else counted * (1 + 2 * z_loss * (top + total.log()))
        chunks.gradient(at, logits, top, by_lse / total, counted * (smoothing - 1), counted * (-smoothing / weight.shape[0]))
        torch.mm(logits, weight, out=dx[at])
        if weight_grad:
            sums.add_(logits.t() @ x[at]) if wide_sum else sums.addmm_(logits.t(), x[at])
    loss = row_losses(*outs, labels, weight.shape[0], ignore, smoothing, z_loss).sum() / divisor
    if late:
        dx.div_(divisor), sums.div_(divisor)
    return loss.to(outs[0].dtype), dx, sums.to(weight.dtype)


@linear_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor, ignore: int = -100, smoothing: float = 0.0, z_loss: float = 0.0,
    scale: float = 1.0, softcap: float = 0.0, weight_grad: bool = True, wide_sum: bool = False, chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x, weight, labels)
    loss = x.new_empty((), dtype=backend.work(x.dtype))
    return loss, x.new_empty(x.shape), weight.new_empty(weight.shape if weight_grad else 0)


def _full_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if inputs[1].requires_grad and not inputs[9]:
        raise ValueError("linear_cross_entropy: weight requires a gradient, but weight_grad is off; switch it on, or detach the weight")
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _full_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dw = ctx.saved_tensors
    need = ctx.needs_input_grad
    return dx * grad.to(dx.dtype) if need[0] else None, dw * grad.to(dw.dtype) if need[1] else None, *(None,) * 10


linear_cross_entropy.register_autograd(_full_grad, setup_context=_full_context)


def applies(x: Tensor, weight: Tensor, labels: Tensor, *_: Any, capability: backend.Capability = None) -> bool:
    return x.dtype == weight.dtype and x.dtype in backend.FLOATING and x.numel() > 0 and weight.numel() > 0 and labels.dtype == torch.int64


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Logits twice, dx, dW; the logits are written and read by each step of a chunk."""
    (r, h), v = shapes[0], shapes[1][0]
    return 8.0 * r * v * h, (7.0 * r * v + 4.0 * v * h + 4.0 * r * h) * itemsize


def full_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Logits, dx, dW; and dW once more, multiplied."""
    (r, h), v = shapes[0], shapes[1][0]
    return 6.0 * r * v * h, (6.0 * r * v + 5.0 * v * h + 5.0 * r * h) * itemsize
