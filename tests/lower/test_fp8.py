"""Linears in fp8: the same numbers as a plain model whose linears cast their operands, rank by rank; a loss that falls as without."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard.errors import PinError, PlanFileError
from autoshard.lower import compile
from autoshard.plan.cluster import Cluster
from autoshard.plan.plan import Plan
from autoshard.plan.search import search
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import Captured, capture
from tests.differential.compare import compare
from tests.differential.reference import FLOAT64, Outcome, Plain, follow
from tests.zoo import layers

BATCH, SEQ, VOCAB, HIDDEN, INNER = 8, 16, 48, 32, 64


def eight(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x after a cast with its own amax as the scale, and 1 / scale, which is float32 as on a device."""
    top = torch.finfo(dtype).max
    scale = top / x.abs().max().float()
    return (x.float() * scale).clamp(-top, top).to(dtype).to(x.dtype), 1 / scale


class Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        (x8, x_inverse), (w8, w_inverse) = eight(x, torch.float8_e4m3fn), eight(w, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_inverse, w8, w_inverse)
        return x8 @ w8.t() * (x_inverse * w_inverse)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x8, x_inverse, w8, w_inverse = ctx.saved_tensors
        g8, inverse = eight(g, torch.float8_e5m2)
        return g8 @ w8 * (inverse * w_inverse), g8.flatten(0, -2).t() @ x8.flatten(0, -2) * (inverse * x_inverse)


class Layer(nn.Module):
    """`ranks`: none, a plain layer; else what that many ranks of tp compute in fp8: gate and up by rows as one matmul, down by columns."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.norm = ranks, nn.LayerNorm(HIDDEN)
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if not self.ranks:
            return x + self.down(F.silu(self.gate(h)) * self.up(h))
        y = x + self.down.bias
        gates, ups, downs = (w.chunk(self.ranks, d) for w, d in ((self.gate.weight, 0), (self.up.weight, 0), (self.down.weight, 1)))
        for g, u, d in zip(gates, ups, downs, strict=True):
            gate, up = Emulated.apply(h, torch.cat([g, u])).chunk(2, -1)
            y = y + Emulated.apply(F.silu(gate) * up, d)
        return y


class Model(nn.Module):
    """`parts`: of the batch, each with its own scales; `narrow`: linears that don't fit."""

    def __init__(self, ranks: int = 0, parts: int = 1) -> None:
        super().__init__()
        self.parts = parts
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(ranks) for _ in range(2))
        self.low, self.high = nn.Linear(HIDDEN, 12, bias=False), nn.Linear(12, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        found = []
        for part in ids.chunk(self.parts):
            x = self.embed(part)
            for layer in self.layers:
                x = layer(x)
            found.append(self.head(x + self.high(torch.tanh(self.low(x)))))
        return F.cross_entropy(torch.cat(found).flatten(0, 1), labels.flatten())


@functools.cache
def subject() -> tuple[Model, dict[str, Tensor], Captured]:
    torch.manual_seed(0)
    model = Model().double()
    kwargs = {name: torch.randint(0, VOCAB, (BATCH, SEQ)) for name in ("ids", "labels")}
    return model, kwargs, capture(model, kwargs=kwargs)


@functools.cache
def emulated(ranks: int, parts: int) -> Outcome:
    model = Model(ranks, parts).double()
    model.load_state_dict(subject()[0].state_dict())
    return follow(Plain(model, None), subject()[1], FLOAT64)


def planned(mesh: dict[str, int], microbatches: int = 1, **pins: Any) -> Plan:
    ranks = functools.reduce(lambda a, b: a * b, mesh.values())
    return search(subject()[2].graph, Cluster.local(ranks), mesh, microbatches, pins={"precision": "fp8", "merge": True, **pins})


@pytest.mark.parametrize(
    ("mesh", "microbatches", "pins", "like"),
    [
        ({"tp": 1}, 1, {}, (1, 1)),
        ({"tp": 1}, 2, {}, (1, 2)),
        ({"tp": 2}, 1, {}, (2, 1)),
        ({"dp": 2}, 1, {"zero": True}, (1, 2)),
        ({"dp": 2}, 1, {"zero": False}, (1, 2)),
        ({"dp": 2, "tp": 2}, 2, {}, (2, 4)),
        ({"pp": 2, "tp": 2}, 2, {"schedule": "gpipe"}, (2, 2)),
    ],
    ids=str,
)
def test_it_is_the_emulation(mesh: dict[str, int], microbatches: int, pins: dict[str, Any], like: tuple[int, int]) -> None:
    model, kwargs, captured = subject()
    plan = planned(mesh, microbatches, **pins)
    assert len(plan.precision) == 6 and set(plan.precision.values()) == {"fp8"}
    program = compile(captured, Plan.from_yaml(plan.to_yaml()))
    found = follow(InProcess(program, copy.deepcopy(model)), kwargs, FLOAT64)
    worst = compare(emulated(*like), found, FLOAT64)[0]
    assert worst.ratio <= 1, worst
    assert worst.allowed < emulated(0, 1).losses[0] * 1e-6  # and the emulation is far from the plain model:
    assert compare(emulated(0, 1), found, FLOAT64)[0].ratio > 1e3


def test_what_is_cast_how_often() -> None:
    """Weights once a step, outside of the loop; x once for all that read it; of x the backward keeps one byte an element."""
    plan = planned({"tp": 1}, 2, merge=False)
    program = compile(subject()[2], plan)
    rank = program.ranks[0]
    casts = [call for call in rank.gathers if call.label == "casts"]
    assert [len(call.inputs) for call in casts] == [3, 3] and all(call.module.backward_input is None for call in casts)
    layer = next(call for call in rank.blocks if sum("fp8_matmul" in str(n.target) for n in call.module.forward.graph.nodes) == 3)
    count = lambda graph, op: sum(n.op == "call_function" and op in str(n.target) for n in graph.graph.nodes)
    assert count(layer.module.forward, "fp8_cast") == 2
    assert layer.module.backward is not None and count(layer.module.backward, "fp8_cast") == 3
    assert count(layer.module.backward, "fp8_matmul") == 6 and count(layer.module.backward, ".mm.") == 0
    saved = list(layer.module.forward.graph.nodes)[-1].args[0][layer.module.outputs :]
    tokens = BATCH * SEQ // 2
    kept = [v.meta["val"] for v in saved if v.op != "placeholder" and v.meta["val"].dtype == torch.float8_e4m3fn]
    assert sorted(v.shape for v in kept) == [(HIDDEN, tokens), (INNER, tokens)]


def test_which_linears() -> None:
    plan = planned({"tp": 1})
    notes = "\n".join(plan.notes)
    assert "they make the loss: head.weight" in notes and "multiples of 16 on every rank: low.weight and 1 more" in notes
    assert "multiplies no fp8" in notes
    # a rank's 8 rows of gate and 8 of up are 16 as one; its 8 columns of down are not
    ops = {op.name: op for op in subject()[2].graph.ops}
    assert {ops[name].inputs[1].split("_")[2] for name in planned({"tp": 8}).precision} == {"gate", "up"}
    assert not planned({"tp": 8}, merge=False).precision
    assert not search(subject()[2].graph, Cluster.local(1), {"tp": 1}, 1, pins={}).precision


def test_faults() -> None:
    plan = planned({"tp": 1})
    with pytest.raises(PinError, match="precision: 'fp4' is no recipe; expected fp8"):
        planned({"tp": 1}, precision="fp4")
    for change, message in (
        ({**plan.precision, "linear_99": "fp8"}, "linear_99: it isn't a linear"),
        (dict.fromkeys(plan.precision, "fp4"), "found the recipe 'fp4'"),
        ({next(iter(plan.precision)): "fp8"}, "are one matmul"),
    ):
        edited = Plan.from_yaml(plan.to_yaml())
        edited.precision = change
        with pytest.raises(PlanFileError, match=message):
            compile(subject()[2], edited)


def test_it_pays_where_matmuls_are_large() -> None:
    """On an H100, by price: large linears, not a router of a few rows; the step and what is kept become less."""
    with torch.device("meta"):
        model = nn.Sequential(*(Wide(4096, 8192) for _ in range(2)), nn.Linear(4096, 128, bias=False)).bfloat16()
        x = torch.empty(8, 1024, 4096, dtype=torch.bfloat16)
    captured = capture(model, (x,), loss=lambda y: y.float().square().mean())
    bf16, fp8 = (search(captured.graph, Cluster.load("h100x1"), {"tp": 1}, 1, pins=pins) for pins in ({}, {"precision": "fp8"}))
    paths = {v.name: v.path for v in captured.graph.sources("param")}
    ops = {op.name: op for op in captured.graph.ops}
    assert {paths[ops[name].inputs[1]] for name in fp8.precision} == {f"{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")}
    assert any("their casts cost more than they save: 0.router.weight" in note for note in fp8.notes)
    assert fp8.predicted["step_seconds"] < 0.75 * bf16.predicted["step_seconds"]
    kept = [plan.predicted["stages"][0]["memory"]["activations"] for plan in (bf16, fp8)]
    assert kept[1] < 0.9 * kept[0]


class Wide(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)
        self.router = nn.Linear(hidden, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x))) * torch.sigmoid(self.router(torch.tanh(x))).sum(-1, keepdim=True)


def losses(model: nn.Module, kwargs: dict[str, Any], precision: str | None, steps: int = 50) -> Sequence[float]:
    captured = capture(model, kwargs=kwargs)
    plan = search(captured.graph, Cluster.local(2), {"tp": 2}, 1, pins={"precision": precision} if precision else {})
    assert bool(plan.precision) == bool(precision)
    trained = InProcess(compile(captured, plan), copy.deepcopy(model))
    optimizer = trained.optimizer(torch.optim.AdamW, lr=3e-3)
    found = []
    for _ in range(steps):
        found.append(trained.train_step(**kwargs).item())
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_a_llama_learns_as_in_bf16() -> None:
    torch.manual_seed(0)
    model = layers.Decoder(VOCAB, hidden=64, attention=layers.RotaryAttention, mlp=layers.GatedMLP, norm=layers.RMSNorm, positions=0)
    ids = torch.randint(0, VOCAB, (4, 16))
    kwargs = {"ids": ids, "labels": ids}
    model = model.bfloat16()
    plain, eighth = losses(model, kwargs, None), losses(model, kwargs, "fp8")
    assert plain[-1] < 0.5 * plain[0]
    assert all(abs(a - b) < 0.03 * plain[0] for a, b in zip(plain, eighth, strict=True)), list(zip(plain, eighth, strict=True))
