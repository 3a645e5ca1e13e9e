"""Kernels in a routine: found in every spelling, kept out where they would change something, equal to the plain model in float64."""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard.errors import PlanFileError
from autoshard.lower import compile
from autoshard.lower.patterns import PATTERNS
from autoshard.lower.program import Program
from autoshard.plan.search import search
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture
from tests.differential.compare import compare
from tests.differential.reference import FLOAT64, Plain, follow

registry = pytest.importorskip("autoshard.kernels.registry")


class Norm(nn.Module):
    """RMSNorm as models spell it. `how`: what is cast where."""

    def __init__(self, hidden: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(0.1 * torch.randn(hidden) + (how != "offset"))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "torch":
            return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)
        wide = x.float() if x.dtype == torch.bfloat16 else x
        hat = wide * torch.rsqrt((wide * wide if self.how == "late" else wide.pow(2)).mean(-1, keepdim=True) + 1e-6)
        if self.how == "offset":
            return (hat * (1.0 + self.weight.to(hat.dtype))).type_as(x)
        if self.how == "late":
            return (hat * self.weight.to(hat.dtype)).to(x.dtype)
        return hat.type_as(x) if self.how == "bare" else self.weight * hat.to(x.dtype)


HOWS = ("torch", "llama", "offset", "late", "bare")


class Layer(nn.Module):
    def __init__(self, hidden: int, inner: int, how: str, act: str) -> None:
        super().__init__()
        self.norm, self.after, self.act = Norm(hidden, how), nn.LayerNorm(hidden), act
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        acts = {"silu": F.silu, "gelu": F.gelu, "tanh": functools.partial(F.gelu, approximate="tanh"), "sigmoid": torch.sigmoid}
        return x + self.down(acts[self.act](self.gate(h)) * self.up(h)) + 0.1 * self.after(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        acts = ("silu", "gelu", "tanh", "sigmoid", "silu")
        self.layers = nn.ModuleList(Layer(8, 12, how, act) for how, act in zip(HOWS, acts, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@functools.cache
def subject(dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model, kwargs = Model().to(dtype), {"x": torch.randn(6, 4, 8).to(dtype)}
    return model, kwargs, capture(model, kwargs=kwargs)


def program(mesh: dict[str, int], names: Any, dtype: torch.dtype = torch.float64, **pins: Any) -> Program:
    captured = subject(dtype)[2]
    return compile(captured, search(captured.graph, mesh=mesh, microbatches=1, pins={"kernels": list(names), **pins}))


def placed(found: Program) -> Counter[str]:
    names = [str(n.target).split(".") for c in found.ranks[0].blocks for n in c.module.forward.graph.nodes if n.op == "call_function"]
    return Counter(parts[1] for parts in names if parts[0] == "autoshard" and parts[1] in PATTERNS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_spelling_is_found(dtype: torch.dtype) -> None:
    found = placed(program({"dp": 1}, PATTERNS, dtype, merge=True))
    assert found == Counter(rms_norm=5, layer_norm=5, gated_mlp_packed=5)
    assert placed(program({"dp": 1}, PATTERNS, dtype, merge=False)) == Counter(rms_norm=5, layer_norm=5, gated_mlp=5)
    assert not placed(program({"dp": 1}, (), dtype))


@pytest.mark.parametrize(("mesh", "merge"), [({"dp": 2}, True), ({"tp": 2}, True), ({"tp": 3}, False)], ids=str)
def test_programs_with_kernels_equal_the_plain_model(mesh: dict[str, int], merge: bool) -> None:
    model, kwargs, _ = subject()
    made = program(mesh, PATTERNS, merge=merge)
    assert placed(made)["gated_mlp_packed" if merge else "gated_mlp"] == 5
    expected = follow(Plain(copy.deepcopy(model), None), kwargs, FLOAT64)
    worst = compare(expected, follow(InProcess(made, copy.deepcopy(model)), kwargs, FLOAT64), FLOAT64)[0]
    assert worst.ratio <= 1, worst


class Read(nn.Module):
    """What lies inside of a norm and of a gated product is read by others too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = Norm(8, "llama"), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        active = F.silu(self.gate(x))
        return (self.norm.weight * (x * root) + root + active * self.up(x) + active).square().mean()


class Turned(nn.Module):
    """Attention with rotary embedding, q and k of different heads; the tables computed, and of each row if `rows`."""

    def __init__(self, rows: bool, early: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 32, bias=False), nn.Linear(16, 16)
        self.rows, self.early = rows, early

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.qkv(torch.tanh(self.out(x))).split((16, 8, 8), -1))
        angle = (at if self.rows else at[:1])[..., None] * torch.tensor([1.0, 0.3], dtype=x.dtype)
        cos, sin = (f(torch.cat((angle, angle), -1)).unsqueeze(1) for f in (torch.cos, torch.sin))
        q = q * cos + torch.cat((-q[..., 2:], q[..., :2]), -1) * sin
        k = k + q.mean() if self.early else k
        k = k * cos + torch.cat((-k[..., 2:], k[..., :2]), -1) * sin
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).square().mean()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"tp": 2}], ids=str)
def test_rotary_takes_q_and_k_together(mesh: dict[str, int], rows: bool) -> None:
    torch.manual_seed(0)
    model = Turned(rows).double()
    kwargs = {"x": torch.randn(4, 6, 16, dtype=torch.float64), "at": torch.arange(24, dtype=torch.float64).view(4, 6) % 7}
    captured = capture(model, kwargs=kwargs)
    made = compile(captured, search(captured.graph, mesh=mesh, microbatches=1, pins={"kernels": ["rotary"]}))
    assert placed(made)["rotary"] == 1
    expected = follow(Plain(copy.deepcopy(model), None), kwargs, FLOAT64)
    worst = compare(expected, follow(InProcess(made, copy.deepcopy(model)), kwargs, FLOAT64), FLOAT64)[0]
    assert worst.ratio <= 1, worst


def test_rotary_waits_for_nobody() -> None:
    """k needs the turned q here, so that they can't be turned at once."""
    model = Turned(False, early=True).double()
    captured = capture(model, kwargs={"x": torch.randn(4, 6, 16, dtype=torch.float64), "at": torch.zeros(4, 6, dtype=torch.float64)})
    assert not placed(compile(captured, search(captured.graph, mesh={"dp": 1}, pins={"kernels": ["rotary"]})))


def test_what_others_read_stays_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    captured = capture(Read().double(), kwargs={"x": torch.randn(4, 8, dtype=torch.float64)})
    plan = search(captured.graph, mesh={"dp": 1}, pins={"kernels": list(PATTERNS)})
    with caplog.at_level(logging.WARNING, "autoshard"):
        assert not placed(compile(captured, plan))
    assert [m for m in caplog.messages if "the kernel rms_norm is in the plan, but no block has a place for it" in m]


@pytest.mark.parametrize("names", [["rms_nrom"], ["adamw"], ["rms_norm", "rms_norm"]])
def test_a_kernel_that_cant_be_placed_is_refused(names: list[str]) -> None:
    with pytest.raises(PlanFileError, match="can't be placed"):
        program({"dp": 1}, names)
    assert set(PATTERNS) <= {kernel.name for kernel in registry.KERNELS}
