"""The grouped matmul against a loop over experts."""

from __future__ import annotations

import pytest
import torch

from autoshard.kernels import grouped_matmul

from .against import check, check_traced, draw

OP = torch.ops.autoshard.grouped_matmul


def ends(*sizes: int) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).int()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 0, 17, 1), (0, 0, 40), (33,), (0, 5, 0)])
def test_it_is_a_loop(way, sizes, dtype):
    n, e = sum(sizes), len(sizes)
    x, w = draw(n, 37, dtype=dtype), draw(e, 37, 21, dtype=dtype, seed=1)
    tolerance = None if dtype != torch.bfloat16 else 2e-2
    check(OP, grouped_matmul.reference, (x, w, ends(*sizes)), tolerance=tolerance)


def test_many_tiles(way):
    check(
        OP, grouped_matmul.reference, (draw(300, 130, dtype=torch.float32), draw(2, 130, 140, dtype=torch.float32, seed=1), ends(170, 130))
    )


def test_memory_orders_and_what_needs_no_gradient(way):
    x, w = draw(9, 12), draw(3, 7, 6, seed=1).transpose(1, 2)
    for wanted in ([0], [1], [0, 1]):
        check(OP, grouped_matmul.reference, (x[:, ::2], w, ends(4, 0, 5)), wanted=wanted)


@pytest.mark.silent
def test_nothing_in_nothing_out(way):
    x, w = torch.zeros(0, 4, requires_grad=True), torch.ones(2, 4, 3, requires_grad=True)
    OP(x, w, ends(0, 0)).sum().backward()
    assert x.grad.shape == (0, 4) and torch.equal(w.grad, torch.zeros(2, 4, 3))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"int32 \[experts\]"):
        OP(torch.ones(3, 4), torch.ones(2, 4, 5), torch.tensor([1, 3]))


def test_tracing_sees_two_nodes():
    names = ["autoshard.grouped_matmul.default", "autoshard.grouped_matmul_backward.default"]
    check_traced(OP, (draw(6, 4), draw(2, 5, 4, seed=1).transpose(1, 2), ends(2, 4)), names, [0, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 0, 17), (0, 0, 0), (70, 0, 1)])
def test_rows_behind_the_last_end_give_zeros_and_get_none(way, sizes, dtype):
    n = sum(sizes) + 66
    x, w = draw(n, 37, dtype=dtype), draw(3, 37, 21, dtype=dtype, seed=1)
    x[sum(sizes) :] = float("nan")  # what nobody wrote
    x, w = x.requires_grad_(), w.requires_grad_()
    out = OP(x, w, ends(*sizes))
    out.backward(torch.ones_like(out))
    assert torch.equal(out[sum(sizes) :], torch.zeros(66, 21, dtype=dtype))
    assert torch.equal(x.grad[sum(sizes) :], torch.zeros(66, 37, dtype=dtype)) and w.grad.isfinite().all()


def test_a_gradient_lies_as_its_matrices_do(way):
    for stored in (draw(3, 7, 6), draw(3, 6, 7).transpose(1, 2)):
        w = stored.requires_grad_()
        (dw,) = torch.autograd.grad(OP(draw(9, 7, seed=1), w, ends(4, 0, 5)).sum(), w)
        assert dw.shape == w.shape and dw.stride() == w.stride()
