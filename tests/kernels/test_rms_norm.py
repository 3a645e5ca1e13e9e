"""RMSNorm against its reference, interpreted and plain."""

from __future__ import annotations

import itertools

import pytest
import torch

from autoshard.kernels import rms_norm

from .against import check, check_traced, draw, layouts

OP, ADD = torch.ops.autoshard.rms_norm, torch.ops.autoshard.add_rms_norm
EPS = 1e-6
CASTS = list(itertools.product((0.0, 1.0), (False, True)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 123, 123), (3, 3), (130, 64)])
def test_it_is_its_reference(way, shape, dtype):
    x, w = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    for offset, cast_first in CASTS if len(shape) == 2 else CASTS[-1:]:
        check(OP, rms_norm.reference, (x, w, EPS, offset, cast_first))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_with_a_residual(way, dtype):
    x, r, w = (draw(3, 7, 33, dtype=dtype, seed=i) for i in (0, 1, 2))
    check(ADD, rms_norm.add_reference, (x, r, w[0, 0], EPS))
    check(ADD, rms_norm.add_reference, (x, r, None, EPS, 0.0, True))
    check(ADD, rms_norm.add_reference, (x, r, w[0, 0], EPS), outputs=[0])
    check(ADD, rms_norm.add_reference, (x, r[:1, :1], w[0, 0], EPS)) if way.name == "torch" else None


def test_orders_of_casting_are_those_of_models():
    x, w = draw(4, 65, dtype=torch.bfloat16), draw(65, dtype=torch.float32, seed=1)
    hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    assert torch.equal(OP(x, w, EPS, 0.0, True), w * hat.to(torch.bfloat16))  # Llama's: float32 where the weight is
    assert torch.equal(OP(x, w, EPS, 1.0, False), (hat * (1.0 + w)).to(torch.bfloat16))  # Gemma's
    assert torch.equal(OP(x, w.bfloat16(), EPS), torch.nn.functional.rms_norm(x, (65,), w.bfloat16(), EPS))


def test_a_wide_weight_makes_a_wide_result(way):
    x, w = draw(4, 65, dtype=torch.bfloat16), draw(65, dtype=torch.float32, seed=1)
    assert OP(x, w, EPS, 0.0, True).dtype == torch.float32 and OP(x, w, EPS, 0.0, False).dtype == torch.bfloat16
    check(OP, rms_norm.reference, (x, w, EPS, 0.0, True), tolerance=1.6e-2)  # x · r is rounded to bf16 on the way


def test_memory_orders(way):
    for x in layouts(draw(5, 12, 37)).values():
        check(OP, rms_norm.reference, (x, draw(74, seed=1)[::2], EPS))
        check(ADD, rms_norm.add_reference, (x, x * 2, None, EPS))


def test_what_needs_no_gradient(way):
    check(OP, rms_norm.reference, (draw(5, 9), draw(9, seed=1), EPS), wanted=[0])
    check(OP, rms_norm.reference, (draw(5, 9), draw(9, seed=1), EPS), wanted=[1])


def test_extremes(way):
    x = torch.tensor([[3e38, 1.0, -3e38, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-30, -1e-30, 0.0, 1e-38]])
    found = OP(x.double() * 1e100, None, EPS)
    assert torch.allclose(found, rms_norm.reference(x.double() * 1e100, None, EPS)) and found.isfinite().all()
    assert torch.equal(OP(x[1:], None, EPS)[0], torch.zeros(4))
    nan = OP(torch.tensor([[torch.nan, 1.0], [2.0, 2.0]]), None, EPS)
    assert nan[0].isnan().all() and nan[1].isfinite().all()


@pytest.mark.silent
def test_nothing_in_nothing_out(way):
    for shape in ((0, 8), (3, 0, 8)):
        x = torch.zeros(shape, requires_grad=True)
        w = torch.ones(8, requires_grad=True)
        OP(x, w, EPS).sum().backward()
        assert x.grad.shape == shape and torch.equal(w.grad, torch.zeros(8))


def test_sums_of_weights_are_the_same_each_time(triton):
    x, w = draw(200, 48, dtype=torch.float32), draw(48, dtype=torch.float32, seed=1).requires_grad_()
    first, second = (torch.autograd.grad(OP(x, w, EPS).sum(), w)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_tracing_sees_two_nodes():
    names = ["autoshard.{}.default", "autoshard.rms_norm_backward.default"]
    x, w = draw(2, 3, 8, dtype=torch.bfloat16), draw(8, dtype=torch.bfloat16)
    check_traced(OP, (x, w, EPS), [n.format("rms_norm") for n in names])
    check_traced(ADD, (x.transpose(0, 1), x.transpose(0, 1) * 2, w, EPS, 1.0, True), [n.format("add_rms_norm") for n in names])
    check_traced(OP, (x, w.float(), EPS, 0.0, True), [n.format("rms_norm") for n in names])
