"""Sample calls for every entry of the table: generated from the op's schema where the op is pointwise, written out elsewhere.

Sizes are odd and even, so that 2, 3 and 4 ranks get unequal shards somewhere: 3 heads over 2, 5 over 2, 7 over 4.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autoshard.trace.interpret import resolve
from autoshard.trace.ops.table import TABLE, jointly_linear, linear_in_first, masked_fill, pointwise, separately_linear

from .sample import Sample, noise, sample

_seed = itertools.count(1)


def f(*shape: int) -> Tensor:
    return noise(shape, next(_seed))


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(next(_seed)), dtype=torch.float64) * 0.8 + 0.1


def ints(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(next(_seed)))


def bools(*shape: int) -> Tensor:
    """About a third of them true, in no even rhythm."""
    return torch.arange(math.prod(shape)).reshape(shape) * 7 % 11 % 3 == 1


@functools.cache
def samples() -> tuple[Sample, ...]:
    """All of them, the same in every run."""
    found = [*written(), *moving(), *contracting(), *looking_up(), *over_windows(), *losses()]
    done = {s.op.target for s in found}
    found += [generated(target) for target, rule in TABLE.items() if rule in POINTWISE and target not in done]
    return tuple(found)


# ---- generated: pointwise ops ---------------------------------------------------------------------------------------

POINTWISE = (pointwise, jointly_linear, separately_linear, linear_in_first, masked_fill)
INTEGER = ("bitwise", "__", "shift")
POSITIVE = frozenset("acos asin erfinv log log10 log1p log2 logit sqrt rsqrt pow xlogy".split())
SHAPES = ((5, 4, 7), (4, 1), (7,))


def generated(target: str) -> Sample:
    """A call of a pointwise op: operands of shapes that broadcast, numbers for the rest."""
    name = target.split(".")[1]
    schema = resolve(target)._schema
    shapes = iter(SHAPES if sum("Tensor" in str(a.type) for a in schema.arguments) > 1 else SHAPES[:1])
    args: list[Any] = []
    for argument in schema.arguments:
        if argument.kwarg_only:
            break
        if "Tensor" in str(argument.type):
            args.append(_operand(name, argument.name, next(shapes)))
        elif argument.has_default_value() and name not in ("clamp", "nan_to_num"):
            break
        else:
            args.append(_number(name, argument.name, str(argument.type)))
    kwargs = {"rounding_mode": "floor"} if target.endswith("_mode") else {}
    return sample(target, *args, **kwargs)


def _operand(name: str, argument: str, shape: tuple[int, ...]) -> Tensor:
    if argument in ("condition", "mask") or name == "logical_not":
        return bools(*shape)
    if any(part in name for part in INTEGER):
        return ints(9, *shape, low=1)
    if name in POSITIVE:
        return positive(*shape)
    if name in ("isinf", "isnan", "isfinite", "nan_to_num"):
        special = torch.tensor([float("inf"), float("nan"), -float("inf"), 0.5, 1.5], dtype=torch.float64)
        return special[ints(5, *shape)]
    if name.startswith("logical") or name in ("eq", "ne"):
        return bools(*shape).double()
    return f(*shape)


def _number(name: str, argument: str, kind: str) -> Any:
    if any(part in name for part in INTEGER):
        return 2
    if name in ("eq", "ne"):
        return 1
    numbers = {"min": -0.4, "max": 0.6, "lambd": 0.3, "threshold": 0.2, "value": 0.7, "eps": 1e-3, "fill_value": 3.0, "nan": 0.1}
    return numbers.get(argument, 0.7 if "pow" not in name else 2.5)


# ---- written out ----------------------------------------------------------------------------------------------------


def written() -> Iterator[Sample]:
    yield sample("aten._to_copy.default", f(5, 4), dtype="torch.float32", frozen=(0,), note="down")
    yield sample("aten._to_copy.default", bools(5, 4), dtype="torch.float64", note="from bool")
    yield sample("aten.add.Tensor", f(5, 4, 7), f(7), note="broadcast")
    yield sample("aten.add.Tensor", f(5, 4), f(5, 4), note="same shape")
    yield sample("aten.add.Tensor", f(5, 4), ints(9, 5, 4), note="of integers")
    yield sample("aten.add.Tensor", f(5, 4), 0.5, note="of a number")
    yield sample("aten.mul.Tensor", f(5, 4, 7), f(4, 1), note="broadcast")
    yield sample("aten.mul.Tensor", f(5, 4), 0.5, note="by a number")
    yield sample("aten.div.Tensor", f(5, 4), positive(4))
    yield sample("aten.div.Tensor", ints(9, 5, 4), ints(9, 4, low=1), note="of integers")
    yield sample("aten.where.self", bools(5, 1, 7), f(5, 4, 7), f(7))
    yield sample("aten.where.ScalarOther", bools(5, 4), f(5, 4), 0.0, note="zero")
    yield sample("aten.where.ScalarOther", bools(5, 4), f(5, 4), -1.0, note="other")
    yield sample("aten.where.ScalarSelf", bools(5, 4), 0, f(5, 4), note="zero")
    yield sample("aten.where.Scalar", bools(5, 4), 1.0, 0.0)
    yield sample("aten.masked_fill.Scalar", f(5, 4), bools(5, 4), 0.0, note="zero")
    yield sample("aten.masked_fill.Scalar", f(5, 4), bools(4), -2.0, note="other")
    yield sample("aten.masked_fill.Tensor", f(5, 4), bools(4), f())
    yield sample("aten.clamp_min.Tensor", f(5, 4), f(4))
    yield sample("aten.clamp_max.Tensor", f(5, 4), f(5, 1))
    yield sample("aten.clamp.Tensor", f(5, 4), f(4) - 2, f(5, 1) + 2)
    yield sample("aten.complex.default", f(5, 4), f(5, 4))
    yield sample("aten.polar.default", positive(5, 4), f(5, 4))
    yield sample("aten.view_as_real.default", torch.complex(f(5, 4), f(5, 4)))
    yield sample("aten.view_as_complex.default", f(5, 4, 2))
    yield sample("aten.tril.default", f(5, 4, 7), 1)
    yield sample("aten.triu.default", f(5, 4, 7))
    yield sample("aten.addcmul.default", f(5, 4, 7), f(4, 1), f(7))
    yield sample("aten.addcdiv.default", f(5, 4, 7), f(4, 1), positive(7))
    yield sample("aten.lerp.Scalar", f(5, 4), f(4), 0.3)
    yield sample("aten.lerp.Tensor", f(5, 4), f(4), f(5, 1))
    yield sample("aten.prelu.default", f(5, 6, 6), f(6))
    yield sample("aten.prelu.default", f(5, 6), f(1), note="one weight")
    for dims, keep in (((0,), False), ((1, 2), True), ((0, 2), False), ((0, 1, 2), False)):
        for op in ("aten.sum.dim_IntList", "aten.mean.dim", "aten.amax.default", "aten.amin.default", "aten.logsumexp.default"):
            yield sample(op, f(5, 4, 7), dims, keep, note=f"{dims} {keep}")
    yield sample("aten.amax.default", f(5, 4, 7), (2,), True, frozen=(0,), note="no gradient")
    yield sample("aten.sum.dim_IntList", ints(9, 5, 4), (0,), False, note="of integers")
    yield sample("aten.sum.dim_IntList", bools(5, 4), (1,), False, note="of bools")
    for op in ("aten.prod.dim_int", "aten.max.dim", "aten.min.dim", "aten.mode.default"):
        yield sample(op, f(5, 4, 7), 1, False)
        yield sample(op, f(5, 4, 7), 2, True, note="keepdim")
    yield sample("aten.argmax.default", f(5, 4, 7), 1, False)
    yield sample("aten.argmax.default", f(5, 4), None, False, note="of all")
    yield sample("aten.any.dim", ints(9, 5, 4, 7) == 0, 1, False)
    yield sample("aten.all.dim", ints(9, 5, 4, 7) != 0, 1, False)
    for op in ("aten.var.correction", "aten.std.correction"):
        yield sample(op, f(5, 4, 7), (1,), correction=1)
        yield sample(op, f(5, 4, 7), (0, 2), correction=0, keepdim=True, note="keepdim")
    along = "softmax.int log_softmax.int cumsum.default cumprod.default logcumsumexp.default"
    for op in (f"aten.{name}" for name in along.split()):
        yield sample(op, f(5, 4, 7), -1)
        yield sample(op, f(5, 4, 7), 1, note="middle")
    for op in ("aten._softmax.default", "aten._log_softmax.default"):
        yield sample(op, f(5, 4, 7), 1, False)
    for op in ("aten.sort.default", "aten.argsort.default"):
        yield sample(op, f(5, 4, 7), 1)
        yield sample(op, f(5, 4), note="by default")
    yield sample("aten.flip.default", f(5, 4, 7), (0, 2))
    yield sample("aten.roll.default", f(5, 4, 7), (2,), (1,))
    yield sample("aten.roll.default", f(5, 4), (2,), note="flattened")
    yield sample("aten._fft_c2c.default", torch.complex(f(5, 4, 7), f(5, 4, 7)), (1,), 0, True)
    yield sample("aten._fft_r2c.default", f(5, 4, 7), (2,), 0, True)
    yield sample("aten.topk.default", f(5, 4, 7), 3)
    yield sample("aten.topk.default", f(5, 4, 7), 2, 1, note="middle")
    yield sample("aten.layer_norm.default", f(5, 4, 7), (7,), f(7), f(7), 1e-5)
    yield sample("aten.layer_norm.default", f(5, 4, 7), (4, 7), f(4, 7), note="two dims, no bias")
    yield sample("aten.rms_norm.default", f(5, 4, 7), (7,), f(7), 1e-5)
    yield sample("aten._fused_rms_norm.default", f(5, 4, 7), (7,), f(7), 1e-5, frozen=(0, 1))
    yield sample("autoshard.dropout_mask.default", (5, 4, 7), 0.5, "torch.float64", 0, (28, 7, 1))
    yield sample("autoshard.time_slice.default", f(8, 5), 0, "S(0)", 8, microbatches=2)
    yield sample("autoshard.time_mask.default", f(8, 5), microbatches=2)
    yield sample("aten.constant_pad_nd.default", f(5, 4, 7), (1, 2))
    yield sample("aten.constant_pad_nd.default", f(5, 4, 7), (0, 0, 1, 0), 2.0, note="with a number")
    yield sample("aten.pad.default", f(5, 4, 7), (1, 2), "reflect")


def moving() -> Iterator[Sample]:
    """Ops that move elements; "fused" ones are cut by their neighbours' segments."""
    reshape = "aten.reshape.default"
    shapes = [
        ((5, 12), (5, 3, 4)), ((5, 3, 4), (5, 12)), ((4, 6, 8), (24, 2, 4)), ((5, 1, 8), (5, 8)), ((6, 4), (4, 6)), ((2, 3, 5), (30,)),
        ((5, 16), (5, 2, 4, 2)), ((6, 10), (3, 2, 2, 5)), ((12,), (12, 1)), ((9, 4), (3, 12)),
    ]  # fmt: skip
    for a, b in shapes:
        yield sample(reshape, f(*a), b, note=f"{a} {b}")
    yield sample("aten.permute.default", f(5, 4, 7), (2, 0, 1))
    yield sample("aten.permute.default", ints(9, 5, 4), (1, 0), note="of integers")
    yield sample("aten.expand.default", f(1, 4, 1), (5, 4, 7))
    yield sample("aten.expand.default", f(4, 1), (5, 4, 7), note="new dim")
    yield sample("aten.slice.Tensor", f(5, 16), 1, 4, 12, 1)
    yield sample("aten.slice.Tensor", f(5, 16), 1, 0, 8, 1, note="first half")
    yield sample("aten.slice.Tensor", f(5, 16), 1, 0, 16, 2, note="every other")
    yield sample("aten.slice.Tensor", f(5, 16), 0, 0, 5, 1, note="all")
    yield sample("aten.cat.default", (f(5, 8), f(5, 4), f(5, 4)), 1)
    yield sample("aten.cat.default", (f(5, 7), f(3, 7)), 0, note="rows")
    yield sample("aten.split_with_sizes.default", f(5, 16), (8, 4, 4), 1)
    yield sample("aten.split_with_sizes.default", f(5, 3, 8), (4, 4), 2, note="halves")
    yield sample("aten.split_with_sizes.default", f(9, 4), (5, 3, 1), 0, note="rows")


def contracting() -> Iterator[Sample]:
    yield sample("aten.linear.default", f(5, 4, 6), f(7, 6))
    yield sample("aten.mm.default", f(5, 6), f(6, 7))
    yield sample("aten.bmm.default", f(3, 5, 6), f(3, 6, 7))
    shapes = [
        ((5, 6), (6, 7)),
        ((3, 5, 4, 6), (6, 7)),
        ((3, 5, 4, 6), (3, 5, 6, 7)),
        ((5, 4, 6), (1, 6, 7)),
        ((6,), (6, 7)),
        ((5, 6), (6,)),
    ]
    for a, b in shapes:
        yield sample("aten.matmul.default", f(*a), f(*b), note=f"{a} {b}")
    for equation, *ops in (("bshe,bthe->bhst", (3, 5, 3, 4), (3, 6, 3, 4)), ("ab,bc,c->a", (5, 4), (4, 7), (7,)), ("bij->bji", (3, 4, 5))):
        yield sample("aten.einsum.default", equation, tuple(f(*shape) for shape in ops), note=equation)
    for h, g, e, v in ((4, 4, 3, 5), (6, 3, 4, 4), (5, 1, 2, 2), (3, 3, 4, 4)):
        yield sample("autoshard.attention.default", f(3, h, 5, e), f(3, g, 7, e), f(3, g, 7, v), None, False, 0.5, note=f"{h} on {g}")
    q, k, v = f(3, 6, 5, 4), f(3, 3, 5, 4), f(3, 3, 5, 4)
    yield sample("autoshard.attention.default", q, k, v, None, True, 0.5, note="causal")
    for shape in ((1, 1, 5, 5), (3, 6, 5, 5), (3, 1, 1, 5), (1, 6, 5, 5)):
        yield sample("autoshard.attention.default", q, k, v, f(*shape), False, 0.5, frozen=(3,), note=f"mask {shape}")
    yield sample("autoshard.experts.default", f(9, 4), f(6, 5, 4), ints(6, 9))
    yield sample("autoshard.experts.default", f(8, 6), f(5, 4, 6), ints(7, 8, low=-2), note="rows that choose none")
    bias = f(6)
    yield sample("aten.conv1d.default", f(5, 4, 9), f(6, 4, 3), bias, (1,), (1,))
    yield sample("aten.conv1d.default", f(5, 4, 9), f(6, 4, 3), None, (1,), (1,), note="no bias")
    yield sample("aten.conv1d.default", f(5, 6, 9), f(6, 1, 3), bias, (1,), (2,), (1,), 6, note="depthwise")
    yield sample("aten.conv1d.default", f(5, 6, 9), f(9, 2, 3), None, (1,), (2,), (1,), 3, note="grouped")
    yield sample("aten.conv1d.default", f(4, 9), f(6, 4, 3), note="one example")
    yield sample("aten.conv2d.default", f(3, 4, 6, 6), f(6, 4, 2, 2), bias, (2, 2))
    yield sample("aten.conv3d.default", f(3, 2, 4, 4, 4), f(5, 2, 2, 2, 2))
    yield sample("aten.convolution.default", f(5, 4, 9), f(6, 4, 3), bias, (1,), (1,), (1,), False, (0,), 1)
    yield sample("aten.convolution.default", f(5, 6, 9), f(6, 1, 3), None, (1,), (1,), (1,), False, (0,), 6, note="depthwise")
    yield sample("aten.convolution.default", f(5, 4, 9), f(4, 6, 3), None, (1,), (1,), (1,), True, (0,), 1, note="transposed")
    yield sample("aten.einsum.default", "...i,ij->...j", (f(3, 5, 4), f(4, 7)), note="ellipsis")


def over_windows() -> Iterator[Sample]:
    """Pooling, interpolation, unfolding: images of 3 examples and 5 channels."""
    image, line, solid = f(3, 5, 6, 4), f(3, 5, 6), f(3, 2, 4, 4, 2)
    yield sample("aten.im2col.default", image, (2, 2), (1, 1), (0, 0), (2, 1))
    yield sample("aten.im2col.default", f(5, 6, 4), (2, 2), (1, 1), (0, 0), (2, 1), note="one example")
    yield sample("aten.col2im.default", f(3, 20, 6), (6, 4), (2, 2), (1, 1), (0, 0), (2, 2))
    yield sample("aten.col2im.default", f(20, 6), (6, 4), (2, 2), (1, 1), (0, 0), (2, 2), note="one example")
    yield sample("aten.unfold.default", image, 2, 3, 1)
    yield sample("aten.avg_pool1d.default", line, (2,))
    yield sample("aten.avg_pool2d.default", image, (2, 2), (1, 1), (1, 1))
    yield sample("aten.avg_pool3d.default", solid, (2, 2, 2))
    for x, size in ((line, (3,)), (image, (3, 2)), (solid, (2, 2, 1))):
        yield sample(f"aten.adaptive_avg_pool{len(size)}d.default", x, size)
    yield sample("aten._adaptive_avg_pool2d.default", image, (3, 2))
    yield sample("aten._adaptive_avg_pool3d.default", solid, (2, 2, 1))
    yield sample("aten.max_pool2d_with_indices.default", image, (2, 2))
    yield sample("aten.max_pool3d_with_indices.default", solid, (2, 2, 2))
    yield sample("aten.adaptive_max_pool2d.default", image, (3, 2))
    yield sample("aten.adaptive_max_pool3d.default", solid, (2, 2, 1))
    for name in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"):
        yield sample(f"aten.{name}.vec", image, (9, 3), False, None)
    yield sample("aten.upsample_nearest2d.vec", image, (9, 3), None)
    yield sample("aten.upsample_nearest1d.vec", line, (9,), None)
    yield sample("aten.upsample_nearest3d.vec", solid, (3, 5, 2), None)
    yield sample("aten.upsample_linear1d.vec", line, (9,), False, None)
    yield sample("aten.upsample_trilinear3d.vec", solid, (3, 5, 2), False, None)


def losses() -> Iterator[Sample]:
    """Of each element: reduction 0."""
    for name in ("mse_loss", "smooth_l1_loss", "huber_loss"):
        yield sample(f"aten.{name}.default", f(5, 4, 7), f(5, 4, 7), 0)
    yield sample("aten.soft_margin_loss.default", f(5, 4), f(5, 4), 0, frozen=(1,))
    yield sample("aten.binary_cross_entropy.default", positive(5, 4), positive(5, 4), None, 0, frozen=(1,))
    yield sample("aten.binary_cross_entropy_with_logits.default", f(5, 4), positive(5, 4), None, positive(4), 0, frozen=(1, 2))


def looking_up() -> Iterator[Sample]:
    for dim in (0, 1):
        yield sample("aten.scatter.value", f(5, 6, 7), dim, ints(5, 5, 6, 7), 0.5, note=f"{dim}")
        yield sample("aten.scatter_add.default", f(5, 6, 7), dim, ints(5, 5, 6, 7), f(5, 6, 7), note=f"{dim}")
    yield sample("aten.scatter.src", f(5, 6, 7), 1, torch.argsort(f(5, 6, 7), 1)[:, :4], f(5, 4, 7), note="fewer")
    yield sample("aten.index_add.default", f(5, 6, 7), 1, ints(6, 4), f(5, 4, 7))
    yield sample("aten.slice_scatter.default", f(5, 6, 7), f(5, 3, 7), 1, 2, 5, 1)
    yield sample("aten.slice_scatter.default", ints(9, 5, 6), ints(9, 5, 5), 1, 1, 6, 1, note="of integers")
    for dims, keep in (((1,), True), ((0, 2), False)):
        yield sample("aten.linalg_vector_norm.default", f(5, 4, 7), 2, dims, keep, note=f"{dims} {keep}")
    yield sample("aten.embedding.default", f(12, 5), ints(12, 3, 7))
    yield sample("autoshard.pick.default", f(5, 3, 12), ints(16, 5, 3, low=-4))
    yield sample("aten.gather.default", f(5, 4, 7), 1, ints(4, 5, 6, 7))
    yield sample("aten.gather.default", f(9), 0, ints(9, 5), note="one dim")
    yield sample("aten.gather.default", f(5, 4), 1, ints(4, 3, 4), note="fewer rows")
    yield sample("aten.index_select.default", f(5, 4, 7), 1, ints(4, 6))
    yield sample("aten.index.Tensor", f(9, 4), (ints(9, 5, 3),), note="first dim")
    yield sample("aten.index.Tensor", f(5, 9, 4), (None, ints(9, 6)), note="middle dim")
    yield sample("aten.index.Tensor", f(5, 9, 4), (ints(5, 6, 1), ints(9, 3)), note="two dims")
    yield sample("aten.index.Tensor", f(5, 4, 7), (ints(5, 6), None, ints(7, 6)), note="scattered")
    yield sample("aten.index.Tensor", ints(9, 9, 4), (ints(9, 5),), note="of integers")
