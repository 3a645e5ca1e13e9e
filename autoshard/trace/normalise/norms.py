"""Normalisation layers and embedding: `layer_norm` and `embedding` stay ops; batch norm, group norm and rms_norm become primitives."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...errors import CaptureError
from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..graph import Ref
from .reductions import moments

ADD, SUB, MUL = "aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor"


def norms(captured: Captured) -> Captured:
    """Spell normalisation and embedding in the normal form; running statistics become ordinary values."""
    return rewrite(captured, RULES)


def layer_norm(
    b: Builder, x: Ref, shape: Sequence[int], w: Ref | None = None, bias: Ref | None = None, eps: float = 1e-5, cudnn: bool = True
) -> Ref:
    return b.op("aten.layer_norm.default", x, tuple(shape), w, bias, eps)


def native_layer_norm(b: Builder, x: Ref, shape: Sequence[int], w: Ref | None, bias: Ref | None, eps: float) -> tuple[Ref | None, ...]:
    return layer_norm(b, x, shape, w, bias, eps), None, None


def wide(dtype: str) -> str:
    """The dtype in which torch's kernels compute on `dtype`."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def rms_norm(b: Builder, x: Ref, shape: Sequence[int], w: Ref | None = None, eps: float | None = None) -> Ref:
    """x / sqrt(mean(x²) + eps) · w, computed wide."""
    dtype = b.dtype(x)
    eps = {"float64": 2.220446049250313e-16}.get(dtype, 1.1920928955078125e-07) if eps is None else eps
    y = b.to(x, wide(dtype))
    dims = tuple(range(b.ndim(x) - len(shape), b.ndim(x)))
    square = b.op("aten.mean.dim", b.op(MUL, y, y), dims, True)
    y = b.op(MUL, y, b.op("aten.rsqrt.default", b.op(ADD, square, eps)))
    if w is not None:
        y = b.op(MUL, y, b.to(w, wide(dtype)))
    return b.to(y, dtype)


def fused_rms_norm(b: Builder, x: Ref, shape: Sequence[int], w: Ref | None = None, eps: float | None = None) -> tuple[Ref | None, ...]:
    return rms_norm(b, x, shape, w, eps), None


def _affine(b: Builder, y: Ref, w: Ref | None, bias: Ref | None) -> Ref:
    """y · w + bias per channel (dim 1)."""
    per_channel = (b.shape(y)[1],) + (1,) * (b.ndim(y) - 2)
    for target, p in ((MUL, w), (ADD, bias)):
        if p is not None:
            y = b.op(target, y, b.to(b.reshape(p, per_channel), b.dtype(y)))
    return y


def _apply(b: Builder, x: Ref, mean: Ref, rstd: Ref, w: Ref | None, bias: Ref | None) -> Ref:
    shape = (b.shape(x)[1],) + (1,) * (b.ndim(x) - 2)
    centred = b.op(SUB, b.to(x, b.dtype(mean)), b.reshape(mean, shape))
    y = b.op(MUL, centred, b.reshape(rstd, shape))
    return b.to(_affine(b, y, w, bias), b.dtype(x))


def _rstd(b: Builder, var: Ref, eps: float) -> Ref:
    return b.op("aten.rsqrt.default", b.op(ADD, var, eps))


def batch_norm(
    b: Builder, x: Ref, w: Ref | None, bias: Ref | None, mean: Ref | None, var: Ref | None, training: bool, momentum: float, eps: float
) -> tuple[Ref | None, ...]:
    """Output, (batch mean and rstd are used by nobody), new running mean, new running variance."""
    if not training:
        assert mean is not None and var is not None
        dtype = wide(b.dtype(x))
        return _apply(b, x, b.to(mean, dtype), _rstd(b, b.to(var, dtype), eps), w, bias), None, None, mean, var
    dims = (0, *range(2, b.ndim(x)))
    now_var, now_mean = moments(b, b.to(x, wide(b.dtype(x))), dims, 0, False)
    out = _apply(b, x, now_mean, _rstd(b, now_var, eps), w, bias)
    if mean is None or var is None:
        return out, None, None, None, None
    n = math.prod(b.shape(x)[d] for d in dims)
    unbiased = b.op(MUL, now_var, n / (n - 1) if n > 1 else math.nan)
    return out, None, None, _running(b, mean, now_mean, momentum), _running(b, var, unbiased, momentum)


def _running(b: Builder, old: Ref, now: Ref, momentum: float) -> Ref:
    now = b.op("aten.detach.default", now) if b.grad(now) else now
    return b.to(b.op(ADD, b.op(MUL, old, 1 - momentum), b.op(MUL, now, momentum)), b.dtype(old))


def batch_norm_no_stats(
    b: Builder, x: Ref, w: Ref | None, bias: Ref | None, training: bool, momentum: float, eps: float
) -> tuple[Ref | None, ...]:
    return batch_norm(b, x, w, bias, None, None, True, momentum, eps)[:3]


def batch_norm_eval(
    b: Builder, x: Ref, w: Ref | None, bias: Ref | None, mean: Ref, var: Ref, momentum: float, eps: float
) -> tuple[Ref | None, ...]:
    return batch_norm(b, x, w, bias, mean, var, False, momentum, eps)[:3]


def group_norm(
    b: Builder, x: Ref, groups: int, w: Ref | None = None, bias: Ref | None = None, eps: float = 1e-5, cudnn: bool = True
) -> Ref:
    n, c, *rest = b.shape(x)
    y = b.to(b.reshape(x, (n, groups, c // groups * math.prod(rest))), wide(b.dtype(x)))
    var, mean = moments(b, y, (2,), 0, True)
    y = b.op(MUL, b.op(SUB, y, mean), _rstd(b, var, eps))
    return b.to(_affine(b, b.reshape(y, (n, c, *rest)), w, bias), b.dtype(x))


def native_group_norm(
    b: Builder, x: Ref, w: Ref | None, bias: Ref | None, n: int, c: int, hxw: int, groups: int, eps: float
) -> tuple[Ref | None, ...]:
    return group_norm(b, x, groups, w, bias, eps), None, None


def embedding(b: Builder, w: Ref, ids: Ref, padding: int = -1, scale_by_freq: bool = False, sparse: bool = False) -> Ref:
    if scale_by_freq:
        raise CaptureError("embedding with scale_grad_by_freq is not supported", where=b.at.source if b.at else "", hint="switch it off")
    e = b.op("aten.embedding.default", w, ids)
    if padding < 0 or not b.grad(w):
        return e
    is_pad = b.unsqueeze(b.op("aten.eq.Scalar", ids, padding), -1)
    return b.op("aten.where.self", is_pad, b.op("aten.detach.default", e), e)


def weight_norm(b: Builder, v: Ref, g: Ref, dim: int = 0) -> tuple[Ref, Ref]:
    """v · g / ‖v‖, the norm over every dim but `dim` (of all where that is -1), and the norm."""
    dims = tuple(d for d in range(b.ndim(v)) if dim < 0 or d != dim)
    square = b.op("aten.sum.dim_IntList", b.op(MUL, v, v), dims, True)
    norm = b.op("aten.sqrt.default", square)
    return b.op(MUL, v, b.op("aten.div.Tensor", b.reshape(g, b.shape(norm)), norm)), norm


RULES: dict[str, Rule] = {
    "aten.layer_norm.default": layer_norm,
    "aten.native_layer_norm.default": native_layer_norm,
    "aten.rms_norm.default": rms_norm,
    "aten._fused_rms_norm.default": fused_rms_norm,
    "aten._native_batch_norm_legit_functional.default": batch_norm,
    "aten._native_batch_norm_legit.no_stats": batch_norm_no_stats,
    "aten._native_batch_norm_legit_no_training.default": batch_norm_eval,
    "aten.group_norm.default": group_norm,
    "aten.native_group_norm.default": native_group_norm,
    "aten.embedding.default": embedding,
    "aten._weight_norm_interface.default": weight_norm,
}
