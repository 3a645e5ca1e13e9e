"""Backward graphs that add the gradients of parameters to sums: the same numbers as adding what the plain graph returns."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autoshard.kernels.accumulate import applies, reference
from autoshard.lower.accumulate import accumulating

torch.manual_seed(0)
DY, X, W, G = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 3), (6, 4), (3, 4), (3,)))
aten = torch.ops.aten


def linear(dy, x, w):
    """dx; dW as linear layers spell it, transposed twice, and a bias' sum."""
    return dy @ w, (dy.t() @ x).t().t(), dy.sum(0)


def turned(dy, x, w):
    return dy @ w, (x.t() @ dy).t()


def straight(dy, x, w):
    return dy @ w, x.t() @ dy


def shared(dy, x, w):
    """One product is the gradient of two parameters, and goes into what is handed on."""
    product = dy.t() @ x
    return dy @ product, product, product


def passed(dy, x, w):
    """A gradient that is an input, and one that is a view of it."""
    return dy @ w, dy, dy.t()


@pytest.mark.parametrize("backward", [linear, turned, straight, shared, passed])
def test_sums_get_what_the_graph_would_return(backward):
    graph = make_fx(backward)(DY, X, W)
    dx, *gradients = graph(DY, X, W)
    sums = [torch.randn_like(g).contiguous() for g in gradients]
    wanted = [s + g for s, g in zip(sums, gradients, strict=True)]
    (found,) = accumulating(graph, 1)(DY, X, W, *sums)
    torch.testing.assert_close(found, dx)
    torch.testing.assert_close(sums, wanted)


def test_a_product_that_nobody_else_needs_is_never_made():
    graph = accumulating(make_fx(linear)(DY, X, W), 1)
    targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert targets.count(aten.mm.default) == 1 and targets.count(torch.ops.autoshard.matmul_into.default) == 1
    assert targets.count(aten.add_.Tensor) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_as_wide_as_it_is(dtype):
    a, b = torch.randn(5, 200).to(dtype), torch.randn(200, 7).to(dtype)
    into = torch.randn(5, 7)
    wanted = into.double() + a.double() @ b.double()
    torch.ops.autoshard.matmul_into(into, a, b)
    torch.testing.assert_close(into.double(), wanted, rtol=1e-5, atol=1e-4)
    assert applies(into, a, b) and not applies(into.half(), a.double(), b.double())


def test_the_operator_is_its_reference():
    a, b, into = torch.randn(5, 20).bfloat16(), torch.randn(20, 7).bfloat16(), torch.randn(5, 7)
    mine, theirs = into.clone(), into.clone()
    torch.ops.autoshard.matmul_into(mine, a, b)
    reference(theirs, a, b)
    torch.testing.assert_close(mine, theirs)
    torch.library.opcheck(torch.ops.autoshard.matmul_into.default, (into, a, b))
