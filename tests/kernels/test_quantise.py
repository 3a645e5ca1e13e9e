"""fp8 casts against torch's own, and a linear layer of them."""

from __future__ import annotations

import pytest
import torch

from autoshard.kernels import quantise

from .against import check_traced, draw, layouts, relative

OP, LINEAR = torch.ops.autoshard.quantise, torch.ops.autoshard.fp8_linear


def equal(found, expected) -> bool:
    """Bit for bit; any nan equals any."""
    found, expected = found.float(), expected.float()
    return found.shape == expected.shape and bool(((found == expected) | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", quantise.KINDS)
@pytest.mark.parametrize("shape", [(5, 123), (70, 67), (1, 1)])
def test_it_is_torchs_cast(way, shape, kind, dtype):
    x = draw(*shape, dtype=dtype) * 10 ** draw(*shape, seed=1).to(dtype)
    for scale in (None, torch.tensor(3.7), torch.tensor(1e-4), torch.tensor(1e6)):
        for transpose in (False, True):
            for found, expected in zip(OP(x, scale, kind, transpose), quantise.reference(x, scale, kind, transpose), strict=True):
                assert found.dtype == expected.dtype and equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", quantise.KINDS)
def test_a_cast_by_a_known_scale_is_torchs(way, kind, dtype):
    x = draw(130, 67, dtype=dtype) * 10 ** draw(130, 67, seed=1).to(dtype)
    for scale in (quantise.scale_of(quantise.largest(x), kind), torch.tensor(1e6)):
        for transpose in (False, True):
            expected = quantise.cast_reference(x, scale, kind, transpose)
            for found, wanted in zip(torch.ops.autoshard.fp8_cast(x, scale, kind, transpose), expected, strict=True):
                assert found.dtype == wanted.dtype and equal(found, wanted)
    assert quantise.largest(x) == x.abs().max() and quantise.largest(torch.full((2, 2), torch.nan)).isnan()


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_errors_are_those_of_the_format(way, kind):
    x = draw(40, 40, dtype=torch.float32)
    q, _, inverse, amax = OP(x, None, kind)
    back = q.float() * inverse
    assert amax == x.abs().max() and q.float().abs().max() == torch.finfo(q.dtype).max
    bits, smallest = (2.0**-4, 2.0**-10) if kind == "e4m3" else (2.0**-3, 2.0**-17)
    assert ((back - x).abs() <= bits * x.abs() * (1 + 1e-6) + smallest * inverse).all()


def test_extremes(way):
    x = torch.tensor([[0.0, -0.0, 1e30, -1e30, torch.inf, torch.nan, 1e-30, 448.0, 465.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9]])
    for kind in quantise.KINDS:
        found, expected = OP(x, torch.tensor(1.0), kind), quantise.reference(x, torch.tensor(1.0), kind)
        known = torch.ones(x.shape[1], dtype=torch.bool)
        if way.name == "triton" and kind == "e4m3":
            known[5] = False  # the interpreter's e4m3 has no nan; a GPU's has
        assert equal(found[0][:, known], expected[0][:, known]) and found[3].isnan()
    assert OP(torch.zeros(2, 2), None, "e4m3")[2] == 1


def test_delayed_scales_leave_room():
    history = torch.tensor([1.0, 7.0, 3.0])
    assert quantise.delayed_scale(history, "e4m3") == 448 / 7 and quantise.delayed_scale(history, "e5m2", margin=1) == 57344 / 14
    assert quantise.delayed_scale(torch.zeros(3), "e4m3") == 1


def test_memory_orders(way):
    for x in layouts(draw(6, 9, dtype=torch.float32)).values():
        for found, expected in zip(OP(x, None, "e4m3", True), quantise.reference(x, None, "e4m3", True), strict=True):
            assert equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_is_its_reference(way, dtype):
    x, w, g = draw(33, 48, dtype=dtype), draw(20, 48, dtype=dtype, seed=1), draw(33, 20, dtype=dtype, seed=2)
    mine, theirs = ([t.clone().requires_grad_() for t in (x, w)] for _ in range(2))
    found, expected = LINEAR(*mine)[0], quantise.linear_reference(*theirs)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert relative(found, expected) <= tolerance
    for f, e in zip(torch.autograd.grad(found, mine, g), torch.autograd.grad(expected, theirs, g), strict=True):
        assert f.dtype == dtype and relative(f, e) <= tolerance
    exact = x.double() @ w.double().t()
    assert ((found.double() - exact).square().mean() / exact.square().mean()).sqrt() < 2.0**-4
    only_x = x.clone().requires_grad_()
    LINEAR(only_x, w)[0].sum().backward()
    assert only_x.grad.shape == x.shape


@pytest.mark.silent
def test_nothing_in_nothing_out(way):
    q, turned, inverse, amax = OP(torch.zeros(0, 5), None, "e4m3", True)
    assert q.shape == (0, 5) and turned.shape == (5, 0) and inverse == 1 and amax == 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="expected one of e4m3, e5m2"):
        OP(torch.ones(2, 2), None, "e3m4")
    with pytest.raises(ValueError, match="expected a matrix"):
        OP(torch.ones(2), None, "e4m3")
    with pytest.raises(ValueError, match="one dtype"):
        LINEAR(torch.ones(2, 3), torch.ones(4, 5))


def test_tracing_sees_two_nodes():
    names = ["autoshard.fp8_linear.default", "autoshard.fp8_linear_backward.default"]
    check_traced(LINEAR, (draw(4, 6, dtype=torch.bfloat16), draw(5, 6, dtype=torch.bfloat16)), names)
    torch.library.opcheck(OP, (draw(4, 6, dtype=torch.float32), None, "e4m3", True), test_utils=("test_schema", "test_faketensor"))
