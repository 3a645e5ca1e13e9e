"""A case: a graph with everything that a run of it depends on; it prints to a few lines of text and reads back equal.

A line with a role is a source, any other an op. Tensors' contents follow from the seed and the value's name, so that a case that lost
an op still has the same numbers elsewhere.

>>> case = Case.parse('''
... x: float64[4, 3] input batch=0
... w: float64[5, 3] param
... y = aten.linear.default(x, w)
... loss = aten.sum.dim_IntList(y, (0, 1), False)
... ''', mesh="dp=2")
>>> case.graph.values["y"].tensor.shape, case.graph.values["y"].grad
((4, 5), True)
>>> Case.parse(case.text, mesh="dp=2").text == case.text
True
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from autoshard.mesh import Mesh
from autoshard.trace.captured import Captured, InputSpec
from autoshard.trace.graph import Graph, Op, Ref, Tensor, map_refs
from autoshard.trace.interpret import call
from autoshard.trace.primitives import OPAQUE, Opaque, register_opaque

_SOURCE = re.compile(r"(?P<name>\w+): (?P<dtype>\w+)\[(?P<shape>[\d, ]*)\] (?P<role>param|frozen|buffer|constant|input)(?P<facts>.*)")
_OPAQUES: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "wave": lambda x: (torch.sin(x) * 0.5,),
    "whiten": lambda x: (torch.tanh(x - x.mean()),),
    "mix": lambda x, y: (x * torch.sigmoid(y), y * 0.5),
}


def opaque_key(kind: str, shape: tuple[int, ...]) -> str:
    """The key of a function of one or two tensors of a shape, registered."""
    key = f"fuzz-{kind}-{'x'.join(map(str, shape))}"
    if key not in OPAQUE:
        fn = _OPAQUES[kind]
        outs = 2 if kind == "mix" else 1
        register_opaque(key, Opaque(kind, fn, (shape,) * outs, (torch.float64,) * outs))
    return key


@dataclass
class Case:
    """`fills`: what a source holds. `plan`: the seed of the random plan; `data`: of all tensors; `dropout`: as lower.compile takes it;
    `blocks`: "found" where the graph is thin; "fold": and blocks that are alike placed alike; "any": cut anywhere, so that many values
    cross, to several stages each."""

    graph: Graph = field(default_factory=Graph)
    fills: dict[str, str] = field(default_factory=dict)
    mesh: str = "dp=1"
    microbatches: int = 1
    plan: int = 0
    data: int = 0
    dropout: str = "philox"
    blocks: str = "found"

    def source(
        self, name: str, role: str, shape: tuple[int, ...], dtype: str = "float64", fill: str = "normal", batch: int | None = None
    ) -> str:
        """Add a parameter ("param", "frozen"), buffer, constant or input."""
        kind = "param" if role == "frozen" else role
        path = f"kwargs.{name}" if role == "input" else name if role != "constant" else ""
        self.graph.add_value(name, Tensor(tuple(shape), dtype), role=kind, path=path, grad=role == "param", batch_dim=batch)
        self.fills[name] = fill
        return name

    def op(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, names: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Add an op; its shapes come from running it on meta tensors."""
        kwargs = kwargs or {}
        values = self.graph.values
        if target == "autoshard.opaque.default":
            opaque_key(args[0].split("-")[1], tuple(int(n) for n in args[0].split("-")[2].split("x") if n))
        given, named = map_refs((args, kwargs), lambda r: _meta(values[r.name].tensor))
        made = call(target, given, named, "meta")
        made = made if isinstance(made, tuple) else (made,)
        if not names:
            stem = f"v{len(self.graph.ops)}"
            names = (stem,) if len(made) == 1 else tuple(f"{stem}_{i}" for i in range(len(made)))
        op = Op(names[0] if len(names) == 1 else names[0].rsplit("_", 1)[0], target, args, kwargs, names)
        grad = target != "aten.detach.default" and any(values[n].grad for n in op.inputs)
        self.graph.add_op(op, [Tensor(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in made], grad=grad)
        return names

    def tensor(self, name: str) -> torch.Tensor:
        """The content of a source."""
        v = self.graph.values[name]
        shape, (fill, _, detail) = v.tensor.shape, self.fills[name].partition(":")
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.data)
        if fill in ("ids", "labels"):
            found = torch.randint(0, int(detail), shape, generator=g)
            return torch.where(torch.rand(shape, generator=g) < 0.3, -100, found) if fill == "labels" else found
        if fill == "mask":
            return (torch.rand(shape, generator=g) < 0.7) | (torch.arange(shape[-1] if shape else 1) == 0)
        if fill == "positive":
            return torch.rand(shape, generator=g, dtype=torch.float64) + 0.5
        scale = shape[-1] ** -0.5 if len(shape) > 1 and v.role == "param" else 0.7
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale

    @property
    def captured(self) -> Captured:
        graph = self.graph
        inputs = list(graph.sources("input"))
        keys = {op.args[0] for op in graph.ops if op.target == "autoshard.opaque.default"}
        spec = InputSpec(None, tuple(v.path for v in inputs), tuple(v.name for v in inputs), (None,) * len(inputs))
        return Captured(graph, {v.name: self.tensor(v.name) for v in graph.sources("constant")}, {k: OPAQUE[k].fn for k in keys}, spec)

    @property
    def shape(self) -> Mesh:
        return Mesh.parse(self.mesh)

    @property
    def text(self) -> str:
        """The graph; `parse` reads it."""
        lines = []
        for v in self.graph.sources("param", "buffer", "constant", "input"):
            role = "frozen" if v.role == "param" and not v.grad else v.role
            facts = f" batch={v.batch_dim}" if v.batch_dim is not None else ""
            facts += f" fill={self.fills[v.name]}" if self.fills[v.name] != "normal" else ""
            lines.append(f"{v.name}: {v.tensor} {role}{facts}")
        update = {value: path for path, value in self.graph.updates.items()}
        for op in self.graph.ops:
            names = ", ".join(op.outs)
            lines.append(f"{names} = {op}" + (f"  # updates {update[op.outs[0]]}" if op.outs[0] in update else ""))
        if self.graph.ops[-1].outs[0] != self.graph.loss:
            lines.append(f"loss = {self.graph.loss}")
        return "\n".join(lines)

    @property
    def script(self) -> str:
        """Python that runs this case and fails as it does."""
        options = f'"{self.mesh}", microbatches={self.microbatches}, plan={self.plan}, data={self.data}'
        options += f', dropout="{self.dropout}"' if self.dropout != "philox" else ""
        options += f', blocks="{self.blocks}"' if self.blocks != "found" else ""
        return f'from tests.fuzz.run import check\ncheck("""\n{self.text}\n""", {options})'

    @classmethod
    def parse(cls, text: str, mesh: str = "dp=1", **options: Any) -> Case:
        """Read what `text` wrote; `options`: the other fields."""
        case = cls(mesh=mesh, **options)
        for line in filter(None, map(str.strip, text.splitlines())):
            if found := _SOURCE.fullmatch(line):
                facts = dict(f.split("=") for f in found["facts"].split())
                shape = tuple(int(n) for n in found["shape"].split(",") if n.strip())
                batch = int(facts["batch"]) if "batch" in facts else None
                case.source(found["name"], found["role"], shape, found["dtype"], facts.get("fill", "normal"), batch)
            else:
                case._parse_op(line)
        return case

    def _parse_op(self, line: str) -> None:
        names, _, rest = line.partition(" = ")
        rest, _, update = rest.partition("  # updates ")
        if "(" not in rest:
            self.graph.loss = rest
            return
        target, _, inside = rest.partition("(")
        scope: dict[str, Any] = {name: Ref(name) for name in self.graph.values}
        scope |= {"call_": lambda *args, **kwargs: (args, kwargs), "inf": math.inf}
        args, kwargs = eval("call_(" + inside, scope)
        made = self.op(target, args, kwargs, tuple(names.split(", ")))
        if update:
            self.graph.updates[update] = made[0]
        else:
            self.graph.loss = made[0]


def _meta(t: Tensor) -> torch.Tensor:
    return torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta")
