"""An op's arguments on one shard: sizes, starts and ends that spoke of the whole, rewritten for what a rank holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..graph import Op

Held = Callable[[str, int], np.ndarray]
"""(value name, dim) → ascending positions of the dim that the rank holds."""


def localize(op: Op, held: Held, out_shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The op's args with every size and offset counted within the shard; `out_shape` is the local shape of its first output.

    >>> from ..graph import Ref
    >>> op = Op("y", "aten.slice.Tensor", (Ref("x"), 0, 4, 8, 1), {}, ("y",))
    >>> localize(op, lambda name, dim: np.array([0, 1, 4, 5]), (2,))
    (x, 0, 2, 4, 1)
    """
    args = op.args
    if op.target in ("aten.reshape.default", "aten.expand.default"):
        return (args[0], out_shape)
    if op.target == "aten.slice.Tensor":
        x, dim, start, end, step = args
        if step != 1:
            return args
        positions = held(x.name, dim)
        return (x, dim, int(np.searchsorted(positions, start)), int(np.searchsorted(positions, end)), 1)
    if op.target == "aten.split_with_sizes.default":
        x, sizes, dim = args[0], args[1], args[2] if len(args) > 2 else 0
        edges = np.searchsorted(held(x.name, dim), np.cumsum([0, *sizes]))
        return (x, tuple(int(n) for n in np.diff(edges)), dim)
    if op.target == "autoshard.dropout_mask.default":
        return (out_shape, *args[1:])
    if op.target in _GROUPED:
        at, x, w = _GROUPED[op.target], args[0], args[1]
        spatial = len(args[3]) if op.target == "aten.convolution.default" else int(op.target[9])
        if len(args) > at and args[at] > 1 and len(out_shape) == spatial + 2 and not (at == 8 and args[6]):
            return (*args[:at], len(held(x.name, 1)) // len(held(w.name, 1)), *args[at + 1 :])
    return args


_GROUPED = {"aten.convolution.default": 8, "aten.conv1d.default": 6, "aten.conv2d.default": 6, "aten.conv3d.default": 6}
"""Where a convolution's number of groups stands."""
