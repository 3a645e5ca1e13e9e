"""Biases are added to the matmul itself, whatever shapes and splits stand between."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from autoshard.lower.biases import early_biases
from autoshard.lower.differentiate import _without_detach

aten = torch.ops.aten
X, W, B, C = torch.randn(2, 3, 4), torch.randn(4, 6), torch.randn(6), torch.randn(2)


def shaped(x, w, b, c):
    return (x.reshape(6, 4) @ w).reshape(2, 3, 6) + b


def parts(x, w, b, c):
    one, two = (x.reshape(6, 4) @ w).reshape(2, 3, 6).split_with_sizes([4, 2], -1)
    return one + b[:4].clone() * 0 + 1, two + c


def merged(x, w, b, c):
    one, two = (x.reshape(6, 4) @ w).reshape(2, 3, 6).split_with_sizes([4, 2], -1)
    return (one + b).sin(), (two + c).cos()


def read_elsewhere(x, w, b, c):
    product = (x.reshape(6, 4) @ w).reshape(2, 3, 6)
    return product + b, product.sin()


def changed(backward, *inputs):
    with FakeTensorMode() as mode:
        graph = make_fx(backward)(*(mode.from_tensor(x) for x in inputs))
    _without_detach(graph.graph)
    graph.recompile()
    expected = graph(*inputs)
    early_biases(graph.graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(*inputs), expected)
    sums = [n.args[0] for n in graph.graph.nodes if n.target is aten.add.Tensor]
    return [isinstance(n, torch.fx.Node) and n.target is aten.mm.default for n in sums]


CASES = [(shaped, B, [True]), (merged, B[:4].clone(), [True]), (read_elsewhere, B, [False])]


@pytest.mark.parametrize(("backward", "b", "at_the_matmul"), CASES)
def test_where_a_bias_is_added(backward, b, at_the_matmul):
    assert changed(backward, X, W, b, C) == at_the_matmul


def test_parts_of_which_one_has_none_stay():
    assert not any(changed(parts, X, W, B, C))
