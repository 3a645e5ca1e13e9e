"""scaled_dot_product_attention becomes `autoshard.attention` on 4 dims with an explicit scale, or plain matmul and softmax.

A repeat of key and value heads by groups right before attention is folded away: the op itself maps query head i to key head i // g.
"""

from __future__ import annotations

import math

from ..build import Builder, rewrite
from ..captured import Captured
from ..graph import Ref

ADD, MUL, MATMUL = "aten.add.Tensor", "aten.mul.Tensor", "aten.matmul.default"

# shapes:  q [b h s e]   k [b hk t e]   v [b hk t f]   mask broadcastable to [b h s t]


def attention(captured: Captured) -> Captured:
    """Spell scaled_dot_product_attention in the normal form."""
    return rewrite(captured, {"aten.scaled_dot_product_attention.default": sdpa})


def sdpa(
    b: Builder,
    q: Ref,
    k: Ref,
    v: Ref,
    mask: Ref | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    draw: int | None = None,
) -> Ref:
    scale = 1 / math.sqrt(b.shape(q)[-1] or 1) if scale is None else float(scale)
    lead, out_shape = _lead(b, q, k, v), (*b.shape(q)[:-1], b.shape(v)[-1])
    q4, k4, v4 = (_four(b, x, lead) for x in (q, k, v))
    mask = _four_mask(b, mask, lead) if mask is not None else None
    out_shape = (*lead, b.shape(q4)[1], *out_shape[-2:]) if b.ndim(q) > 3 else out_shape
    noise = None if draw is None else b.reshape(b.op(*_draw(b, draw)), (*b.shape(q4)[:-1], b.shape(k4)[-2]))
    if mask is not None and b.grad(mask):
        return b.reshape(_explicit(b, q4, k4, v4, mask, causal, scale, noise), out_shape)
    k4, v4 = _ungrouped(b, k4, v4)
    dropped = () if noise is None else (noise,)
    return b.reshape(b.op("autoshard.attention.default", q4, k4, v4, mask, causal, scale, *dropped), out_shape)


def _lead(b: Builder, *tensors: Ref) -> tuple[int, ...]:
    """The batch dims before heads, broadcast. A 3-d tensor has its batch in dim 0 and one head."""
    leads = [b.shape(x)[:-3] if b.ndim(x) > 3 else b.shape(x)[:-2] for x in tensors]
    n = max(map(len, leads))
    return tuple(max(sizes) for sizes in zip(*((1,) * (n - len(lead)) + lead for lead in leads), strict=True))


def _four(b: Builder, x: Ref, lead: tuple[int, ...]) -> Ref:
    shape = b.shape(x)
    heads = shape[-3] if len(shape) > 3 else 1
    if len(shape) > 3 or len(shape) == 2:
        x = b.expand(x, (*lead, *((heads,) if len(shape) > 3 else ()), *shape[-2:]))
    return b.reshape(x, (math.prod(lead), heads, *shape[-2:]))


def _four_mask(b: Builder, mask: Ref, lead: tuple[int, ...]) -> Ref:
    """A mask broadcast against [*lead, h, s, t] as one against [prod(lead), h, s, t]."""
    shape = b.shape(mask)
    if len(shape) < 4 and not (len(lead) == 1 and len(shape) == 3 and lead != (1,) and shape[0] == lead[0]):
        return b.reshape(mask, (1,) * (4 - len(shape)) + shape)
    if len(shape) == 3:
        return b.reshape(mask, (shape[0], 1, *shape[1:]))
    if len(shape) > 4:
        batch = shape[:-3]
        mask = mask if all(s == 1 for s in batch) else b.expand(mask, (*lead, *shape[-3:]))
        return b.reshape(mask, (1 if all(s == 1 for s in batch) else math.prod(lead), *shape[-3:]))
    return mask


def _ungrouped(b: Builder, k: Ref, v: Ref) -> tuple[Ref, Ref]:
    """k and v before they were repeated by groups, if both were."""
    found = _before_repeat(b, k), _before_repeat(b, v)
    if found[0] is None or found[1] is None or b.shape(found[0])[1] != b.shape(found[1])[1]:
        return k, v
    return found[0], found[1]


def _before_repeat(b: Builder, x: Ref) -> Ref | None:
    """x = reshape(expand([b, hk, 1, t, e] → [b, hk, g, t, e])) -> the [b, hk, t, e] that it repeats."""
    merged = b.made_by(x, "aten.reshape.default")
    wide = b.made_by(merged.args[0], "aten.expand.default") if merged else None
    if merged is None or wide is None:
        return None
    thin, grouped, shape = b.shape(wide.args[0]), b.shape(merged.args[0]), b.shape(x)
    if len(grouped) != 5 or grouped[:2] != thin[:2] or thin[2] != 1 or grouped[3:] != thin[3:]:
        return None
    if shape != (grouped[0], grouped[1] * grouped[2], *grouped[3:]):
        return None
    return b.reshape(wide.args[0], (*thin[:2], *thin[3:]))


def _explicit(b: Builder, q: Ref, k: Ref, v: Ref, mask: Ref | None, causal: bool, scale: float, noise: Ref | None) -> Ref:
    """softmax(scale · q kᵀ + mask) · dropout @ v, spelled out."""
    groups = b.shape(q)[1] // b.shape(k)[1]
    k, v = (_repeat_heads(b, x, groups) for x in (k, v))
    scores = b.op(MUL, b.op(MATMUL, q, b.permute(k, (0, 1, 3, 2))), scale)
    if causal:
        keep = _causal(b, b.shape(scores)[-2], b.shape(scores)[-1])
        scores = b.op("aten.where.ScalarOther", keep, scores, -math.inf)
    if mask is not None and b.dtype(mask) == "bool":
        scores = b.op("aten.where.ScalarOther", mask, scores, -math.inf)
    elif mask is not None:
        scores = b.op(ADD, scores, mask)
    p = b.op("aten.softmax.int", scores, 3)
    if mask is not None:  # torch's SDPA gives 0 where a row is fully masked
        dead = b.op("aten.eq.Scalar", b.op("aten.amax.default", scores, (3,), True), -math.inf)
        p = b.op("aten.where.self", dead, b.op("aten.full.default", (), 0.0, dtype=f"torch.{b.dtype(p)}"), p)
    if noise is not None:
        p = b.op(MUL, p, noise)
    return b.op(MATMUL, p, v)


def _draw(b: Builder, index: int) -> tuple:
    draw = b.old.draw(index)
    return draw.target, *draw.args


def _repeat_heads(b: Builder, x: Ref, n: int) -> Ref:
    if n == 1:
        return x
    batch, heads, *rest = b.shape(x)
    return b.reshape(b.expand(b.reshape(x, (batch, heads, 1, *rest)), (batch, heads, n, *rest)), (batch, heads * n, *rest))


def _causal(b: Builder, s: int, t: int) -> Ref:
    rows, columns = (b.op("aten.arange.start_step", 0, n, 1, dtype="torch.int64") for n in (s, t))
    return b.op("aten.ge.Tensor", b.reshape(rows, (s, 1)), columns)
