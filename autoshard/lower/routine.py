"""Routines: straight lists of steps over named local tensors, which `partition` writes and `differentiate` traces.

A routine is plain Python that can be run on fakes; its `text` says exactly what it does, names numbered, so that blocks and ranks that are
alike are seen to be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import traceback

from ..layout import Layout
from ..trace.graph import Op, Tensor
from .program import RankInput

Fn = Callable[..., Any]
SAME = "same"
"""The text of a step that hands its input on under another name."""


@dataclass
class Step:
    """`outs` = `fn`(`ins`), on local tensors. `text` says what fn does. `op`: where it is one op of local tensors alone, that op, its Refs
    being the names here. `rows`: of merged linears, how the result is split. `kernel`: the kernel that it is."""

    fn: Fn
    ins: tuple[str, ...]
    outs: tuple[str, ...]
    text: str
    source: str = ""
    op: Op | None = None
    rows: tuple[int, ...] | None = None
    kernel: str = ""


@dataclass
class Port:
    """A routine's input or output: a value's local tensor in one layout."""

    name: str
    tensor: Tensor
    grad: bool
    param: bool = False


@dataclass
class Routine:
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    rank_inputs: dict[str, RankInput] = field(default_factory=dict)
    label: str = ""
    casts: list[tuple[str, Tensor, bool]] = field(default_factory=list)
    """Weights whose casts to fp8 come in: the name that they are used by, the local tensor, whether the transpose is needed."""

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it. Under a tracer, the nodes carry the user's source lines as their stack traces."""
        env = dict(zip((p.name for p in self.inputs), tensors, strict=True))
        with traceback.preserve_node_meta():
            for step in self.steps:
                traceback.current_meta["stack_trace"] = step.source
                found = step.fn(*(env[n] for n in step.ins))
                env |= zip(step.outs, found if isinstance(found, (tuple, list)) else (found,), strict=True)
        return tuple(env[p.name] for p in self.outputs)

    @property
    def text(self) -> str:
        """The routine with names numbered by first appearance: equal texts mean equal modules."""
        number: dict[str, int] = {}

        def n(name: str) -> str:
            return f"%{number.setdefault(name, len(number))}"

        lines = [f"{n(p.name)}: {p.tensor} {p.grad} {p.param}" for p in self.inputs]
        lines += [f"{', '.join(map(n, s.outs))} = {s.text} {', '.join(map(n, s.ins))}" for s in self.steps]
        return "\n".join([*lines, "return " + ", ".join(f"{n(p.name)}:{p.grad}" for p in self.outputs)])


def value_name(name: str, layout: Layout) -> str:
    return f"{name}|{','.join(map(str, layout))}"
