"""The gated product against its reference, interpreted and plain."""

from __future__ import annotations

import pytest
import torch

from autoshard.kernels import gated_mlp

from .against import check, check_traced, draw, layouts

OP, PACKED = torch.ops.autoshard.gated_mlp, torch.ops.autoshard.gated_mlp_packed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", gated_mlp.ACTIVATIONS)
def test_it_is_its_reference(way, activation, dtype):
    g, u = draw(2, 9, 123, dtype=dtype), draw(2, 9, 123, dtype=dtype, seed=1)
    # Triton's float64 erf and exp as the interpreter has them; constants are float32 where an operand is
    check(OP, gated_mlp.reference, (g * 2, u, activation), tolerance=1e-6 if dtype == torch.float64 else None)
    for gate_first in (True, False):
        check(PACKED, gated_mlp.packed_reference, (draw(4, 2 * 33, dtype=dtype), activation, gate_first),
              tolerance=1e-6 if dtype == torch.float64 else None)  # fmt: skip


def test_large_odd_shape(way):
    check(OP, gated_mlp.reference, (draw(5, 123, 123, dtype=torch.float32), draw(5, 123, 123, dtype=torch.float32, seed=1), "silu"))
    check(OP, gated_mlp.reference, (draw(1, 1500, dtype=torch.float32), draw(1, 1500, dtype=torch.float32, seed=1), "silu"))
    check(PACKED, gated_mlp.packed_reference, (draw(30, dtype=torch.float32), "silu"))


def test_memory_orders(way):
    for g in layouts(draw(3, 4, 10, dtype=torch.float32)).values():
        check(OP, gated_mlp.reference, (g, g * 0.5 + 1, "silu"))
        check(PACKED, gated_mlp.packed_reference, (g, "gelu"))


@pytest.mark.parametrize("activation", gated_mlp.ACTIVATIONS)
def test_extremes(way, activation):
    g = torch.tensor([-1e30, -100.0, -0.0, 0.0, 1e-30, 100.0, torch.nan, torch.inf]).requires_grad_()
    u = torch.ones(8, requires_grad=True)
    out = OP(g, u, activation)
    expected = gated_mlp.reference(g.detach(), u.detach(), activation)
    assert torch.allclose(out[:-1], expected[:-1], equal_nan=True)  # gelu(inf) is nan in torch, at times
    slope = torch.autograd.grad(out, g, torch.ones(8))[0]
    assert slope[:-2].isfinite().all() and slope[6].isnan() == (activation != "relu")


@pytest.mark.silent
def test_nothing_in_nothing_out(way):
    for shape in ((0, 8), (3, 0)):
        g = torch.zeros(shape, requires_grad=True)
        OP(g, g, "silu").sum().backward()
        PACKED(g, "silu").sum().backward()
        assert g.grad.shape == shape


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="expected one of silu"):
        OP(torch.ones(2), torch.ones(2), "swish")
    with pytest.raises(ValueError, match="found 3 columns"):
        PACKED(torch.ones(2, 3), "silu")


def test_tracing_sees_two_nodes():
    g = draw(4, 3, 8, dtype=torch.bfloat16).transpose(0, 1)
    check_traced(OP, (g, g * 2, "silu"), ["autoshard.gated_mlp.default", "autoshard.gated_mlp_backward.default"])
    check_traced(PACKED, (g, "gelu", False), ["autoshard.gated_mlp_packed.default", "autoshard.gated_mlp_packed_backward.default"])
