"""Pointwise ops and factories: one spelling each; alpha becomes a mul, `fill`, `zeros`, `ones_like`, … become `full`, ranges `arange`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..graph import Ref

Number = bool | int | float


def pointwise(captured: Captured) -> Captured:
    """Spell pointwise ops and factories in the normal form."""
    return rewrite(captured, RULES)


def _identity(b: Builder, x: Any, y: Any, neutral: Number) -> bool:
    """Whether `x op y` is x itself: y is the op's neutral number, and the result has x's dtype."""
    return isinstance(x, Ref) and not isinstance(y, Ref) and y == neutral and b.dtype(x) == _out_dtype(b)


def _scaled(target: str) -> Rule:
    def rule(b: Builder, x: Ref, y: Any, alpha: Number = 1) -> Any:
        if _identity(b, x, y, 0):
            return x
        if alpha != 1:
            y = b.op("aten.mul.Tensor", y, alpha) if isinstance(y, Ref) else y * alpha
        return b.op(target, x, y)

    return rule


def _reversed(b: Builder, x: Ref, y: Any, alpha: Number = 1) -> Ref:
    """y - alpha · x"""
    x = x if alpha == 1 else b.op("aten.mul.Tensor", x, alpha)
    if isinstance(y, Ref):
        return b.op("aten.sub.Tensor", y, x)
    return b.op("aten.add.Tensor", b.op("aten.neg.default", x), y)


def _renamed(target: str) -> Rule:
    def rule(b: Builder, *args: Any, **kwargs: Any) -> Any:
        return b.op(target, *args, **kwargs)

    return rule


def _times(target: str) -> Rule:
    def rule(b: Builder, x: Any, y: Any, **kwargs: Any) -> Any:
        if not kwargs and _identity(b, x, y, 1):
            return x
        return b.op(target, x, y, **kwargs)

    return rule


def full(b: Builder, shape: Sequence[int], value: Number, dtype: str) -> Ref:
    return b.op("aten.full.default", tuple(shape), value, dtype=f"torch.{dtype.removeprefix('torch.')}")


def _out_dtype(b: Builder) -> str:
    """The dtype that the op being rewritten gave (its default depends on the process)."""
    assert b.at is not None
    return b.old.graph.values[b.at.outs[0]].tensor.dtype


def _filled(value: Number) -> Rule:
    def rule(b: Builder, shape: Sequence[int], **kwargs: Any) -> Ref:
        return full(b, shape, value, _out_dtype(b))

    return rule


def _filled_like(value: Number) -> Rule:
    def rule(b: Builder, x: Ref, shape: Sequence[int] | None = None, **kwargs: Any) -> Ref:
        return full(b, b.shape(x) if shape is None else shape, value, _out_dtype(b))

    return rule


def full_(b: Builder, shape: Sequence[int], value: Number, **kwargs: Any) -> Ref:
    return full(b, shape, value, _out_dtype(b))


def full_like(b: Builder, x: Ref, value: Number, **kwargs: Any) -> Ref:
    return full(b, b.shape(x), value, _out_dtype(b))


def new_full(b: Builder, x: Ref, shape: Sequence[int], value: Number, **kwargs: Any) -> Ref:
    return full(b, shape, value, _out_dtype(b))


def fill_tensor(b: Builder, x: Ref, value: Ref) -> Ref:
    return b.expand(b.to(value, b.dtype(x)), b.shape(x))


def scalar_tensor(b: Builder, value: Number, **kwargs: Any) -> Ref:
    return full(b, (), value, _out_dtype(b))


def arange_end(b: Builder, end: Number, **kwargs: Any) -> Ref:
    return arange(b, 0, end, 1)


def arange(b: Builder, start: Number, end: Number, step: Number = 1, **kwargs: Any) -> Ref:
    return b.op("aten.arange.start_step", start, end, step, dtype=f"torch.{_out_dtype(b)}")


def masked_fill(b: Builder, x: Ref, mask: Ref, value: Any) -> Any:
    if isinstance(value, Ref):
        return b.op("aten.where.self", mask, b.to(value, b.dtype(x)), x)
    return NotImplemented


def log_sigmoid(b: Builder, x: Ref) -> tuple[Ref, None]:
    """The output; the buffer for its backward is nobody's."""
    return b.op("aten.log_sigmoid.default", x), None


def glu(b: Builder, x: Ref, dim: int = -1) -> Ref:
    """The first half along dim times the sigmoid of the second."""
    dim %= b.ndim(x)
    half = b.shape(x)[dim] // 2
    left, right = b.op("aten.split_with_sizes.default", x, (half, half), dim)
    return b.op("aten.mul.Tensor", left, b.op("aten.sigmoid.default", right))


def index(b: Builder, x: Ref, indices: Sequence[Ref | None]) -> Ref:
    """An index that promises to be in range."""
    return b.op("aten.index.Tensor", x, tuple(indices))


RULES: dict[str, Rule] = {
    "aten.add.Tensor": _scaled("aten.add.Tensor"),
    "aten.add.Scalar": _scaled("aten.add.Tensor"),
    "aten.sub.Tensor": _scaled("aten.sub.Tensor"),
    "aten.sub.Scalar": _scaled("aten.sub.Tensor"),
    "aten.rsub.Scalar": _reversed,
    "aten.rsub.Tensor": _reversed,
    **dict.fromkeys(["aten.mul.Tensor", "aten.mul.Scalar"], _times("aten.mul.Tensor")),
    **dict.fromkeys(["aten.div.Tensor", "aten.div.Scalar"], _times("aten.div.Tensor")),
    **{f"aten.__{n}__.{o}": _renamed(f"aten.bitwise_{n}.{o}") for n in ("and", "or", "xor") for o in ("Tensor", "Scalar")},
    "aten.masked_fill.Tensor": masked_fill,
    "aten.glu.default": glu,
    "aten._unsafe_index.Tensor": index,
    "aten.log_sigmoid_forward.default": log_sigmoid,
    **dict.fromkeys(["aten.zeros.default", "aten.empty.memory_format"], _filled(0)),
    "aten.ones.default": _filled(1),
    **dict.fromkeys(
        ["aten.zeros_like.default", "aten.new_zeros.default", "aten.empty_like.default", "aten.new_empty.default"], _filled_like(0)
    ),
    **dict.fromkeys(["aten.ones_like.default", "aten.new_ones.default"], _filled_like(1)),
    "aten.full.default": full_,
    "aten.full_like.default": full_like,
    "aten.fill.Scalar": full_like,
    "aten.fill.Tensor": fill_tensor,
    "aten.new_full.default": new_full,
    "aten.scalar_tensor.default": scalar_tensor,
    "aten.arange.default": arange_end,
    "aten.arange.start": arange,
    "aten.arange.start_step": arange,
}
