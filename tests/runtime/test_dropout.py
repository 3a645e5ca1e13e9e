"""Dropout by place: one model, the same loss and gradients under every plan, attention's probabilities included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard.lower import compile
from autoshard.plan.search import search
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture


class Block(nn.Module):
    def __init__(self, causal: bool, kv: int) -> None:
        super().__init__()
        self.causal, self.kv = causal, kv
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4 * kv), nn.Linear(16, 4 * kv)
        self.o, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=self.causal, enable_gqa=self.kv < 4)
        x = x + F.dropout(self.o(mixed.transpose(1, 2).reshape(b, s, 16)), 0.1)
        return x + F.dropout(self.down(F.gelu(self.up(x))), 0.1)


class Model(nn.Module):
    def __init__(self, causal: bool, kv: int) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(causal, kv) for _ in range(2)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


@pytest.mark.parametrize(("causal", "kv"), [(True, 4), (False, 2)])
def test_every_plan_drops_the_same(causal: bool, kv: int) -> None:
    torch.manual_seed(0)
    model, x = Model(causal, kv).double(), torch.randn(4, 10, 16, dtype=torch.float64)
    captured = capture(model, kwargs={"x": x})

    def step(mesh: dict[str, int], count: int) -> tuple[Any, dict[str, Tensor], str]:
        plan = search(captured.graph, mesh=mesh, microbatches=count)
        program = compile(captured, plan)
        run = InProcess(program, model)
        run.manual_seed(9)
        loss = run.train_step(x=x)
        return loss, run.gradients(), program.source(0)

    loss, gradients, text = step({"dp": 1}, 1)
    assert text.count("autoshard.dropout_attention(") >= 1
    for mesh, count in (({"tp": 2}, 1), ({"dp": 2}, 1), ({"dp": 1}, 2), ({"dp": 2, "tp": 2}, 2)):
        found, others, _ = step(mesh, count)
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-12, msg=f"{name} on {mesh}, {count} microbatches")
