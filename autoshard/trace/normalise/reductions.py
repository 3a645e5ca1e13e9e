"""Reductions with explicit dims and dtypes: `sum.dim_IntList`, `mean.dim`, `amax`, `amin`, `softmax.int`, `log_softmax.int`, cumsum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..graph import Ref

Dims = int | Sequence[int] | None
Number = int | float


def reductions(captured: Captured) -> Captured:
    """Give every reduction explicit dims, and its dtype argument an explicit cast."""
    return rewrite(captured, RULES)


def all_dims(b: Builder, x: Ref, dims: Dims) -> tuple[int, ...]:
    n = b.ndim(x)
    if dims is None or dims == ():
        return tuple(range(n))
    return tuple(d % max(n, 1) for d in ((dims,) if isinstance(dims, int) else dims))


def _to(b: Builder, x: Ref, dtype: str | None) -> Ref:
    return b.to(x, dtype) if dtype else x


def sum_all(b: Builder, x: Ref, dtype: str | None = None) -> Ref:
    return sum_(b, x, None, False, dtype)


def sum_(b: Builder, x: Ref, dims: Dims = None, keepdim: bool = False, dtype: str | None = None) -> Ref:
    x = _to(b, x, dtype)
    if not b.ndim(x):
        return x if dtype or b.value(x).tensor.floating else b.to(x, "int64")
    return _to(b, b.op("aten.sum.dim_IntList", x, all_dims(b, x, dims), keepdim), dtype)  # integers are summed as int64


def mean_all(b: Builder, x: Ref, dtype: str | None = None) -> Ref:
    return mean(b, x, None, False, dtype)


def mean(b: Builder, x: Ref, dims: Dims = None, keepdim: bool = False, dtype: str | None = None) -> Ref:
    x = _to(b, x, dtype)
    return b.op("aten.mean.dim", x, all_dims(b, x, dims), keepdim) if b.ndim(x) else x


def _extreme(name: str) -> Rule:
    def rule(b: Builder, x: Ref, dims: Dims = (), keepdim: bool = False) -> Ref:
        return b.op(f"aten.{name}.default", x, all_dims(b, x, dims), keepdim) if b.ndim(x) else x

    return rule


def with_index(name: str) -> Rule:
    """max, min along one dim with indices; kept, with explicit arguments."""

    def rule(b: Builder, x: Ref, dim: int, keepdim: bool = False) -> Any:
        return b.op(f"aten.{name}.dim", x, dim % max(b.ndim(x), 1), keepdim)

    return rule


def _along(name: str) -> Rule:
    """Ops along one dim with an optional dtype: softmax, log_softmax, cumsum, cumprod."""

    def rule(b: Builder, x: Ref, dim: int, dtype: str | bool | None = None) -> Ref:
        wanted = dtype if isinstance(dtype, str) else None
        return _to(b, b.op(f"aten.{name}", _to(b, x, wanted), dim % max(b.ndim(x), 1)), wanted)

    return rule


def logsumexp(b: Builder, x: Ref, dims: Dims, keepdim: bool = False) -> Ref:
    return b.op("aten.logsumexp.default", x, all_dims(b, x, dims), keepdim)


def prod_sizes(b: Builder, x: Ref, dims: Sequence[int]) -> int:
    return math.prod(b.shape(x)[d] for d in dims)


def var_correction(b: Builder, x: Ref, dims: Dims = None, correction: float | None = None, keepdim: bool = False) -> Ref:
    """Variance: mean of squared deviations, times n / (n - correction)."""
    return moments(b, x, dims, 1 if correction is None else correction, keepdim)[0]


def var_mean(b: Builder, x: Ref, dims: Dims = None, correction: float | None = None, keepdim: bool = False) -> tuple[Ref, Ref]:
    return moments(b, x, dims, 1 if correction is None else correction, keepdim)


def std_correction(b: Builder, x: Ref, dims: Dims = None, correction: float | None = None, keepdim: bool = False) -> Ref:
    return b.op("aten.sqrt.default", var_correction(b, x, dims, correction, keepdim))


def moments(b: Builder, x: Ref, dims: Dims, correction: float, keepdim: bool) -> tuple[Ref, Ref]:
    """Variance and mean over `dims`."""
    over = all_dims(b, x, dims)
    mean_kept = mean(b, x, over, True)
    centred = b.op("aten.sub.Tensor", x, mean_kept)
    total = sum_(b, b.op("aten.mul.Tensor", centred, centred), over, keepdim)
    divisor = prod_sizes(b, x, over) - correction
    return b.op("aten.div.Tensor", total, max(divisor, 0)), b.reshape(mean_kept, b.shape(total))


def norm(b: Builder, x: Ref, p: Number | None = 2, dims: Dims = None, keepdim: bool = False, dtype: str | None = None) -> Ref:
    """A vector norm: its op is kept (its gradient at 0 is no root's), with explicit dims and its cast apart."""
    return b.op("aten.linalg_vector_norm.default", _to(b, x, dtype), 2 if p is None else p, all_dims(b, x, dims), keepdim)


RULES: dict[str, Rule] = {
    "aten.sum.default": sum_all,
    "aten.sum.dim_IntList": sum_,
    "aten.mean.default": mean_all,
    "aten.mean.dim": mean,
    "aten.amax.default": _extreme("amax"),
    "aten.amin.default": _extreme("amin"),
    "aten.max.default": _extreme("amax"),
    "aten.min.default": _extreme("amin"),
    "aten.max.dim": with_index("max"),
    "aten.min.dim": with_index("min"),
    **dict.fromkeys(["aten.softmax.int", "aten._softmax.default"], _along("softmax.int")),
    **dict.fromkeys(["aten.log_softmax.int", "aten._log_softmax.default"], _along("log_softmax.int")),
    "aten.cumsum.default": _along("cumsum.default"),
    "aten.cumprod.default": _along("cumprod.default"),
    "aten.logsumexp.default": logsumexp,
    **dict.fromkeys(["aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim", "aten.norm.ScalarOpt_dim_dtype"], norm),
    "aten.norm.Scalar": norm,
    "aten.var.correction": var_correction,
    "aten.std.correction": std_correction,
    "aten.var_mean.correction": var_mean,
}
