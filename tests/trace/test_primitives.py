"""attention, pick, dropout_mask and opaque against plain torch, and what tracing sees of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from autoshard.trace import primitives
from autoshard.trace.interpret import call, is_factory, is_pointwise, resolve
from autoshard.trace.promote import promote_float32

# relative to the largest element: a few roundings of the dtype
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_mask(kind: str, s: int, t: int) -> Tensor | None:
    if kind == "none":
        return None
    keep = torch.rand(2, 1, s, t, generator=torch.Generator().manual_seed(5)) > 0.3
    keep[0, 0, s // 2] = False  # a fully masked row
    return keep if kind == "bool" else torch.zeros(2, 1, s, t).masked_fill(~keep, -torch.inf)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item() if found.numel() else 0.0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "groups", "size", "value_size"), [(4, 4, 8, 8), (4, 2, 5, 7), (6, 1, 1, 3)])
@pytest.mark.parametrize(("s", "t"), [(7, 7), (5, 9), (9, 5)])
def test_attention_is_sdpa(dtype: torch.dtype, heads: int, groups: int, size: int, value_size: int, s: int, t: int) -> None:
    for kind, causal in itertools.product(("none", "bool", "float"), (False, True)):
        if causal and kind != "none":
            continue
        q, k, v = draw(2, heads, s, size), draw(2, groups, t, size, seed=1), draw(2, groups, t, value_size, seed=2)
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        mask = make_mask(kind, s, t)
        mask = mask.to(dtype) if kind == "float" else mask
        out = primitives.attention(*inputs, mask, causal, 0.4)
        out.backward(draw(*out.shape, dtype=dtype, seed=3))
        exact = [x.detach().double().requires_grad_() for x in inputs]
        wide = mask.double() if kind == "float" else mask
        expected = F.scaled_dot_product_attention(*exact, attn_mask=wide, is_causal=causal, scale=0.4, enable_gqa=heads != groups)
        expected.backward(draw(*out.shape, dtype=dtype, seed=3).double())
        for found, want in zip([out, *(x.grad for x in inputs)], [expected, *(x.grad for x in exact)], strict=True):
            assert relative(found, want.to(dtype)) <= TOLERANCE[dtype], (kind, causal)


def test_causal_and_mask_together() -> None:
    q, k, v = (draw(2, 2, 6, 4, seed=i).requires_grad_() for i in range(3))
    keep = make_mask("bool", 6, 6)
    assert keep is not None
    both = keep & torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(primitives.attention(q, k, v, keep, True, 0.5), primitives.attention(q, k, v, both, False, 0.5))


@pytest.mark.parametrize("shape", [(2, 2, 0, 4, 3), (2, 2, 3, 4, 0), (0, 2, 3, 4, 3), (2, 2, 3, 0, 3)])
def test_attention_of_nothing(shape: tuple[int, ...]) -> None:
    b, h, s, e, t = shape
    q, k, v = draw(b, h, s, e).requires_grad_(), draw(b, h, t, e).requires_grad_(), draw(b, h, t, e).requires_grad_()
    out = primitives.attention(q, k, v, None, False, 1.0)
    out.sum().backward()
    assert out.shape == (b, h, s, e) and not out.isnan().any()
    assert q.grad is not None and q.grad.shape == q.shape


def test_attention_passes_gradcheck_and_opcheck() -> None:
    q, k, v = draw(1, 4, 3, 2).requires_grad_(), draw(1, 2, 4, 2, seed=1).requires_grad_(), draw(1, 2, 4, 2, seed=2).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)[None, None]
    assert torch.autograd.gradcheck(lambda *x: primitives.attention(*x, mask, False, 0.7), (q, k, v))
    torch.library.opcheck(torch.ops.autoshard.attention.default, (q, k, v, mask, False, 0.7))


def targets(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_attention_stays_one_op_under_tracing() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(primitives.attention(q, k, v, None, True, 1.0).sum(), (q, k, v))

    with FakeTensorMode() as mode:
        q, k, v = (torch.empty(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    traced = make_fx(step, tracing_mode="fake")(q, k, v)
    assert mode is not None
    names = targets(traced.graph)
    assert [n for n in names if n.startswith("autoshard")] == ["autoshard.attention.default", "autoshard.attention_backward.default"]
    assert not any("softmax" in n or "bmm" in n for n in names)


def test_pick() -> None:
    x = draw(2, 3, 5).requires_grad_()
    labels = torch.tensor([[0, 4, -100], [7, 2, -1]])
    found = primitives.pick(x, labels)
    found.sum().backward()
    expected = torch.zeros_like(x)
    expected[0, 0, 0] = expected[0, 1, 4] = expected[1, 1, 2] = 1
    assert torch.equal(x.grad, expected)
    assert torch.equal(found, (x * expected).sum(-1))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("strides", [(12, 4, 1), (1, 8, 2)])
def test_dropout_mask_is_torchs_dropout(dtype: torch.dtype, strides: tuple[int, ...]) -> None:
    x = torch.empty_strided((2, 3, 4), strides, dtype=dtype).fill_(1)
    torch.manual_seed(3)
    expected = F.dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(primitives.dropout_mask(x.shape, 0.3, dtype, 0, x.stride()), expected)


# ---- opaque


def doubled(x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    return x.sin() * 2, n + 1, x.detach()


ENTRY = primitives.Opaque("test doubled", doubled, ((3,), (2,), (3,)), (torch.float64, torch.int64, torch.float64))


def test_opaque_runs_differentiates_and_traces() -> None:
    key = primitives.register_opaque("test_doubled", ENTRY)
    x, n = draw(3).requires_grad_(), torch.arange(2)
    a, b, c = primitives.opaque(key, [x, n])
    assert torch.equal(b, n + 1) and torch.equal(c, x) and c.data_ptr() != x.data_ptr()
    (a * 3).sum().backward()
    assert torch.allclose(x.grad, x.cos() * 6)

    def step(x: Tensor, n: Tensor) -> Tensor:
        return torch.autograd.grad(primitives.opaque(key, [x, n])[0].sum(), x)[0]

    assert [t for t in targets(make_fx(step, tracing_mode="fake")(x, n).graph) if t.startswith("autoshard")] == [
        "autoshard.opaque.default",
        "autoshard.opaque_backward.default",
    ]


def test_opaque_keys_are_shared_by_equals_only() -> None:
    key = primitives.register_opaque("test_doubled", ENTRY)
    assert key == primitives.register_opaque("test_doubled", ENTRY)
    other = primitives.Opaque("another", doubled, ENTRY.shapes, ENTRY.dtypes)
    assert primitives.register_opaque("test_doubled", other) == "test_doubled~2"


# ---- interpret, promote


def test_call_resolves_and_supplies_the_device() -> None:
    assert resolve("autoshard.pick.default") is primitives.pick
    assert is_factory("aten.arange.start_step") and not is_factory("aten._to_copy.default")
    assert is_pointwise("aten.where.ScalarOther") and not is_pointwise("aten.sum.dim_IntList")
    assert call("aten.full.default", ((2,), 1), {"dtype": "torch.int32"}, device="meta").device.type == "meta"
    parts = call("aten.split_with_sizes.default", (torch.arange(5), (2, 3), 0), {})
    assert isinstance(parts, tuple) and [len(p) for p in parts] == [2, 3]
    assert call("aten.cat.default", (parts, 0), {}).tolist() == [0, 1, 2, 3, 4]
    assert call("aten.index.Tensor", (torch.arange(6).view(2, 3), (None, torch.tensor([2]))), {}).tolist() == [[2], [5]]


def test_promote_float32_reaches_every_way_to_ask_for_it() -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    with promote_float32():
        asked = [
            x.float(), x.to(torch.float32), x.to(dtype=torch.float32), x.type(torch.float32), x.to("cpu", torch.float32),
            torch.zeros(2), torch.ones(2, dtype=torch.float32), torch.tensor(1.0), torch.arange(2).float(), torch.arange(2.0),
            F.softmax(x, -1, dtype=torch.float32), x.sum(dtype=torch.float32), x.new_zeros(2, dtype=torch.float32),
        ]  # fmt: skip
        assert {t.dtype for t in asked} == {torch.float64}
        assert x.to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.zeros(1).dtype == torch.float32
