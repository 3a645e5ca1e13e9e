"""Rotary position embedding: `rotary` of q and k at once; `rotary_packed` of both, taken with v out of one packed projection;
`rotary_one` of one.

forward:   y = x · c + J x · s,    (J x)₁ = -x₂, (J x)₂ = x₁ on pairs: (i, i + r/2), or with `interleaved` (2i, 2i + 1)
backward:  dx = dy · c + Jᵀ (dy · s): for tables of angles, the rotation by -θ

Only the first `rotated` = r elements of a head turn (0: all); the others are passed on. Tables hold r numbers a token, or r/2, one for
each pair. They get no gradient. Everything is computed wide and rounded once, to the dtype of q (and k); a model that multiplies in bf16
rounds three times.

Tolerance: one rounding of the dtype, and of float32 two products and a sum.
"""

# shapes: q [b h s e], k and v [b k s e], of any strides; cos, sin [b or 1, s, r or r/2]; qkv [b s (h + 2k)·e], in this order.
# Results lie in the memory order b s h e, as attention wants them.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import backend

TILE = 2048  # elements that a program holds


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    return tuple(_turn(x, cos, sin, rotated, interleaved, False) for x in (q, k))  # type: ignore[return-value]


def one_reference(x: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False) -> Tensor:
    return _turn(x, cos, sin, rotated, interleaved, False)


def packed_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, rotated: int = 0, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _unpack(qkv, heads, kv_heads)
    return *reference(q, k, cos, sin, rotated, interleaved), v


def _turn(x: Tensor, cos: Tensor, sin: Tensor, rotated: int, interleaved: bool, adjoint: bool) -> Tensor:
    wide = backend.work(x.dtype)
    r = rotated or x.shape[-1]
    a, rest = x[..., :r].to(wide), x[..., r:]
    c, s = (_whole(t.to(wide), r, interleaved).unsqueeze(1) for t in (cos, sin))
    if adjoint:
        y = a * c - _quarter(a * s, interleaved)
    else:
        y = a * c + _quarter(a, interleaved) * s
    return torch.cat([y.to(x.dtype), rest], -1) if r < x.shape[-1] else y.to(x.dtype)


def _quarter(x: Tensor, interleaved: bool) -> Tensor:
    """J x; and Jᵀ x = -J x."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    one, two = x.chunk(2, -1)
    return torch.cat((-two, one), -1)


def _whole(table: Tensor, r: int, interleaved: bool) -> Tensor:
    if table.shape[-1] == r:
        return table
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def _unpack(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [b h s e]."""
    each = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = each.split([heads, kv_heads, kv_heads], 1)
    return q, k, v


# ---- launch


def _empty(x: Tensor) -> Tensor:
    b, h, s, e = x.shape
    return x.new_empty((b, s, h, e)).transpose(1, 2)


def _inside(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _run(
    sources: tuple[Tensor, ...], targets: tuple[Tensor, ...], cos: Tensor, sin: Tensor, rotated: int, interleaved: bool, adjoint: bool
) -> None:
    """Turn q and k into the first two targets; copy v, if there is one, into the third."""
    from .device import rotary as device

    sources = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in sources)
    q, k, *rest = sources
    b, h, s, e = q.shape
    r = rotated or e
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    strides = [n for x in (*sources, *((q,) if not rest else ())) for n in x.stride()[:3]]
    strides += [n for x in (*targets, *((q,) if not rest else ())) for n in x.stride()[:3]]
    block = max(1, min(backend.power(max(h, k.shape[1])), TILE // backend.power(e)))
    programs = backend.blocks(h, block) + (2 if rest else 1) * backend.blocks(k.shape[1], block)
    device.rotate[(b * s, programs)](
        q, k, rest[0] if rest else None, targets[0], targets[1], targets[2] if rest else None, cos, sin, s, h, k.shape[1],
        *strides, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1) if cos.shape[1] > 1 else 0,
        R=r, E=e, WHOLE=cos.shape[-1] == r, INTERLEAVED=interleaved, ADJOINT=adjoint, ACC=backend.accumulator(q.dtype), HEADS=block,
        HALF=backend.power(r // 2), REST=backend.power(e - r), COLS=backend.power(e), num_warps=backend.warps(block * backend.power(e)),
    )  # fmt: skip


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> None:
    r = rotated or q.shape[-1]
    if (
        r % 2
        or r > q.shape[-1]
        or q.shape[-1] != k.shape[-1]
        or cos.shape != sin.shape
        or cos.dim() != 3
        or cos.shape[-1] not in (r, r // 2)
    ):
        raise ValueError(
            f"rotary: {r} of {q.shape[-1]} elements of q turn, of k's {k.shape[-1]}, by tables {tuple(cos.shape)} and {tuple(sin.shape)}; "
            "expected an even number, heads of one size, and two tables [batch or 1, seq, that number or half of it]"
        )


def _pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotated: int, interleaved: bool, adjoint: bool) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin, rotated)
    if not (backend.fused(q) and applies(q, k, cos, sin, rotated)):
        one, two = (_inside(_turn(x, cos, sin, rotated, interleaved, adjoint)) for x in (q, k))
        return one, two
    outs = _empty(q), _empty(k)
    _run((q, k), outs, cos, sin, rotated, interleaved, adjoint)
    return outs


@torch.library.custom_op("autoshard::rotary", mutates_args=())
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    return _pair(q, k, cos, sin, rotated, interleaved, False)


@torch.library.custom_op("autoshard::rotary_backward", mutates_args=())
def rotary_backward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Gradients of q and k of those of the results."""
    return _pair(q, k, cos, sin, rotated, interleaved, True)


@rotary_backward.register_fake
@rotary.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin, rotated)
    return _empty(q), _empty(k)


# ---- one


def _one(x: Tensor, cos: Tensor, sin: Tensor, rotated: int, interleaved: bool, adjoint: bool) -> Tensor:
    _check(x, x, cos, sin, rotated)
    if not (backend.fused(x) and applies(x, x, cos, sin, rotated)):
        return _inside(_turn(x, cos, sin, rotated, interleaved, adjoint))
    out = _empty(x)
    _run((x, x[:, :0]), (out, out[:, :0]), cos, sin, rotated, interleaved, adjoint)
    return out


@torch.library.custom_op("autoshard::rotary_one", mutates_args=())
def rotary_one(x: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False) -> Tensor:
    return _one(x, cos, sin, rotated, interleaved, False)


@torch.library.custom_op("autoshard::rotary_one_backward", mutates_args=())
def rotary_one_backward(x: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False) -> Tensor:
    return _one(x, cos, sin, rotated, interleaved, True)


@rotary_one_backward.register_fake
@rotary_one.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False) -> Tensor:
    _check(x, x, cos, sin, rotated)
    return _empty(x)


# ---- packed


@torch.library.custom_op("autoshard::rotary_packed", mutates_args=())
def rotary_packed(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, rotated: int = 0, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _unpack(qkv, heads, kv_heads)
    _check(q, k, cos, sin, rotated)
    if not (backend.fused(q) and applies(q, k, cos, sin, rotated)):
        return *(_inside(_turn(x, cos, sin, rotated, interleaved, False)) for x in (q, k)), _inside(v).clone()  # type: ignore[return-value]
    outs = _empty(q), _empty(k), _empty(v)
    _run((q, k, v), outs, cos, sin, rotated, interleaved, False)
    return outs


@rotary_packed.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, rotated: int = 0, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _unpack(qkv, heads, kv_heads)
    _check(q, k, cos, sin, rotated)
    return _empty(q), _empty(k), _empty(v)


@torch.library.custom_op("autoshard::rotary_packed_backward", mutates_args=())
def rotary_packed_backward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False
) -> Tensor:
    """The gradient of qkv, of those of the results."""
    heads, kv_heads = q.shape[1], k.shape[1]
    packed = q.new_empty((q.shape[0], q.shape[2], (heads + 2 * kv_heads) * q.shape[3]))
    targets = _unpack(packed, heads, kv_heads)
    if backend.fused(q) and applies(q, k, cos, sin, rotated):
        _run((q, k, v), targets, cos, sin, rotated, interleaved, True)
        return packed
    for x, target in zip((q, k), targets, strict=False):
        target.copy_(_turn(x, cos, sin, rotated, interleaved, True))
    targets[2].copy_(v)
    return packed


@rotary_packed_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rotated: int = 0, interleaved: bool = False) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], (q.shape[1] + 2 * k.shape[1]) * q.shape[3]))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    cos, sin = inputs[2:4] if isinstance(output, tuple) and len(output) == 2 else inputs[1:3]
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rotary: its tables get no gradient, but one requires it; detach them, or use the reference")
    ctx.save_for_backward(cos, sin)
    ctx.how = inputs[-2:]


def _grad(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.autoshard.rotary_backward(dq, dk, *ctx.saved_tensors, *ctx.how), None, None, None, None


def _one_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.autoshard.rotary_one_backward(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None


def _packed_grad(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.autoshard.rotary_packed_backward(dq, dk, dv, *ctx.saved_tensors, *ctx.how), None, None, None, None, None, None


rotary.register_autograd(_grad, setup_context=_context)
rotary_one.register_autograd(_one_grad, setup_context=_context)
rotary_packed.register_autograd(_packed_grad, setup_context=_context)


def applies(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, capability: backend.Capability = None) -> bool:
    return all(t.dtype in backend.FLOATING for t in (q, k, cos, sin)) and q.dtype == k.dtype and 0 < q.shape[-1] <= 1024 and q.numel() > 0


def one_applies(x: Tensor, cos: Tensor, sin: Tensor, *_: Any, capability: backend.Capability = None) -> bool:
    return applies(x, x, cos, sin)


def packed_applies(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, *_: Any, capability: backend.Capability = None
) -> bool:
    q, k, _v = _unpack(qkv, heads, kv_heads)
    return applies(q, k, cos, sin)


def cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    """Forward and backward each read and write q and k; the tables stay in caches."""
    elements = math.prod(shapes[0]) + math.prod(shapes[1])
    return 6.0 * elements, 4.0 * elements * itemsize


def one_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    return packed_cost(shapes[0], itemsize=itemsize)


def packed_cost(*shapes: backend.Shape, itemsize: int = 2) -> tuple[float, float]:
    elements = math.prod(shapes[0])
    return 6.0 * elements, 4.0 * elements * itemsize
