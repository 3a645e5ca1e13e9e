"""Build a Graph op by op, with shapes inferred by running each op on meta tensors; and rewrite one Graph into another by rules.

In: a Captured and a table from op target to rule. Out: the Captured with every op replaced by what its rule emitted, dead code removed.
A rule is a function of the builder and the op's own arguments (values as Refs); it emits ops and returns what stands for the op's result,
or NotImplemented to keep the op.

>>> from autoshard.trace.captured import Captured
>>> from autoshard.trace.graph import Graph, Op, Ref, Tensor
>>> g = Graph(loss="y")
>>> g.add_value("x", Tensor((4,), "float32"), role="input")
>>> g.add_op(Op("y", "aten.square.default", (Ref("x"),), {}, ("y",)), [Tensor((4,), "float32")])
>>> print(rewrite(Captured(g), {"aten.square.default": lambda b, x: b.op("aten.mul.Tensor", x, x)}).graph.ops[0])
aten.mul.Tensor(x, x)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .captured import Captured
from .graph import Graph, Op, Ref, Tensor, Value, map_refs
from .interpret import call

Rule = Callable[..., Any]


class Builder:
    """A Graph in the making. Sources (parameters, buffers, constants, inputs) are those of `old`; ops are added by `op`."""

    def __init__(self, old: Captured) -> None:
        self.old = old
        self.graph = Graph(tied=dict(old.graph.tied), notes=list(old.graph.notes))
        self.constants = dict(old.constants)
        self.producer: dict[str, Op] = {}
        self.at: Op | None = None
        self._meta: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._by_content = {_content(tensor): name for name, tensor in self.constants.items()}
        for value in old.graph.sources("param", "buffer", "constant", "input"):
            self.graph.values[value.name] = dataclasses.replace(value)

    # -- facts about values

    def value(self, ref: Ref) -> Value:
        return self.graph.values[ref.name]

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.value(ref).tensor.shape

    def ndim(self, ref: Ref) -> int:
        return len(self.shape(ref))

    def dtype(self, ref: Ref) -> str:
        return self.value(ref).tensor.dtype

    def grad(self, ref: Ref) -> bool:
        return self.value(ref).grad

    def made_by(self, ref: Any, target: str) -> Op | None:
        """The op that produced `ref`, if it is a `target`."""
        op = self.producer.get(ref.name) if isinstance(ref, Ref) else None
        return op if op is not None and op.target == target else None

    # -- making ops

    def op(self, target: str, *args: Any, **kwargs: Any) -> Any:
        """Add one op. Returns a Ref, or a tuple of Refs where the op has several outputs."""
        metas = map_refs((args, kwargs), lambda ref: self.meta(ref.name))
        result = call(target, metas[0], metas[1], device="meta")
        many = isinstance(result, tuple)
        name = self.fresh(target.split(".")[1])
        outs = tuple(f"{name}.{i}" for i in range(len(result))) if many else (name,)
        at = self.at
        op = Op(name, target, args, kwargs, outs, at.source if at else "", at.module if at else "")
        grad = any(self.graph.values[n].grad for n in op.inputs) and target != "aten.detach.default"
        tensors = [Tensor(tuple(t.shape), dtype_name(t.dtype)) for t in (result if many else (result,))]
        self.graph.add_op(op, tensors, grad=grad)
        for out, tensor in zip(outs, result if many else (result,), strict=True):
            self.producer[out], self._meta[out] = op, tensor
            self.graph.values[out].strides = tuple(tensor.stride())
        refs = tuple(Ref(o) for o in outs)
        return refs if many else refs[0]

    def copy(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add `op` of the old graph under new arguments of the same shapes, keeping its name if that is free."""
        name = op.name if self._free(op.name) else self.fresh(op.name)
        many = op.outs != (op.name,)
        outs = tuple(f"{name}.{i}" for i in range(len(op.outs))) if many else (name,)
        new = Op(name, op.target, args, kwargs, outs, op.source, op.module)
        grad = any(self.graph.values[n].grad for n in new.inputs) and op.target != "aten.detach.default"
        self.graph.add_op(new, [self.old.graph.values[o].tensor for o in op.outs], grad=grad)
        for o, out in zip(op.outs, outs, strict=True):
            self.producer[out] = new
            self.graph.values[out].strides = self.old.graph.values[o].strides
        refs = tuple(Ref(o) for o in outs)
        return refs if many else refs[0]

    def constant(self, tensor: torch.Tensor, name: str = "constant") -> Ref:
        """A constant value with these contents; equal contents share one value."""
        key = _content(tensor)
        if key not in self._by_content:
            name = self.fresh(name)
            self.constants[name] = tensor
            self._by_content[key] = name
        name = self._by_content[key]
        if name not in self.graph.values:
            self._add_constant(name, self.constants[name])
        return Ref(name)

    def _add_constant(self, name: str, tensor: torch.Tensor) -> None:
        facts = Tensor(tuple(tensor.shape), dtype_name(tensor.dtype))
        self.graph.add_value(name, facts, role="constant", strides=tuple(tensor.stride()))

    def fresh(self, base: str) -> str:
        """A name that no value and no op has: base, base_1, base_2, …"""
        base = base.strip("_") or "op"
        while True:
            n = self._counts.get(base, 0)
            self._counts[base] = n + 1
            name = f"{base}_{n}" if n else base
            if self._free(name):
                return name

    def _free(self, name: str) -> bool:
        return name not in self.graph.values and f"{name}.0" not in self.graph.values

    def meta(self, name: str) -> torch.Tensor:
        if name not in self._meta:
            value = self.graph.values[name]
            strides = value.strides or contiguous_strides(value.tensor.shape)
            self._meta[name] = torch.empty_strided(value.tensor.shape, strides, dtype=getattr(torch, value.tensor.dtype), device="meta")
        return self._meta[name]

    # -- shape ops that vanish where they change nothing, and compose

    def reshape(self, x: Ref, shape: Sequence[int]) -> Ref:
        shape = known_size(shape, math.prod(self.shape(x)))
        while (made := self.made_by(x, "aten.reshape.default")) is not None:
            x = made.args[0]
        return x if shape == self.shape(x) else self.op("aten.reshape.default", x, shape)

    def permute(self, x: Ref, dims: Sequence[int]) -> Ref:
        dims = tuple(d % max(self.ndim(x), 1) for d in dims)
        if (made := self.made_by(x, "aten.permute.default")) is not None:
            x, dims = made.args[0], tuple(made.args[1][d] for d in dims)
        return x if dims == tuple(range(len(dims))) else self.op("aten.permute.default", x, dims)

    def expand(self, x: Ref, shape: Sequence[int]) -> Ref:
        old, lead = self.shape(x), len(shape) - self.ndim(x)
        shape = tuple(old[i - lead] if s == -1 else s for i, s in enumerate(shape))
        if (made := self.made_by(x, "aten.expand.default")) is not None:
            x = made.args[0]
        return x if shape == self.shape(x) else self.op("aten.expand.default", x, shape)

    def slice(self, x: Ref, dim: int, start: int | None, end: int | None, step: int = 1) -> Ref:
        dim %= self.ndim(x)
        start, end, step = slice(start, end, step).indices(self.shape(x)[dim])
        end = max(start, end)
        if (start, end, step) == (0, self.shape(x)[dim], 1):
            return x
        return self.op("aten.slice.Tensor", x, dim, start, end, step)

    def to(self, x: Ref, dtype: str) -> Ref:
        """`dtype` with or without the leading "torch."."""
        dtype = dtype.removeprefix("torch.")
        return x if self.dtype(x) == dtype else self.op("aten._to_copy.default", x, dtype=f"torch.{dtype}")

    def unsqueeze(self, x: Ref, dim: int) -> Ref:
        shape = list(self.shape(x))
        shape.insert(dim % (len(shape) + 1), 1)
        return self.reshape(x, shape)

    # -- the result

    def finish(self, loss: str, outputs: dict[str, str], updates: dict[str, str]) -> Captured:
        self.graph.loss, self.graph.outputs, self.graph.updates = loss, outputs, updates
        drop_dead(self.graph)
        constants = {k: v for k, v in self.constants.items() if k in self.graph.values}
        used = {op.args[0] for op in self.graph.ops if op.target == "autoshard.opaque.default"}
        opaque = {k: v for k, v in self.old.opaque.items() if k in used}
        return dataclasses.replace(self.old, graph=self.graph, constants=constants, opaque=opaque)


def rewrite(old: Captured, rules: Mapping[str, Rule]) -> Captured:
    """Rebuild the graph with each op whose target has a rule replaced by what the rule emits."""
    b = Builder(old)
    new: dict[str, Ref] = {v.name: Ref(v.name) for v in old.graph.sources("param", "buffer", "constant", "input")}
    for op in old.graph.ops:
        b.at = op
        args, kwargs = map_refs((op.args, op.kwargs), lambda ref: new[ref.name])
        rule = rules.get(op.target)
        result = NotImplemented if rule is None else rule(b, *args, **kwargs)
        if result is NotImplemented:
            result = b.copy(op, args, kwargs)
        refs = result if isinstance(result, tuple) else (result,)
        for out, ref in zip(op.outs, refs, strict=True):
            if ref is None:
                continue
            was, now = old.graph.values[out].tensor, b.value(ref).tensor
            assert was == now, f"{op} of {was} became {now}"
            new[out] = ref
    g = old.graph
    b.at = None
    return b.finish(
        new[g.loss].name if g.loss else "",
        {k: new[v].name for k, v in g.outputs.items()},
        {k: new[v].name for k, v in g.updates.items()},
    )


def drop_dead(graph: Graph) -> None:
    """Remove ops and constants that no root and no output needs. Parameters, buffers and inputs stay."""
    alive = set(graph.roots) | set(graph.outputs.values())
    kept = []
    for op in reversed(graph.ops):
        if alive.intersection(op.outs):
            kept.append(op)
            alive.update(op.inputs)
    graph.ops = kept[::-1]
    made = {out for op in graph.ops for out in op.outs}
    graph.values = {k: v for k, v in graph.values.items() if k in made or v.role in ("param", "buffer", "input") or k in alive}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """
    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, n = [], 1
    for size in reversed(shape):
        strides.append(n)
        n *= max(size, 1)
    return tuple(reversed(strides))


def known_size(shape: Sequence[int], numel: int) -> tuple[int, ...]:
    """
    >>> known_size((2, -1, 4), 24)
    (2, 3, 4)
    """
    rest = math.prod(s for s in shape if s != -1)
    return tuple(numel // max(rest, 1) if s == -1 else s for s in shape)


def _content(tensor: torch.Tensor) -> tuple[Any, ...]:
    flat = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)  # a stride of 0 can't be viewed as bytes
    return dtype_name(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()
