"""Rotary embedding against its reference, and the reference against complex multiplication."""

from __future__ import annotations

import pytest
import torch

from autoshard.kernels import rotary

from .against import check, check_traced, draw, layouts, relative

OP, ONE, PACKED = torch.ops.autoshard.rotary, torch.ops.autoshard.rotary_one, torch.ops.autoshard.rotary_packed


def tables(b: int, s: int, w: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    angles = draw(b, s, w, seed=7)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv", "size", "rotated"), [(5, 5, 122, 0), (4, 2, 10, 6), (6, 1, 2, 0)])
def test_it_is_its_reference(way, heads, kv, size, rotated, interleaved, dtype):
    q, k = draw(2, heads, 3, size, dtype=dtype), draw(2, kv, 3, size, dtype=dtype, seed=1)
    r = rotated or size
    for batch, width in ((1, r), (2, r // 2)):
        check(OP, rotary.reference, (q, k, *tables(batch, 3, width, dtype), rotated, interleaved), wanted=[0, 1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_one(way, interleaved):
    x = draw(2, 3, 5, 8)
    for rotated in (0, 4):
        check(ONE, rotary.one_reference, (x, *tables(1, 5, rotated or 8), rotated, interleaved), wanted=[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_packed(way, interleaved, dtype):
    qkv = draw(2, 5, (3 + 2 * 2) * 12, dtype=dtype)
    for rotated in (0, 4):
        check(PACKED, rotary.packed_reference, (qkv, *tables(2, 5, rotated or 12, dtype), 3, 2, rotated, interleaved), wanted=[0])


def test_interleaved_pairs_are_complex_numbers():
    q, angles = draw(1, 2, 5, 8), draw(1, 5, 4, seed=3)
    turned = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    assert relative(OP(q, q, angles.cos(), angles.sin(), 0, True)[0], turned) < 1e-14


def test_memory_orders(way):
    cos, sin = tables(1, 4, 6)
    for x in layouts(draw(2, 4, 3, 6)).values():
        check(OP, rotary.reference, (x.transpose(1, 2), x.transpose(1, 2) * 2, cos[:, :4], sin, 0, False), wanted=[0, 1])
    for c in layouts(cos).values():
        q = draw(2, 3, 4, 6)
        check(OP, rotary.reference, (q, q * 2, c, sin, 0, False), wanted=[0, 1])
        check(ONE, rotary.one_reference, (q.transpose(0, 1)[:1].expand(2, 2, 4, 6), c, sin, 0, False), wanted=[0])
    qkv = layouts(draw(2, 4, 30))["apart"]
    check(PACKED, rotary.packed_reference, (qkv, cos, sin, 3, 1, 0, False), wanted=[0])


def test_what_is_passed_on_is_passed_on_whole(way):
    q = draw(1, 2, 3, 8)
    q[..., 6:] = torch.tensor([torch.inf, torch.nan])
    out, _ = OP(q, q, *tables(1, 3, 6), 6, False)
    assert torch.equal(out[..., 6], q[..., 6]) and out[..., 7].isnan().all() and out[..., :6].isfinite().all()


@pytest.mark.silent
def test_nothing_in_nothing_out(way):
    q = torch.zeros(2, 3, 0, 8)
    assert OP(q, q, torch.zeros(1, 0, 8), torch.zeros(1, 0, 8))[0].shape == q.shape


def test_mistakes_are_named():
    q, (cos, sin) = draw(1, 2, 3, 8), tables(1, 3, 8)
    with pytest.raises(ValueError, match="7 of 8 elements"):
        OP(q, q, cos, sin, 7)
    with pytest.raises(ValueError, match="get no gradient"):
        OP(q.requires_grad_(), q, cos.requires_grad_(), sin)


def test_tracing_sees_two_nodes():
    q, k = draw(2, 5, 4, 8).transpose(1, 2), draw(2, 5, 2, 8).transpose(1, 2)
    check_traced(OP, (q, k, *tables(1, 5, 8)), ["autoshard.rotary.default", "autoshard.rotary_backward.default"], [0, 1])
    check_traced(ONE, (q, *tables(1, 5, 8)), ["autoshard.rotary_one.default", "autoshard.rotary_one_backward.default"], [0])
    names = ["autoshard.rotary_packed.default", "autoshard.rotary_packed_backward.default"]
    check_traced(PACKED, (draw(2, 5, 64), *tables(1, 5, 4), 4, 2), names, [0])
