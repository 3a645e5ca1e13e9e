"""LayerNorm against its reference, interpreted and plain."""

from __future__ import annotations

import itertools

import pytest
import torch

from autoshard.kernels import layer_norm

from .against import TOLERANCE, check, check_traced, draw, layouts, relative

OP, ADD = torch.ops.autoshard.layer_norm, torch.ops.autoshard.add_layer_norm
EPS = 1e-6
CASTS = list(itertools.product((0.0, 1.0), (False, True)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 123, 123), (3, 3), (130, 64)])
def test_it_is_its_reference(way, shape, dtype):
    x, w, b = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1), draw(shape[-1], dtype=dtype, seed=2)
    for offset, cast_first in CASTS if len(shape) == 2 else CASTS[-1:]:
        check(OP, layer_norm.reference, (x, w, b, EPS, offset, cast_first))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_with_a_residual(way, dtype):
    x, r, w, b = (draw(3, 7, 33, dtype=dtype, seed=i) for i in (0, 1, 2, 3))
    check(ADD, layer_norm.add_reference, (x, r, w[0, 0], b[0, 0], EPS))
    check(ADD, layer_norm.add_reference, (x, r, None, None, EPS, 0.0, True))
    check(ADD, layer_norm.add_reference, (x, r, w[0, 0], None, EPS), outputs=[0])


def test_it_is_torchs():
    for dtype in (torch.bfloat16, torch.float32):
        x, w, b = draw(4, 65, dtype=dtype), draw(65, dtype=dtype, seed=1), draw(65, dtype=dtype, seed=2)
        # torch sums the variance in another way
        theirs = torch.nn.functional.layer_norm(x, (65,), w, b, EPS)
        assert relative(OP(x, w, b, EPS), theirs) <= TOLERANCE[dtype]


def test_memory_orders(way):
    for x in layouts(draw(5, 12, 37)).values():
        check(OP, layer_norm.reference, (x, draw(74, seed=1)[::2], draw(74, seed=2)[::2], EPS))
        check(ADD, layer_norm.add_reference, (x, x * 2, None, None, EPS))


def test_what_needs_no_gradient(way):
    inputs = draw(5, 9), draw(9, seed=1), draw(9, seed=2), EPS
    for wanted in ([0], [1], [2], [0, 2]):
        check(OP, layer_norm.reference, inputs, wanted=wanted)


def test_a_large_common_offset_costs_only_what_the_input_lacks(way):
    x = draw(6, 200, dtype=torch.float32) + 1e3
    expected = layer_norm.reference(x.double(), None, None, EPS)
    assert (OP(x, None, None, EPS).double() - expected).abs().max() < 1e-3  # 1e3 · 2⁻²⁴ · a few; mean(x²) - mean(x)² would lose 1e6 · 2⁻²⁴
    nan = OP(torch.tensor([[torch.nan, 1.0], [2.0, 3.0]]), None, None, EPS)
    assert nan[0].isnan().all() and nan[1].isfinite().all()


@pytest.mark.silent
def test_nothing_in_nothing_out(way):
    for shape in ((0, 8), (3, 0, 8)):
        x = torch.zeros(shape, requires_grad=True)
        w = torch.ones(8, requires_grad=True)
        OP(x, w, w, EPS).sum().backward()
        assert x.grad.shape == shape and torch.equal(w.grad, torch.zeros(8))


def test_sums_of_weights_are_the_same_each_time(triton):
    x, w = draw(200, 48, dtype=torch.float32), draw(48, dtype=torch.float32, seed=1).requires_grad_()
    first, second = (torch.autograd.grad(OP(x, w, None, EPS).sum(), w)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_tracing_sees_two_nodes():
    names = ["autoshard.{}.default", "autoshard.layer_norm_backward.default"]
    x, w = draw(2, 3, 8, dtype=torch.bfloat16), draw(8, dtype=torch.bfloat16)
    check_traced(OP, (x, w, w, EPS), [n.format("layer_norm") for n in names])
    check_traced(ADD, (x.transpose(0, 1), x.transpose(0, 1) * 2, w, None, EPS, 1.0, True), [n.format("add_layer_norm") for n in names])
    check_traced(OP, (x, w.float(), w, EPS, 0.0, True), [n.format("layer_norm") for n in names])
