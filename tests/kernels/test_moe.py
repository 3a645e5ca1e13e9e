"""Routing, moving rows to experts and back, and the whole mixture against a loop over experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from autoshard.kernels import moe

from .against import check, check_traced, draw, layouts

ROUTE, PERMUTE, UNPERMUTE = torch.ops.autoshard.moe_route, torch.ops.autoshard.moe_permute, torch.ops.autoshard.moe_unpermute


def choices(t: int, k: int, e: int) -> torch.Tensor:
    """k different experts for each token; the second is nobody's."""
    scores = torch.rand(t, e, generator=torch.Generator().manual_seed(2))
    scores[:, 1] = -1
    return scores.topk(k, -1).indices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [False, True])
def test_routing_is_its_reference(way, score, normalise, dtype):
    for t, e, k in ((30, 7, 2), (5, 123, 6), (2, 1, 1)):
        logits = draw(t, e, dtype=dtype)
        if e == 123 and dtype == torch.bfloat16:
            logits = torch.randperm(123, generator=torch.Generator().manual_seed(1)).repeat(t, 1).to(dtype) / 16  # no ties
        for bias in (None, draw(e, seed=1)):
            op = lambda *a: ROUTE(*a)[0]
            tolerance = 1e-5 if normalise and dtype == torch.float32 else None
            if e == 1 and (normalise or score == "softmax"):
                continue  # the gradient is 0
            check(op, lambda *a: moe.route_reference(*a)[0], (logits, bias, k, score, normalise, 2.5), wanted=[0], tolerance=tolerance)
            assert torch.equal(
                ROUTE(logits, bias, k, score, normalise)[1], moe.route_reference(logits.double(), bias, k, score, normalise)[1]
            )


def test_extreme_logits(way):
    w, experts = ROUTE(torch.tensor([[1e38, -1e38, 0.0], [-1e4, -1e4, -1e4]]), None, 2, "softmax", True)
    assert torch.allclose(w, torch.tensor([[1.0, 0.0], [0.5, 0.5]])) and experts[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_there_and_back(way, dtype):
    for t, k, e, h in ((9, 2, 4, 33), (50, 3, 5, 4), (3, 1, 2, 1100)):
        x, experts = draw(t, h, dtype=dtype), choices(t, k, e)
        check(lambda *a: PERMUTE(*a)[0], lambda *a: moe.permute_reference(*a)[0], (x, experts, e), wanted=[0])
        moved, position, ends = PERMUTE(x, experts, e)
        _, expected, expected_ends = moe.permute_reference(x, experts, e)
        assert torch.equal(position, expected) and torch.equal(ends, expected_ends) and ends[-1] == t * k
        check(UNPERMUTE, moe.unpermute_reference, (moved, position, draw(t, k, dtype=dtype, seed=4)))


def test_memory_orders(way):
    experts = choices(8, 2, 4)
    for x in layouts(draw(8, 6)).values():
        check(lambda *a: PERMUTE(*a)[0], lambda *a: moe.permute_reference(*a)[0], (x, experts.t().contiguous().t(), 4), wanted=[0])
    for moved in layouts(draw(16, 6)).values():
        position = PERMUTE(draw(8, 6), experts, 4)[1]
        check(UNPERMUTE, moe.unpermute_reference, (moved, position, draw(2, 8, seed=3).t()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_order_has_those_that_choose_none_last(way, dtype):
    drawn = torch.randint(-2, 9, (300,), generator=torch.Generator().manual_seed(5)).to(dtype)
    for index, count in ((drawn, 6), (torch.full((140,), 2, dtype=dtype), 4), (torch.full((9,), 7, dtype=dtype), 3), (drawn[::2], 1)):
        order, position, ends = torch.ops.autoshard.moe_order(index, count)
        for found, expected in zip((order, position, ends), moe.order_reference(index, count), strict=True):
            assert found.dtype == torch.int32 and torch.equal(found, expected)
        inside = (index >= 0) & (index < count)
        assert torch.equal(index[order][: ends[-1]], index[inside].sort().values) and ends[-1] == inside.sum()
        assert torch.equal(position[order], torch.arange(len(index)))


def test_an_order_is_of_whole_numbers():
    with pytest.raises(ValueError, match="whole numbers"):
        torch.ops.autoshard.moe_order(torch.ones(3), 2)


@pytest.mark.silent
def test_nothing_in_nothing_out(way):
    x = torch.zeros(0, 4, requires_grad=True)
    moved, position, ends = PERMUTE(x, torch.zeros(0, 2, dtype=torch.int64), 3)
    UNPERMUTE(moved, position, torch.zeros(0, 2)).sum().backward()
    assert ends.tolist() == [0, 0, 0] and x.grad.shape == (0, 4)
    assert ROUTE(torch.zeros(0, 4), None, 2, "softmax", True)[0].shape == (0, 2)


def loop(x, gate_up, down, weights, experts, activation):
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(experts == e)
        gate, up = (x[token] @ gate_up[e]).chunk(2, -1)
        out = out.index_add(0, token, (F.silu(gate) * up) @ down[e] * weights[token, slot].unsqueeze(-1))
    return out


def test_a_mixture_is_a_loop_over_experts(way):
    t, h, f, e, k = 21, 10, 7, 5, 2
    inputs = draw(t, h), draw(e, h, 2 * f, seed=1), draw(e, f, h, seed=2), draw(t, k, seed=3), choices(t, k, e), "silu"
    # the interpreter's float64 constants are float32 in places
    check(moe.mixture, loop, inputs, wanted=[0, 1, 2, 3], tolerance=1e-7)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="expected softmax or sigmoid"):
        ROUTE(torch.ones(2, 3), None, 1, "tanh", True)
    with pytest.raises(ValueError, match="found 4 choices"):
        ROUTE(torch.ones(2, 3), None, 4, "softmax", True)


def test_tracing_sees_two_nodes_each():
    def names(name: str) -> list[str]:
        return [f"autoshard.moe_{name}.default", f"autoshard.moe_{name}_backward.default"]

    experts = choices(4, 2, 3)
    check_traced(ROUTE, (draw(4, 3), None, 2, "softmax", True), names("route"), [0])
    check_traced(PERMUTE, (draw(4, 6), experts, 3), names("permute"), [0])
    moved, position, _ = PERMUTE(draw(4, 6), experts, 3)
    check_traced(UNPERMUTE, (moved, position, draw(4, 2)), names("unpermute"), [0, 2])
