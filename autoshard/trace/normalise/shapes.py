"""Views and copies: everything that only renames elements becomes reshape, permute, expand, slice, split or cat; identities vanish.

A rule takes the builder and the op's own arguments, emits, and returns the result's Ref. See `build.rewrite`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import CaptureError
from ..build import Builder, Rule, rewrite
from ..captured import Captured
from ..graph import Ref


def shapes(captured: Captured) -> Captured:
    """Spell every shape op in the normal form."""
    return rewrite(captured, RULES)


def reshape(b: Builder, x: Ref, shape: Sequence[int]) -> Ref:
    return b.reshape(x, shape)


def view_dtype(b: Builder, x: Ref, dtype: str) -> Any:
    return NotImplemented


def like_other(b: Builder, x: Ref, other: Ref) -> Ref:
    return b.reshape(x, b.shape(other))


def flatten(b: Builder, x: Ref, start: int = 0, end: int = -1) -> Ref:
    shape = b.shape(x)
    if not shape:
        return b.reshape(x, (1,))
    start, end = start % len(shape), end % len(shape)
    return b.reshape(x, (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))


def unflatten(b: Builder, x: Ref, dim: int, sizes: Sequence[int]) -> Ref:
    shape = b.shape(x)
    dim %= len(shape)
    known = math.prod(s for s in sizes if s != -1)
    return b.reshape(x, (*shape[:dim], *(shape[dim] // max(known, 1) if s == -1 else s for s in sizes), *shape[dim + 1 :]))


def unsqueeze(b: Builder, x: Ref, dim: int) -> Ref:
    return b.unsqueeze(x, dim)


def squeeze(b: Builder, x: Ref, dim: int | Sequence[int] | None = None) -> Ref:
    shape = b.shape(x)
    dims = range(len(shape)) if dim is None else [d % max(len(shape), 1) for d in ((dim,) if isinstance(dim, int) else dim)]
    return b.reshape(x, tuple(s for i, s in enumerate(shape) if not (i in dims and s == 1)))


def transpose(b: Builder, x: Ref, dim0: int = 0, dim1: int = 1) -> Ref:
    dims = list(range(b.ndim(x)))
    if len(dims) > 1:
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return b.permute(x, dims)


def transpose_last(b: Builder, x: Ref) -> Ref:
    return transpose(b, x, -2, -1)


def permute(b: Builder, x: Ref, dims: Sequence[int]) -> Ref:
    return b.permute(x, dims)


def reverse_dims(b: Builder, x: Ref) -> Ref:
    return b.permute(x, tuple(reversed(range(b.ndim(x)))))


def movedim(b: Builder, x: Ref, source: int | Sequence[int], target: int | Sequence[int]) -> Ref:
    n = b.ndim(x)
    sources = [d % n for d in ((source,) if isinstance(source, int) else source)]
    targets = [d % n for d in ((target,) if isinstance(target, int) else target)]
    rest = iter(d for d in range(n) if d not in sources)
    return b.permute(x, [sources[targets.index(i)] if i in targets else next(rest) for i in range(n)])


def expand(b: Builder, x: Ref, shape: Sequence[int], implicit: bool = False) -> Ref:
    return b.expand(x, shape)


def expand_as(b: Builder, x: Ref, other: Ref) -> Ref:
    return b.expand(x, b.shape(other))


def broadcast_tensors(b: Builder, tensors: Sequence[Ref]) -> tuple[Ref, ...]:
    shape = torch.broadcast_shapes(*(b.shape(x) for x in tensors))
    return tuple(b.expand(x, shape) for x in tensors)


def slice_(b: Builder, x: Ref, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Ref:
    return b.slice(x, dim, start, end, step)


def narrow(b: Builder, x: Ref, dim: int, start: int, length: int) -> Ref:
    start %= max(b.shape(x)[dim], 1) if start < 0 else start + 1
    return b.slice(x, dim, start, start + length)


def select(b: Builder, x: Ref, dim: int, index: int) -> Ref:
    shape = b.shape(x)
    dim %= len(shape)
    index %= shape[dim]
    return b.reshape(b.slice(x, dim, index, index + 1), shape[:dim] + shape[dim + 1 :])


def split_sizes(b: Builder, x: Ref, sizes: Sequence[int], dim: int = 0) -> tuple[Ref, ...]:
    dim %= b.ndim(x)
    return (x,) if len(sizes) == 1 else b.op("aten.split_with_sizes.default", x, tuple(sizes), dim)


def split(b: Builder, x: Ref, size: int, dim: int = 0) -> tuple[Ref, ...]:
    total = b.shape(x)[dim]
    return split_sizes(b, x, [min(size, total - i) for i in range(0, total, max(size, 1))] or [0], dim)


def chunk(b: Builder, x: Ref, chunks: int, dim: int = 0) -> tuple[Ref, ...]:
    return split(b, x, -(-b.shape(x)[dim] // chunks), dim)


def unbind(b: Builder, x: Ref, dim: int = 0) -> tuple[Ref, ...]:
    shape = b.shape(x)
    dim %= len(shape)
    return tuple(b.reshape(part, shape[:dim] + shape[dim + 1 :]) for part in split_sizes(b, x, [1] * shape[dim], dim))


def cat(b: Builder, tensors: Sequence[Ref], dim: int = 0) -> Ref:
    kept = [t for t in tensors if b.shape(t) != (0,)] or list(tensors[:1])  # torch skips empty 1-d tensors
    if (whole := put_together(b, kept, dim % b.ndim(kept[0]))) is not None:
        return whole
    return kept[0] if len(tensors) == 1 else b.op("aten.cat.default", tuple(kept), dim % b.ndim(kept[0]))


def put_together(b: Builder, parts: Sequence[Ref], dim: int) -> Ref | None:
    """What was split and is put together again along the same dim: as it was, or (each part with the next dim merged into that one, as
    `torch.cat(list(x))` has them) with those two merged."""
    merged = [b.made_by(part, "aten.reshape.default") for part in parts]
    sources = [m.args[0] for m in merged if m is not None] or list(parts)
    made = b.made_by(sources[0], "aten.split_with_sizes.default")
    if made is None or [s.name for s in sources] != list(made.outs) or len(sources) != len(parts) or made.args[2] != dim:
        return None
    shapes = [b.shape(s) for s in sources]
    if [b.shape(part) for part in parts] == shapes:
        return made.args[0]
    flat = [(*s[:dim], math.prod(s[dim : dim + 2]), *s[dim + 2 :]) for s in shapes]
    if [b.shape(part) for part in parts] != flat:
        return None
    whole = b.shape(made.args[0])
    return b.reshape(made.args[0], (*whole[:dim], math.prod(whole[dim : dim + 2]), *whole[dim + 2 :]))


def stack(b: Builder, tensors: Sequence[Ref], dim: int = 0) -> Ref:
    dim %= b.ndim(tensors[0]) + 1
    return cat(b, [b.unsqueeze(t, dim) for t in tensors], dim)


def repeat(b: Builder, x: Ref, times: Sequence[int]) -> Ref:
    """Each dim of size s repeated n times: [s] → [1, s] → [n, s] → [n·s]."""
    shape = (1,) * (len(times) - b.ndim(x)) + b.shape(x)
    if all(n == 1 for n in times):
        return b.reshape(x, shape)
    wide = [d for n, s in zip(times, shape, strict=True) for d in ((n, s) if n != 1 else (s,))]
    thin = [d for n, s in zip(times, shape, strict=True) for d in ((1, s) if n != 1 else (s,))]
    return b.reshape(b.expand(b.reshape(x, thin), wide), [n * s for n, s in zip(times, shape, strict=True)])


def tile(b: Builder, x: Ref, times: Sequence[int]) -> Ref:
    return repeat(b, x, (1,) * (b.ndim(x) - len(times)) + tuple(times))


def repeat_interleave(b: Builder, x: Ref, n: int, dim: int | None = None, output_size: int | None = None) -> Ref:
    if dim is None:
        x, dim = flatten(b, x), 0
    shape, dim = b.shape(x), dim % b.ndim(x)
    thin = b.reshape(x, (*shape[: dim + 1], 1, *shape[dim + 1 :]))
    wide = b.expand(thin, (*shape[: dim + 1], n, *shape[dim + 1 :]))
    return b.reshape(wide, (*shape[:dim], shape[dim] * n, *shape[dim + 1 :]))


def same(b: Builder, x: Ref, *args: Any, **kwargs: Any) -> Ref:
    return x


def cast(b: Builder, x: Ref, dtype: str | None = None, *args: Any, **kwargs: Any) -> Ref:
    return b.to(x, dtype) if dtype else x


def cast_device(b: Builder, x: Ref, device: None, dtype: str | None = None, *args: Any, **kwargs: Any) -> Ref:
    return b.to(x, dtype) if dtype else x


def cast_as(b: Builder, x: Ref, other: Ref, *args: Any, **kwargs: Any) -> Ref:
    return b.to(x, b.dtype(other))


def detach(b: Builder, x: Ref) -> Ref:
    return b.op("aten.detach.default", x) if b.grad(x) else x


def pad(b: Builder, x: Ref, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if mode != "constant":
        return NotImplemented
    return constant_pad(b, x, padding, value or 0)


def constant_pad(b: Builder, x: Ref, padding: Sequence[int], value: float = 0) -> Any:
    return b.op("aten.constant_pad_nd.default", x, tuple(padding), float(value) if b.value(x).tensor.floating else int(value))


def slice_scatter(b: Builder, x: Ref, src: Ref, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Ref:
    dim %= b.ndim(x)
    start, end, step = slice(start, end, step).indices(b.shape(x)[dim])
    src = b.to(src, b.dtype(x))
    return src if b.shape(src) == b.shape(x) else b.op("aten.slice_scatter.default", x, src, dim, start, max(start, end), step)


def select_scatter(b: Builder, x: Ref, src: Ref, dim: int, index: int) -> Ref:
    dim %= b.ndim(x)
    index %= b.shape(x)[dim]
    return slice_scatter(b, x, b.unsqueeze(src, dim), dim, index, index + 1)


def copy(b: Builder, x: Ref, src: Ref, non_blocking: bool = False) -> Ref:
    return b.expand(b.to(src, b.dtype(x)), b.shape(x))


def masked_scatter(b: Builder, x: Ref, mask: Ref, source: Ref) -> Ref:
    """The places of x where mask is True take the rows of source, in order: row cumsum(mask) - 1 each. Rows are as long as the trailing
    dims along which the mask repeats."""
    shape = b.shape(x)
    mask = b.expand(mask, shape)
    wide = b.made_by(mask, "aten.expand.default")
    thin = b.shape(wide.args[0]) if wide is not None else shape
    thin = (1,) * (len(shape) - len(thin)) + thin
    k = 0  # trailing dims that are rows
    while k < min(len(shape), b.ndim(source)) and thin[-1 - k] == 1 and b.shape(source)[-1 - k] == shape[-1 - k]:
        k += 1
    lead, row = shape[: len(shape) - k], shape[len(shape) - k :]
    small = b.reshape(wide.args[0] if wide is not None else mask, thin[: len(lead)])
    mask = b.expand(small, lead)
    rows = b.reshape(source, (-1, *row))
    at = b.op("aten.cumsum.default", b.to(b.reshape(mask, (math.prod(lead),)), "int64"), 0)
    at = b.op("aten.clamp.default", b.op("aten.sub.Tensor", at, 1), 0, b.shape(rows)[0] - 1)
    taken = b.op("aten.index.Tensor", rows, (b.reshape(at, lead),))
    return b.op("aten.where.self", b.reshape(mask, (*lead, *(1,) * k)), taken, x)


def pixel_shuffle(b: Builder, x: Ref, n: int) -> Ref:
    """[…, c·n·n, h, w] → […, c, h·n, w·n]"""
    *lead, c, h, w = b.shape(x)
    k = len(lead)
    apart = b.reshape(x, (*lead, c // (n * n), n, n, h, w))
    return b.reshape(b.permute(apart, (*range(k + 1), k + 3, k + 1, k + 4, k + 2)), (*lead, c // (n * n), h * n, w * n))


def pixel_unshuffle(b: Builder, x: Ref, n: int) -> Ref:
    *lead, c, h, w = b.shape(x)
    k = len(lead)
    apart = b.reshape(x, (*lead, c, h // n, n, w // n, n))
    return b.reshape(b.permute(apart, (*range(k + 1), k + 2, k + 4, k + 1, k + 3)), (*lead, c * n * n, h // n, w // n))


def channel_shuffle(b: Builder, x: Ref, groups: int) -> Ref:
    n, c, *rest = b.shape(x)
    apart = b.permute(b.reshape(x, (n, groups, c // groups, *rest)), (0, 2, 1, *range(3, len(rest) + 3)))
    return b.reshape(apart, (n, c, *rest))


def as_strided(b: Builder, x: Ref, shape: Sequence[int], strides: Sequence[int], offset: int | None = None) -> Ref:
    """A view of x's memory as it lay at capture: x in its memory's order, and of that another shape in another order. In a program a
    value may lie otherwise, so that no op may speak of strides."""
    assert b.at is not None
    old = b.old.graph.values[b.at.inputs[0]].strides
    inner, outer = memory_order(b.shape(x), old), memory_order(shape, strides)
    if offset or inner is None or outer is None or math.prod(shape) != math.prod(b.shape(x)):
        raise CaptureError(
            f"as_strided{tuple(shape), tuple(strides)} of a tensor {b.shape(x)} that lies as {old} is no rearrangement of it",
            where=b.at.source, hint="write it with reshape, permute, expand or unfold",
        )  # fmt: skip
    flat = b.reshape(b.permute(x, inner), [shape[d] for d in outer])
    return b.permute(flat, [outer.index(d) for d in range(len(outer))])


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The dims from the slowest to the fastest, if they fill their memory without gap or overlap.

    >>> memory_order((2, 3, 1), (1, 2, 7)), memory_order((2, 3), (4, 1))
    ((2, 1, 0), None)
    """
    order = sorted(range(len(shape)), key=lambda d: (shape[d] > 1, -strides[d]))
    n = 1
    for d in reversed(order):
        if shape[d] > 1 and strides[d] != n:
            return None
        n *= shape[d]
    return tuple(order)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ["aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.view_copy.default", "aten._reshape_copy.default"],
        reshape,
    ),
    **dict.fromkeys(["aten.view_as.default", "aten.reshape_as.default"], like_other),
    "aten.flatten.using_ints": flatten,
    "aten.unflatten.int": unflatten,
    "aten.unsqueeze.default": unsqueeze,
    **dict.fromkeys(["aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"], squeeze),
    "aten.t.default": transpose,
    **dict.fromkeys(["aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default"], transpose),
    **dict.fromkeys(["aten.mT.default", "aten.adjoint.default"], transpose_last),
    "aten.permute.default": permute,
    "aten.numpy_T.default": reverse_dims,
    **dict.fromkeys(["aten.movedim.int", "aten.movedim.intlist"], movedim),
    **dict.fromkeys(["aten.expand.default", "aten.broadcast_to.default"], expand),
    "aten.expand_as.default": expand_as,
    "aten.broadcast_tensors.default": broadcast_tensors,
    "aten.slice.Tensor": slice_,
    "aten.narrow.default": narrow,
    "aten.select.int": select,
    "aten.split.Tensor": split,
    **dict.fromkeys(["aten.split_with_sizes.default", "aten.split.sizes"], split_sizes),
    "aten.chunk.default": chunk,
    "aten.unbind.int": unbind,
    **dict.fromkeys(["aten.cat.default", "aten.concat.default", "aten.concatenate.default"], cat),
    "aten.stack.default": stack,
    "aten.repeat.default": repeat,
    "aten.tile.default": tile,
    "aten.repeat_interleave.self_int": repeat_interleave,
    **dict.fromkeys(
        ["aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.lift_fresh.default", "aten.lift_fresh_copy.default",
         "aten.lift.default", "aten.positive.default", "aten.conj.default", "aten.resolve_conj.default", "aten.resolve_neg.default"],
        same,
    ),
    **dict.fromkeys(["aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout"], cast),
    "aten.to.device": cast_device,
    **dict.fromkeys(["aten.to.other", "aten.type_as.default"], cast_as),
    "aten.detach.default": detach,
    "aten.pad.default": pad,
    "aten.constant_pad_nd.default": constant_pad,
    "aten.slice_scatter.default": slice_scatter,
    "aten.select_scatter.default": select_scatter,
    "aten.copy.default": copy,
    "aten.as_strided.default": as_strided,
    "aten.masked_scatter.default": masked_scatter,
    "aten.pixel_shuffle.default": pixel_shuffle,
    "aten.pixel_unshuffle.default": pixel_unshuffle,
    "aten.channel_shuffle.default": channel_shuffle,
}  # fmt: skip
