"""Dropout becomes a multiplication by `autoshard.dropout_mask`, a source of randomness without tensor inputs; so do rand, randn and kin."""

from __future__ import annotations

from typing import Any

from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..draws import RANDOM
from ..graph import Ref


def dropout(captured: Captured) -> Captured:
    """Spell dropout and every other draw in the normal form."""
    rules: dict[str, Rule] = dict.fromkeys(RANDOM, drawn)
    return rewrite(captured, rules | {"aten.native_dropout.default": native_dropout, "aten.dropout.default": plain_dropout})


def drawn(b: Builder, *args: Any, draw: int | None = None, **kwargs: Any) -> Any:
    """What the model draws by a law that draws.py knows; a draw of 0 or 1 is a mask of dropout without its scale."""
    found = None if draw is None else b.old.draw(draw)
    if found is None or found.target != "autoshard.dropout_mask.default":
        return NotImplemented
    target, (shape, law, *rest) = found.target, found.args
    noise = b.op(target, shape, law, *rest)
    return noise if isinstance(law, tuple) else b.op("aten.mul.Tensor", noise, 1 - law)


def native_dropout(b: Builder, x: Ref, p: float, train: bool | None, *, draw: int | None = None) -> tuple[Ref, Ref | None]:
    """The output; the boolean mask output is None unless training (and then unused outside backward)."""
    if draw is None:
        return (b.op("aten.mul.Tensor", x, 0.0) if train and p >= 1 else x), None
    noise = b.old.draw(draw)
    return b.op("aten.mul.Tensor", x, b.op(noise.target, *noise.args)), None


def plain_dropout(b: Builder, x: Ref, p: float, train: bool) -> Ref:
    assert not train or p <= 0, "functionalisation leaves no active dropout"
    return x
