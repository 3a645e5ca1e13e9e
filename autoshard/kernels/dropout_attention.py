"""Attention that drops out probabilities, without ever writing them or their mask.

forward:   S = scale · q kᵀ + mask,   P = softmax(S),   out = (P · D) v,   D = 0 or 1 / (1 - p) as the draws say (`draws.keep_bits`)
backward:  δ = Σ dO · O,   dP = D · (dO vᵀ),   dS = P (dP - δ):   dq = scale dS k,   dk = scale dSᵀ q,   dv = (P · D)ᵀ dO

The bits of D, an eighth of a byte a probability, are drawn anew in the backward; what is saved is q, k, v, out and a row's log-sum-exp.
An element's draw belongs to its place (batch, head, query, key) in the whole matrix: `batches`, `heads` and `queries` are the positions
there of what is here, all keys are, and `full` is the whole's shape. A bool mask keeps where True, another is added; it gets no
gradient. causal: query i sees keys ≤ i. A fully masked row gives 0. Query head i reads key head i // (h / k). No atomics: the same bits
each time.

Tolerance: products of rounded numbers summed wide: q, k, v, dO and the probabilities have the dtype's digits.
"""

# shapes: q [b h s e]   k, v [b k t e]   mask broadcastable to [b h s t]   out [b h s e], in the memory order b s h e   lse [b h s]

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend, draws

FORWARD_M, FORWARD_N, FORWARD_WARPS, FORWARD_STAGES = 128, 64, 4, 3
QUERIES_M, QUERIES_N, QUERIES_WARPS, QUERIES_STAGES = 128, 64, 8, 3
KEYS_M, KEYS_N, KEYS_WARPS, KEYS_STAGES = 64, 128, 8, 3
"""Blocks of queries and keys for heads of up to 64 elements in half precision."""


def noise(seed: Tensor, places: Sequence[Tensor], full: Sequence[int], p: float, like: Tensor) -> Tensor:
    """D [b h s t]."""
    bits = draws.keep_bits(seed, draws.rows_of([*places, places[0]], full), full[-1], p)
    kept = draws.unpacked(bits, None, full[-1]).reshape(*(len(at) for at in places), full[-1])
    return kept.to(backend.work(like.dtype)) * draws.scale(p)


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """P, and log-sum-exp of each row: 0 and -inf where it is fully masked."""
    wide = backend.work(q.dtype)
    s = q.to(wide) @ _repeated(k.to(wide), q).transpose(-1, -2) * scale
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(wide)
    if causal:
        later = torch.arange(s.shape[-1], device=s.device) > torch.arange(s.shape[-2], device=s.device).unsqueeze(-1)
        s = s.masked_fill(later, -torch.inf)
    if not s.shape[-1]:
        return s, s.new_full(s.shape[:-1], -torch.inf)
    top = s.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    e = (s - top).exp()
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total), (total.log() + top).squeeze(-1)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] != q.shape[1] else x


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor, batches: Tensor, heads: Tensor, queries: Tensor,
    full: Sequence[int], p: float, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    prob, lse = probabilities(q, k, mask, causal, scale)
    dropped = prob * noise(seed, (batches, heads, queries), full, p, q)
    return _inside((dropped @ _repeated(v.to(prob.dtype), q)).to(q.dtype)), lse.detach()


def _reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop: Tensor, out: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    prob, _ = probabilities(q, k, mask, causal, scale)
    g, x, y, z = grad.to(prob.dtype), q.to(prob.dtype), _repeated(k.to(prob.dtype), q), _repeated(v.to(prob.dtype), q)
    delta = (g * out.to(prob.dtype)).sum(-1, keepdim=True)
    ds = prob * (drop * (g @ z.transpose(-1, -2)) - delta) * scale
    dk, dv = (_of_groups(a.transpose(-1, -2) @ b, k) for a, b in ((ds, x), (prob * drop, g)))
    return (ds @ y).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _of_groups(x: Tensor, k: Tensor) -> Tensor:
    """Summed over the query heads of each key head."""
    return x.unflatten(1, (k.shape[1], -1)).sum(2)


def _inside(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(x: Tensor) -> Tensor:
    b, h, s, e = x.shape
    return x.new_empty((b, s, h, e)).transpose(1, 2)


# ---- launch


def _bits(q: Tensor, seed: Tensor, places: Sequence[Tensor], full: Sequence[int], p: float, causal: bool) -> Tensor:
    """Words [b·h, words, s]: a block of queries reads one word of keys side by side."""
    b, h, s, _ = q.shape
    wide = backend.blocks(draws.words(full[-1]), 4) * 4  # of whole blocks of keys
    found = torch.empty((b * h, wide, s), dtype=torch.int32, device=q.device)
    rows = draws.rows_of([*places, places[0]], full)
    draws.fill_keep(found, seed, rows, full[-1], p, s, (found.stride(0), 1, found.stride(1)), causal)
    return found


def _mask(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, ...], str]:
    """The mask as numbers, its steps along b, h, s and t (0: the same for all), and what kind it is."""
    if mask is None:
        return None, (0, 0, 0, 0), ""
    steps = tuple(0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True))
    kind = "keys" if steps[2] == 0 else "both"
    return (mask.view(torch.uint8), steps, kind) if mask.dtype == torch.bool else (mask, steps, f"{kind}, added")


def _steps(*tensors: Tensor) -> list[int]:
    return [n for x in tensors for n in x.stride()[:3]]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(q: Tensor, m: int, n: int) -> dict[str, int]:
    """The sizes of blocks, smaller for wider heads and dtypes."""
    e = q.shape[-1]
    wide = max(16, backend.power(e))
    bytes_ = wide * q.element_size()
    fold = max(1, bytes_ // 128)
    return {"E": e, "WIDE": wide, "M": max(32, m // fold), "N": max(32, n // min(fold, 2))}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bits: Tensor, p: float, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from .device import dropout_attention as device

    b, h, s, _ = q.shape
    out, lse = _empty(q), torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    given, steps, kind = _mask(mask)
    sizes = _block(q, FORWARD_M, FORWARD_N)
    device.forward[(backend.blocks(s, sizes["M"]), b * h)](
        q, k, v, given, bits, out, lse, s, k.shape[2], bits.shape[1], h, h // k.shape[1], scale / math.log(2), draws.scale(p),
        *_steps(q, k, v, out), *steps, CAUSAL=causal, MASK=kind, **sizes, num_warps=FORWARD_WARPS, num_stages=FORWARD_STAGES,
    )  # fmt: skip
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bits: Tensor, out: Tensor, lse: Tensor, p: float, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .device import dropout_attention as device

    b, h, s, _ = q.shape
    group, t = h // k.shape[1], k.shape[2]
    dq, dk, dv, delta = _empty(q), _empty(k), _empty(v), torch.empty_like(lse)
    given, steps, kind = _mask(mask)
    numbers = scale / math.log(2), draws.scale(p), scale
    sizes = _block(q, QUERIES_M, QUERIES_N)
    device.backward_queries[(backend.blocks(s, sizes["M"]), b * h)](
        grad, q, k, v, given, bits, out, lse, delta, dq, s, t, bits.shape[1], h, group, *numbers, *_steps(grad, q, k, v, out, dq), *steps,
        CAUSAL=causal, MASK=kind, **sizes, num_warps=QUERIES_WARPS, num_stages=QUERIES_STAGES,
    )  # fmt: skip
    sizes = _block(q, KEYS_M, KEYS_N)
    device.backward_keys[(backend.blocks(t, sizes["N"]), b * k.shape[1])](
        grad, q, k, v, given, bits, lse, delta, dk, dv, s, t, bits.shape[1], k.shape[1], group, *numbers, *_steps(grad, q, k, v, dk, dv),
        *steps, CAUSAL=causal, MASK=kind, EVEN=s % sizes["M"] == 0, **sizes, num_warps=KEYS_WARPS, num_stages=KEYS_STAGES,
    )  # fmt: skip
    return dq, dk, dv


# ---- operators


@torch.library.custom_op("autoshard::dropout_attention", mutates_args=())
def dropout_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor, batches: Tensor, heads: Tensor, queries: Tensor,
    full: Sequence[int], p: float, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp, which gets no gradient."""
    places = batches, heads, queries
    if not (backend.fused(q) and applies(q, k, v, mask, seed, *places, full, p, causal, scale)):
        return reference(q, k, v, mask, seed, *places, full, p, causal, scale)
    q, k, v = _dense(q), _dense(k), _dense(v)
    return _forward(q, k, v, mask, _bits(q, seed, places, full, p, causal), p, causal, scale)


@torch.library.custom_op("autoshard::dropout_attention_backward", mutates_args=())
def dropout_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor, batches: Tensor, heads: Tensor, queries: Tensor,
    out: Tensor, lse: Tensor, full: Sequence[int], p: float, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    places = batches, heads, queries
    if not (backend.fused(q) and applies(q, k, v, mask, seed, *places, full, p, causal, scale)):
        dq, dk, dv = _reference_backward(grad, q, k, v, mask, noise(seed, places, full, p, q), out, causal, scale)
        return _inside(dq), _inside(dk), _inside(dv)
    q, k, v, grad = _dense(q), _dense(k), _dense(v), _dense(grad)
    return _backward(grad, q, k, v, mask, _bits(q, seed, places, full, p, causal), out, lse.contiguous(), p, causal, scale)


@dropout_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor, batches: Tensor, heads: Tensor, queries: Tensor,
    full: Sequence[int], p: float, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, h, s, _ = q.shape
    return q.new_empty((b, s, h, v.shape[-1])).transpose(1, 2), q.new_empty((b, h, s), dtype=backend.work(q.dtype))


@dropout_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor, batches: Tensor, heads: Tensor, queries: Tensor,
    out: Tensor, lse: Tensor, full: Sequence[int], p: float, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty(q), _empty(k), _empty(v)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, full, p, causal, scale = inputs
    if tensors[3] is not None and tensors[3].requires_grad:
        raise ValueError("dropout_attention: its mask gets no gradient, but requires one; detach it, or spell the attention out")
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.how = list(full), p, causal, scale


def _grad(ctx: Any, grad: Tensor, _lse: Tensor | None) -> tuple[Any, ...]:
    return *torch.ops.autoshard.dropout_attention_backward(grad, *ctx.saved_tensors, *ctx.how), *(None,) * 9


dropout_attention.register_autograd(_grad, setup_context=_context)


def applies(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor, batches: Tensor, heads: Tensor, queries: Tensor,
    full: Sequence[int], p: float, causal: bool, scale: float, *, capability: backend.Capability = None,
) -> bool:  # fmt: skip
    """One head size up to 256, one dtype that isn't float64; strides within a head that 32 bits count."""
    near = all(x.shape[2] * x.stride(2) < 2**31 for x in (q, k, v)) and (mask is None or mask.numel() < 2**31)
    return (
        q.dtype in (torch.float32, *backend.HALF)
        and q.dtype == k.dtype == v.dtype
        and k.shape == v.shape
        and 0 < q.shape[-1] <= 256
        and k.shape[-1] == q.shape[-1]
        and q.numel() > 0
        and k.numel() > 0
        and scale > 0
        and near
        and (mask is None or mask.dtype in (torch.bool, *backend.FLOATING))
    )


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Two products forward, five backward."""
    q, k = shapes[:2]
    pairs = math.prod(q[:3]) * k[2]
    return 14.0 * pairs * q[-1], 6.0 * (math.prod(q) + math.prod(k)) * itemsize
