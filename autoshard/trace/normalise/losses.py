"""Cross entropy as primitives over the class dim, so that a vocabulary may be cut: max, shifted exponentials, their sum, and `pick`.

    m = amax(detach(x));  z = x - m;  lse = log(sum(exp(z)));  loss = where(labels != ignore, lse - pick(z, labels), 0)

The mean's divisor is a chain of its own that depends on labels only. Losses of single elements keep their op, without its reduction.
"""

from __future__ import annotations

from typing import Any

from ...errors import CaptureError
from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..graph import Ref
from .norms import wide

ADD, SUB, MUL, DIV = "aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor"
SUM = "aten.sum.dim_IntList"
NONE, MEAN, TOTAL = 0, 1, 2  # aten's codes for `reduction`


def losses(captured: Captured) -> Captured:
    """Spell cross entropy and negative log likelihood in primitives, and every reduction of a loss as one."""
    return rewrite(captured, RULES)


def cross_entropy(
    b: Builder, x: Ref, target: Ref, weight: Ref | None = None, reduction: int = MEAN, ignore: int = -100, smoothing: float = 0.0
) -> Ref:
    dtype = b.dtype(x)
    z, lse = shifted(b, b.to(_classes_last(b, x), wide(dtype)))
    weight = b.to(weight, wide(dtype)) if weight is not None else None
    if b.value(target).tensor.floating:
        loss = _with_probabilities(b, z, lse, b.to(_classes_last(b, target), wide(dtype)), weight, reduction, smoothing)
    else:
        loss = _with_labels(b, z, lse, target, weight, reduction, ignore, smoothing)
    return b.to(loss, dtype)


def nll(b: Builder, x: Ref, target: Ref, weight: Ref | None = None, reduction: int = MEAN, ignore: int = -100) -> Ref:
    """x holds log probabilities."""
    z = _classes_last(b, x)
    if weight is not None and b.dtype(weight) != b.dtype(z):
        raise CaptureError("nll_loss with a weight of another dtype", where=b.at.source if b.at else "", hint="cast the weight")
    return _with_labels(b, z, None, target, weight, reduction, ignore, 0.0)


def nll_forward(b: Builder, x: Ref, target: Ref, weight: Ref | None, reduction: int, ignore: int) -> tuple[Ref | None, ...]:
    return nll(b, x, target, weight, reduction, ignore), None


def shifted(b: Builder, x: Ref) -> tuple[Ref, Ref]:
    """z = x - max(x) and log(sum(exp(z))) over the last dim; the max carries no gradient, which cancels."""
    last = b.ndim(x) - 1
    top = b.op("aten.amax.default", b.op("aten.detach.default", x) if b.grad(x) else x, (last,), True)
    z = b.op(SUB, x, top)
    return z, b.op("aten.log.default", b.op(SUM, b.op("aten.exp.default", z), (last,), False))


def _classes_last(b: Builder, x: Ref) -> Ref:
    n = b.ndim(x)
    return b.permute(x, (0, *range(2, n), 1)) if n > 2 else x


def _with_labels(
    b: Builder, z: Ref, lse: Ref | None, labels: Ref, weight: Ref | None, reduction: int, ignore: int, smoothing: float
) -> Ref:
    keep = b.op("aten.ne.Scalar", labels, ignore)
    found = b.op("autoshard.pick.default", z, labels)
    loss = b.op("aten.neg.default", found) if lse is None else b.op(SUB, lse, found)
    rows = (*b.shape(labels), b.shape(z)[-1])
    per_row = b.op("autoshard.pick.default", b.expand(weight, rows), labels) if weight is not None else None
    if per_row is not None:
        loss = b.op(MUL, loss, per_row)
    if smoothing > 0:
        assert lse is not None
        loss = _smooth(b, loss, z, lse, weight, smoothing)
    loss = b.op("aten.where.ScalarOther", keep, loss, 0.0)
    if reduction == NONE:
        return loss
    dims = tuple(range(b.ndim(labels)))
    total = b.op(SUM, loss, dims, False) if dims else loss
    if reduction == TOTAL:
        return total
    counted = keep if per_row is None else b.op("aten.where.ScalarOther", keep, per_row, 0.0)
    count = b.op(SUM, counted, dims, False) if dims else counted
    return b.op(DIV, total, b.to(count, b.dtype(total)))


def _smooth(b: Builder, loss: Ref, z: Ref, lse: Ref, weight: Ref | None, smoothing: float) -> Ref:
    """(1 - ε) · loss + ε / V · Σ_v w_v (lse - z_v)"""
    classes = b.shape(z)[-1]
    if weight is None:
        total = b.op(SUB, b.op(MUL, lse, classes), b.op(SUM, z, (b.ndim(z) - 1,), False))
    else:
        total = b.op(SUM, b.op(MUL, b.op(SUB, b.unsqueeze(lse, -1), z), weight), (b.ndim(z) - 1,), False)
    return b.op(ADD, b.op(MUL, loss, 1 - smoothing), b.op(MUL, total, smoothing / classes))


def _with_probabilities(b: Builder, z: Ref, lse: Ref, target: Ref, weight: Ref | None, reduction: int, smoothing: float) -> Ref:
    if smoothing > 0:
        target = b.op(ADD, b.op(MUL, target, 1 - smoothing), smoothing / b.shape(z)[-1])
    terms = b.op(MUL, b.op(SUB, b.unsqueeze(lse, -1), z), target)
    terms = terms if weight is None else b.op(MUL, terms, weight)
    loss = b.op(SUM, terms, (b.ndim(z) - 1,), False)
    dims = tuple(range(b.ndim(loss)))
    if reduction == NONE or not dims:
        return loss
    total = b.op(SUM, loss, dims, False)
    rows = 1
    for size in b.shape(loss):
        rows *= size
    return total if reduction == TOTAL else b.op(DIV, total, rows)


def _elementwise(target: str, at: int) -> Rule:
    """A loss of each element and its target: the op without a reduction (its argument `at`), then the reduction."""

    def rule(b: Builder, *args: Any, **kwargs: Any) -> Ref:
        names = ("reduction", "beta", "delta")
        args = (*args, *(None,) * (at - len(args)))  # what a call leaves out before it is a weight
        reduction, rest = (args[at] if len(args) > at else kwargs.pop("reduction", MEAN)), args[at + 1 :]
        rest += tuple(kwargs.pop(name) for name in names if name in kwargs)
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        loss = b.op(target, *args[:at], NONE, *rest, **kwargs)
        dims = tuple(range(b.ndim(loss)))
        if reduction == NONE or not dims:
            return loss
        return b.op(SUM if reduction == TOTAL else "aten.mean.dim", loss, dims, False)

    return rule


ELEMENTWISE = {"mse_loss": 2, "smooth_l1_loss": 2, "huber_loss": 2, "soft_margin_loss": 2, "binary_cross_entropy": 3,
               "binary_cross_entropy_with_logits": 4}  # fmt: skip
"""Where each takes its reduction."""

RULES: dict[str, Rule] = {
    "aten.cross_entropy_loss.default": cross_entropy,
    **dict.fromkeys(["aten.nll_loss_nd.default", "aten.nll_loss.default"], nll),
    **dict.fromkeys(["aten.nll_loss_forward.default", "aten.nll_loss2d_forward.default"], nll_forward),
    **{f"aten.{name}.default": _elementwise(f"aten.{name}.default", at) for name, at in ELEMENTWISE.items()},
}
