"""Dropout becomes a multiplication by `autoshard.dropout_mask`, a source of randomness without tensor inputs."""

from __future__ import annotations

from ..build import Builder, rewrite
from ..captured import Captured
from ..graph import Ref


def dropout(captured: Captured) -> Captured:
    """Spell dropout in the normal form."""
    return rewrite(captured, {"aten.native_dropout.default": native_dropout, "aten.dropout.default": plain_dropout})


def native_dropout(b: Builder, x: Ref, p: float, train: bool | None, *, draw: int | None = None) -> tuple[Ref, Ref | None]:
    """The output; the boolean mask output is None unless training (and then unused outside backward)."""
    if draw is None:
        return (b.op("aten.mul.Tensor", x, 0.0) if train and p >= 1 else x), None
    noise = b.old.draws[draw]
    return b.op("aten.mul.Tensor", x, b.op(noise.target, *noise.args)), None


def plain_dropout(b: Builder, x: Ref, p: float, train: bool) -> Ref:
    assert not train or p <= 0, "functionalisation leaves no active dropout"
    return x
