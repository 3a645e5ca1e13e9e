"""A program written by hand: two stages × two data-parallel ranks, one weight tied across the stages, one in ZeRO-3 storage.

stage 0:  h = tanh(x @ a)          a [4, 4]: whole on every rank, tied
stage 1:  o = (h @ a) @ b          b [4, 2]: rows sharded over dp, gathered before the loop
          loss = Σ (o - y)² / n    summed over dp in the forward
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoshard.layout import I, S
from autoshard.lower.program import Call, InputSlice, Module, Program, RankProgram, Slot
from autoshard.mesh import Mesh
from autoshard.plan.schedules import Action, build
from autoshard.trace.graph import Graph
from autoshard.trace.graph import Tensor as Spec

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
BATCH, MB = 8, 2
ROWS = BATCH // MB // 2


class Plain(nn.Module):
    """What the program computes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(4, 4, dtype=dtype))
        self.b = nn.Parameter(torch.randn(4, 2, dtype=dtype))
        self.register_buffer("seen", torch.zeros((), dtype=dtype))
        self.tied = self.a

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        o = (torch.tanh(x @ self.a) @ self.tied) @ self.b
        return ((o - y) ** 2).sum() / y.numel()


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"x": torch.randn(BATCH, 4, generator=g).to(dtype), "y": torch.randn(BATCH, 2, generator=g).to(dtype)}


def all_reduce(x: Tensor, axis: str = "dp") -> Tensor:
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", axis))


def module(*fns: Any, outputs: int, grads: tuple[Any, Any, Any], key: str) -> Module:
    forward, backward_input, backward_weight = (fx.symbolic_trace(f) if f else None for f in fns)
    assert forward is not None
    return Module(forward, backward_input, backward_weight, outputs, *grads, key=key)


def _gather_a() -> Module:
    return module(
        lambda a: (a,), lambda g: (g,), lambda g: (all_reduce(g),), outputs=1, grads=((0,), (), (0,)), key="gather a"
    )  # fmt: skip


def _gather_ab() -> Module:
    def forward(a, b):
        return a, c10d.wait_tensor(c10d.all_gather_into_tensor(b, 2, "dp"))

    def weights(ga, gb):
        return all_reduce(ga), c10d.wait_tensor(c10d.reduce_scatter_tensor(gb, "sum", 2, "dp"))

    return module(forward, lambda ga, gb: (ga, gb), weights, outputs=2, grads=((0, 1), (), (0, 1)), key="gather a b")


def _first() -> Module:
    def forward(x, a):
        h = aten.tanh.default(aten.mm.default(x, a))
        return h, h, x

    def inputs(h, x, g):
        return aten.tanh_backward.default(g, h), x

    return module(forward, inputs, lambda g, x: (aten.mm.default(aten.t.default(x), g),), outputs=1, grads=((0,), (), (1,)), key="first")


def _second() -> Module:
    def forward(h, a):
        return aten.mm.default(h, a), h, a

    def inputs(h, a, g):
        return aten.mm.default(g, aten.t.default(a)), g, h

    return module(forward, inputs, lambda g, h: (aten.mm.default(aten.t.default(h), g),), outputs=1, grads=((0,), (0,), (1,)), key="second")


def _head(axis: str = "dp") -> Module:
    def forward(k, b, y):
        d = aten.sub.Tensor(aten.mm.default(k, b), y)
        loss = aten.div.Scalar(aten.sum.default(aten.mul.Tensor(d, d)), BATCH * 2)
        return all_reduce(loss, axis), k, b, d

    def inputs(k, b, d, g):
        gd = aten.mul.Tensor(aten.div.Scalar(aten.mul.Scalar(d, 2), BATCH * 2), g)
        return aten.mm.default(gd, aten.t.default(b)), gd, k

    return module(forward, inputs, lambda g, k: (aten.mm.default(aten.t.default(k), g),), outputs=1, grads=((0,), (0,), (1,)), key="head")


def graph(dtype: str) -> Graph:
    g = Graph(loss="loss", tied={"tied": "a"})
    for name, shape, role in (("a", (4, 4), "param"), ("b", (4, 2), "param"), ("seen", (), "buffer")):
        g.add_value(name, Spec(shape, dtype), role=role, path=name, grad=role == "param")
    g.add_value("x", Spec((BATCH, 4), dtype), role="input", path="kwargs.x", batch_dim=0)
    g.add_value("y", Spec((BATCH, 2), dtype), role="input", path="kwargs.y", batch_dim=0)
    g.add_value("loss", Spec((), dtype))
    return g


def program(schedule: str = "1f1b", dtype: str = "float32", split: bool = False, count: bool = False) -> Program:
    """`split`: B as I and, at the end, W. `count`: the second stage counts microbatches' rows into the buffer `seen`."""
    mesh = Mesh.of({"pp": 2, "dp": 2})
    lists = build(schedule, 2, MB, [(0, 1)])
    if split:
        lists = [_split(actions) for actions in lists]
    modules = {"gather": (_gather_a(), _gather_ab()), "first": _first(), "second": _second(), "head": _head()}
    ranks = [_rank(mesh, r, lists, modules, dtype) for r in range(mesh.ranks)]
    g = graph(dtype)
    if count:
        g.updates["seen"] = "more"
        more = module(lambda seen: (aten.add.Scalar(seen, 1),), None, None, outputs=1, grads=((), (), ()), key="count")
        for rank in ranks:
            if rank.stage == 1:
                rank.once, rank.updates = Call(more, ("buffer:seen",), ("more",)), {"seen": "more"}
    return Program(SimpleNamespace(microbatches=MB, overlap=False), g, mesh, {}, ranks)  # type: ignore[arg-type]


def _split(actions: list[Action]) -> list[Action]:
    late = [Action("W", a.stage, a.mb) for a in actions if a.kind == "B"]
    early = [Action("I", a.stage, a.mb) if a.kind == "B" else a for a in actions]
    end = next(i for i, a in enumerate(early) if a.kind == "G")
    return [*early[:end], *late, *early[end:]]


def _rank(mesh: Mesh, number: int, lists: list[list[Action]], modules: dict[str, Any], dtype: str) -> RankProgram:
    coords = mesh.coords(number)
    stage, place = coords["pp"], ((2, 1), (coords["dp"], 0))
    a = Slot("a", Spec((4, 4), dtype), (I, I), True, *place)
    b = Slot("b", Spec((4, 2), dtype), (S(0), I), True, *place)
    seen = Slot("seen", Spec((), dtype), (I, I), False, *place)
    timed = (("mb", ()), ("dp", ()))
    x = InputSlice("x", Spec((ROWS, 4), dtype), (timed, ()), True)
    y = InputSlice("y", Spec((ROWS, 2), dtype), (timed, ()), True)
    first = [Call(modules["first"], ("x", "a"), ("h",), "first")]
    last = [Call(modules["second"], ("h", "a"), ("k",), "second"), Call(modules["head"], ("k", "b", "y"), ("loss",), "head")]
    return RankProgram(
        rank=number, coords=coords, stage=stage,
        params={"a": a, "b": b} if stage else {"a": a}, buffers={"seen": seen} if stage else {},
        instructions=lists[stage],
        gathers=(Call(modules["gather"][stage], ("param:a", "param:b")[: stage + 1], ("a", "b")[: stage + 1], "gather"),),
        once=None, data=None, blocks=last if stage else first, inputs={"y": y} if stage else {"x": x},
        constants=(), rank_inputs={}, edges={(0, 1): ("h",)}, grad_values=frozenset({"h"}),
        values={"h": Spec((ROWS, 4), dtype)}, loss="loss" if stage else "",
        tied={"a": (coords["dp"], 2 + coords["dp"])},
    )  # fmt: skip
