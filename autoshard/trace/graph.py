"""The Graph: one logical device, plain data.

A `Graph` is what `trace.capture` returns and what the planner reads: a straight-line list of functional ATen ops over
named values, as plain dataclasses (no torch here, so planning from a saved graph imports none). The torch.fx module that
it was read from stays beside it in `trace.capture.Captured`, as the reference semantics.

A value is named `op` (single output) or `op.i` (output i of several). Arguments refer to values by `Ref`.

>>> g = Graph()
>>> g.add_value("x", Tensor((4, 8), "float32"), role="input", path="kwargs.x", batch_dim=0)
>>> g.add_op(Op("y", "aten.relu.default", (Ref("x"),), {}, ("y",)), [Tensor((4, 8), "float32")])
>>> print(g)
x: float32[4, 8] input kwargs.x
y: float32[4, 8] = aten.relu.default(x)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import GraphFileError


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape (elements per dim) and dtype ("float32", "int64", "bool", …) of one value."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def floating(self) -> bool:
        return "float" in self.dtype or self.dtype.startswith("complex")

    @property
    def bytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8,
    "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to a value, inside an op's arguments."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(slots=True)
class Value:
    """What is known of one value. `role` of a source: param, buffer, constant, input; of everything else: value.

    `path`: a parameter's or buffer's name in the model, an input's place in the call (`args.0`, `kwargs.labels`).
    `grad`: whether a gradient flows into it. `batch_dim`: which dim of an input is the batch, if any.
    """

    name: str
    tensor: Tensor
    role: str = "value"
    path: str = ""
    grad: bool = False
    batch_dim: int | None = None
    strides: tuple[int, ...] = ()


@dataclass(slots=True)
class Op:
    """One call of `target` (`aten.linear.default`, `autoshard.pick.default`, …), with its source line and module path."""

    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[str, ...]
    source: str = ""
    module: str = ""

    @property
    def inputs(self) -> list[str]:
        """Names of the values that the arguments refer to, in order, repeats kept."""
        found: list[str] = []
        _collect(self.args, found)
        if self.kwargs:
            _collect(self.kwargs, found)
        return found

    def __str__(self) -> str:
        args = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        return f"{self.target}({', '.join(args)})"


def _collect(tree: Any, found: list[str]) -> None:
    for item in tree.values() if type(tree) is dict else tree:
        if type(item) is Ref:
            found.append(item.name)
        elif type(item) in (tuple, list, dict):
            _collect(item, found)


def map_refs(tree: Any, fn: Callable[[Ref], Any]) -> Any:
    """Rebuild nested tuples, lists and dicts with `fn` applied to every Ref."""
    if isinstance(tree, Ref):
        return fn(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_refs(t, fn) for t in tree)
    if isinstance(tree, dict):
        return {k: map_refs(v, fn) for k, v in tree.items()}
    return tree


@dataclass(slots=True)
class Graph:
    """Values and ops in execution order.

    `loss`: the scalar to train on. `outputs`: further results by name. `updates`: buffer path → value that it takes after
    the step. `tied`: other names of a parameter or buffer → the path that owns it. `notes`: what capture decided and says.
    `kept`: values that a step hands out whole besides the loss, by the name that the user asked for.
    """

    values: dict[str, Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    loss: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    updates: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def add_value(self, name: str, tensor: Tensor, **facts: Any) -> None:
        assert name not in self.values, name
        self.values[name] = Value(name, tensor, **facts)

    def add_op(self, op: Op, outs: list[Tensor], grad: bool = False) -> None:
        for name, tensor in zip(op.outs, outs, strict=True):
            self.add_value(name, tensor, grad=grad and tensor.floating)
        self.ops.append(op)

    def sources(self, *roles: str) -> Iterator[Value]:
        return (v for v in self.values.values() if v.role in roles)

    def producer(self) -> dict[str, Op]:
        return {out: op for op in self.ops for out in op.outs}

    def consumers(self) -> dict[str, list[Op]]:
        found: dict[str, list[Op]] = {name: [] for name in self.values}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                found[name].append(op)
        return found

    @property
    def roots(self) -> list[str]:
        """The values that a training step must produce: the loss, the buffers' new contents, what is kept."""
        others = [*self.updates.values(), *self.kept.values()]
        return [self.loss, *others] if self.loss else others

    def __str__(self) -> str:
        lines = [f"{v.name}: {v.tensor} {v.role} {v.path}" for v in self.sources("param", "buffer", "constant", "input")]
        for op in self.ops:
            outs = ", ".join(f"{o}: {self.values[o].tensor}" for o in op.outs)
            lines.append(f"{outs} = {op}" + (f"  # {op.source}" if op.source else ""))
        if self.loss:
            lines.append(f"loss {self.loss}")
        lines += [f"update {path} = {value}" for path, value in self.updates.items()]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write as JSON. Constants' contents are not part of it (`trace.capture.Captured` keeps them)."""
        Path(path).write_text(json.dumps(_encode(dataclasses.asdict(self, dict_factory=dict)), indent=0))

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Read what `save` wrote. Raises GraphFileError on anything else."""
        try:
            data = _decode(json.loads(Path(path).read_text()))
            values = {k: Value(**{**v, "tensor": Tensor(**v["tensor"])}) for k, v in data.pop("values").items()}
            ops = [Op(**op) for op in data.pop("ops")]
            return cls(values=values, ops=ops, **data)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraphFileError(f"{path} is not a saved autoshard graph: {error}") from error


def _encode(tree: Any) -> Any:
    if isinstance(tree, Ref):
        return {"%ref": tree.name}
    if isinstance(tree, tuple):
        return {"%tuple": [_encode(t) for t in tree]}
    if isinstance(tree, list):
        return [_encode(t) for t in tree]
    if isinstance(tree, dict):
        # asdict turns a Ref into {"name": …}; a Value's dict has more keys, so this is unambiguous
        if set(tree) == {"name"}:
            return {"%ref": tree["name"]}
        return {k: _encode(v) for k, v in tree.items()}
    if isinstance(tree, float) and tree in (float("inf"), float("-inf")):
        return {"%float": str(tree)}
    return tree


def _decode(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_decode(t) for t in tree]
    if isinstance(tree, dict):
        if set(tree) == {"%ref"}:
            return Ref(tree["%ref"])
        if set(tree) == {"%tuple"}:
            return tuple(_decode(t) for t in tree["%tuple"])
        if set(tree) == {"%float"}:
            return float(tree["%float"])
        return {k: _decode(v) for k, v in tree.items()}
    return tree
