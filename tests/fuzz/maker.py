"""The means of making a graph op by op: a Case in the making, with the random choices that its parts share."""

from __future__ import annotations

import math
import random
from typing import Any

from autoshard.trace.graph import Ref

from .case import Case

SMOOTH = ("tanh", "sigmoid", "silu", "gelu", "sin", "softplus", "erf")


class Maker:
    """A graph in the making: `pool` holds the floating values to go on with; `rng` decides."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.case = Case(plan=seed % 1000, data=seed % 1000)
        self.values = self.case.graph.values
        self.count: dict[str, int] = {}
        self.batch, self.seq = self.rng.choice((2, 3, 4, 4, 6, 8, 8, 12, 16)), self.rng.choice((2, 3, 4, 5, 6, 7))
        self.heads, self.head = self.rng.choice((1, 2, 3, 4, 6)), self.rng.choice((1, 2, 3, 4, 5))
        self.width = self.heads * self.head
        self.vocab = self.rng.choice((7, 11, 12, 16, 61))
        self.orders = self.layer = 0

    # ---- building ---------------------------------------------------------------------------------------------------

    def name(self, stem: str) -> str:
        self.count[stem] = self.count.get(stem, 0) + 1
        return f"{stem}{self.count[stem]}"

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].tensor.shape

    def param(self, *shape: int) -> str:
        fill = self.rng.choice(("normal", "positive")) if len(shape) < 2 else "normal"
        return self.case.source(self.name("w"), "frozen" if self.rng.random() < 0.05 else "param", shape, fill=fill)

    def input(self, *shape: int, dtype: str = "float64", fill: str = "normal", batch: int | None = 0) -> str:
        return self.case.source(self.name("x"), "input", shape, dtype, fill, batch)

    def op(self, op: str, *args: Any, **kwargs: Any) -> str:
        return self.many(op, *args, **kwargs)[0]

    def many(self, op: str, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        return self.case.op(op if op.startswith("autoshard") else f"aten.{op}", refs(args, self.values), kwargs)

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("reshape.default", x, shape) if self.shape(x) != shape else x

    def permute(self, x: str, *dims: int) -> str:
        return self.op("permute.default", x, dims)

    def slice(self, x: str, dim: int, start: int, end: int) -> str:
        return self.op("slice.Tensor", x, dim, start, end, 1)

    def linear(self, x: str, n: int, bias: bool | None = None) -> str:
        """A linear in one of its spellings."""
        *lead, k = self.shape(x)
        how = self.rng.choice(("linear", "linear", "matmul", "einsum"))
        if how == "linear":
            y = self.op("linear.default", x, self.param(n, k))
        elif how == "matmul":
            y = self.op("matmul.default", x, self.param(k, n))
        else:
            letters = "abcdefg"[: len(lead)]
            y = self.op("einsum.default", f"{letters}k,kn->{letters}n", (Ref(x), Ref(self.param(k, n))))
        if bias if bias is not None else self.rng.random() < 0.4:
            y = self.op("add.Tensor", y, self.param(n))
        return y

    def smooth(self, x: str) -> str:
        return self.op(f"{self.rng.choice(SMOOTH)}.default", x)

    def residual(self, x: str, y: str) -> str:
        # layers that are alike but for a number are what modules must not be shared between
        x = self.op("mul.Tensor", x, round(1 / (self.layer + 2), 3)) if self.rng.random() < 0.4 else x
        return self.op("add.Tensor", x, y)

    def dropout(self, x: str) -> str:
        shape = self.shape(x)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        mask = self.op("autoshard.dropout_mask.default", shape, self.rng.choice((0.1, 0.5)), "torch.float64", self.orders, strides)
        self.orders += 1
        return self.op("mul.Tensor", x, mask)

    def expand(self, x: str, *shape: int) -> str:
        return self.op("expand.default", x, shape) if self.shape(x) != shape else x

    def key_mask(self, batch: int, seq: int) -> str:
        return self.input(batch, seq, dtype="bool", fill="mask")


def refs(tree: Any, values: dict[str, Any]) -> Any:
    """Names of values become Refs."""
    if isinstance(tree, str):
        return Ref(tree) if tree in values else tree
    return tuple(refs(t, values) for t in tree) if isinstance(tree, tuple) else tree
