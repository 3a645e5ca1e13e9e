"""Attention with dropout against its reference with the same draws: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoshard.kernels import dropout_attention as kernel

SEED = torch.tensor(77)


def made(b: int, h: int, k: int, s: int, t: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    # in the memory order of a projection, not of the operator
    return [torch.randn(b, n, heads, e, generator=generator).to(dtype).transpose(1, 2) for heads, n in ((h, s), (k, t), (k, t))]


def masked(kind: str, b: int, s: int, t: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(4)
    if kind == "keys":  # padding
        return torch.arange(t).expand(b, 1, 1, t) < torch.tensor([t - 3, t // 2]).view(b, 1, 1, 1)
    if kind == "rows":  # one of them fully masked
        mask = torch.rand(b, 1, s, t, generator=generator) < 0.7
        mask[0, 0, 2] = False
        return mask
    return torch.randn(1, 1, s, t, generator=generator) if kind == "added" else None


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "odd": {"s": 37, "t": 37, "causal": True},
    "grouped": {"k": 2},
    "longer keys": {"s": 20, "t": 45},
    "padding": {"mask": "keys"},
    "a dead row": {"mask": "rows"},
    "added": {"mask": "added"},
    "wide": {"e": 40},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_it_is_its_reference(way, name, dtype, monkeypatch):
    for size in ("FORWARD_M", "QUERIES_M", "KEYS_M", "FORWARD_N", "QUERIES_N", "KEYS_N"):
        monkeypatch.setattr(kernel, size, 32)
    case: dict[str, Any] = {"k": 4, "s": 33, "t": 33, "e": 16, "causal": False, "mask": "", **CASES[name]}
    b, h, s, t = 2, 4, case["s"], case["t"]
    inputs = made(b, h, case["k"], s, t, case["e"], dtype)
    mask = masked(case["mask"], b, s, t)
    rest = [SEED, torch.arange(b) + 1, torch.arange(h) + 2, torch.arange(s) + 3, [b + 1, h + 2, s + 3, t], 0.2, case["causal"], 0.3]
    mine = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    out, lse = torch.ops.autoshard.dropout_attention(*mine, mask if mask is None or mask.dtype == torch.bool else mask.to(dtype), *rest)
    wanted, _ = kernel.reference(*wide, mask, *rest)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    found = [out, *torch.autograd.grad(out, mine, grad.to(dtype))]
    expected = [wanted, *torch.autograd.grad(wanted, wide, grad.double())]
    for a, e in zip(found, expected, strict=True):
        a, e = a.detach().double(), e.detach()
        assert float((a - e).abs().max()) <= (1e-5 if dtype == torch.float32 else 6e-3) * max(1.0, float(e.abs().max()))
    assert lse.shape == (b, h, s)


def test_the_operator():
    q, k, v = made(2, 4, 2, 9, 9, 8, torch.float32)
    places = [torch.arange(n) for n in (2, 4, 9)]
    inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), None, SEED, *places, [2, 4, 9, 9], 0.1, True, 0.3)
    torch.library.opcheck(torch.ops.autoshard.dropout_attention.default, inputs, test_utils=("test_schema", "test_faketensor"))
