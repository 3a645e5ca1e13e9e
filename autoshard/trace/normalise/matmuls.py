"""Matrix products: `linear` without bias, `mm`, `bmm`, `matmul`, `einsum`; biases, alpha and beta become ordinary mul and add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..graph import Ref

ADD, MUL = "aten.add.Tensor", "aten.mul.Tensor"


def matmuls(captured: Captured) -> Captured:
    """Spell every matrix product in the normal form."""
    return rewrite(captured, RULES)


def linear(b: Builder, x: Ref, w: Ref, bias: Ref | None = None) -> Ref:
    y = b.op("aten.linear.default", x, w)
    return y if bias is None else b.op(ADD, y, bias)


def _plus(b: Builder, y: Ref, bias: Ref, beta: float, alpha: float) -> Ref:
    """beta · bias + alpha · y"""
    y = y if alpha == 1 else b.op(MUL, y, alpha)
    if beta == 0:
        return y
    return b.op(ADD, y, bias if beta == 1 else b.op(MUL, bias, beta))


def addmm(b: Builder, bias: Ref, x: Ref, w: Ref, beta: float = 1, alpha: float = 1) -> Ref:
    return _plus(b, mm(b, x, w), bias, beta, alpha)


def baddbmm(b: Builder, bias: Ref, x: Ref, y: Ref, beta: float = 1, alpha: float = 1) -> Ref:
    return _plus(b, b.op("aten.bmm.default", x, y), bias, beta, alpha)


def addbmm(b: Builder, bias: Ref, x: Ref, y: Ref, beta: float = 1, alpha: float = 1) -> Ref:
    return _plus(b, b.op("aten.sum.dim_IntList", b.op("aten.bmm.default", x, y), (0,), False), bias, beta, alpha)


def mv(b: Builder, x: Ref, y: Ref) -> Ref:
    return b.op("aten.matmul.default", x, y)


def addmv(b: Builder, bias: Ref, x: Ref, y: Ref, beta: float = 1, alpha: float = 1) -> Ref:
    return _plus(b, mv(b, x, y), bias, beta, alpha)


def vdot(b: Builder, x: Ref, y: Ref) -> Any:
    return NotImplemented if b.dtype(x).startswith("complex") else dot(b, x, y)


def dot(b: Builder, x: Ref, y: Ref) -> Ref:
    return b.op("aten.sum.dim_IntList", b.op(MUL, x, y), (0,), False)


def outer(b: Builder, x: Ref, y: Ref) -> Ref:
    return b.op(MUL, b.unsqueeze(x, 1), y)


def matmul(b: Builder, x: Ref, y: Ref) -> Any:
    return dot(b, x, y) if b.ndim(x) == b.ndim(y) == 1 else _product(b, "aten.matmul.default", x, y)


def mm(b: Builder, x: Ref, y: Ref) -> Ref:
    return _product(b, "aten.mm.default", x, y)


def _product(b: Builder, target: str, x: Ref, y: Ref) -> Ref:
    """x @ y, as a linear where y is a transposed matrix."""
    turned = b.made_by(y, "aten.permute.default")
    if turned is not None and turned.args[1] == (1, 0) and b.ndim(x) > 1:
        return b.op("aten.linear.default", x, turned.args[0])
    return b.op(target, x, y)


def einsum(b: Builder, equation: str, operands: Sequence[Ref], path: None = None) -> Ref:
    """With its output spelled out: an ellipsis first, then in alphabetical order what stands once."""
    equation = equation.replace(" ", "")
    if "->" not in equation:
        letters = [c for c in equation if c.isalpha()]
        equation += "->" + "..." * ("..." in equation) + "".join(sorted(c for c in letters if letters.count(c) == 1))
    return b.op("aten.einsum.default", equation, tuple(operands))


RULES: dict[str, Rule] = {
    "aten.linear.default": linear,
    "aten.mm.default": mm,
    "aten.addmm.default": addmm,
    "aten.baddbmm.default": baddbmm,
    "aten.addbmm.default": addbmm,
    "aten.mv.default": mv,
    "aten.addmv.default": addmv,
    "aten.dot.default": dot,
    "aten.vdot.default": vdot,
    "aten.outer.default": outer,
    "aten.matmul.default": matmul,
    "aten.einsum.default": einsum,
}
