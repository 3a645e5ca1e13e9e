"""Fused cross entropy against torch's, whole and cut along the vocabulary."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from autoshard.kernels import cross_entropy

from .against import check, check_traced, draw, layouts, relative

PARTIALS, FULL = torch.ops.autoshard.head_partials, torch.ops.autoshard.linear_cross_entropy
ZERO = torch.tensor(0)


def problem(r: int, h: int, v: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, v, (r,), generator=torch.Generator().manual_seed(3))
    labels[1::4] = -100
    return draw(r, h, dtype=dtype), draw(v, h, dtype=dtype, seed=1) * h**-0.5, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 3.0)])
@pytest.mark.parametrize("shape", [(5, 123, 123), (9, 8, 5000), (1, 1, 1)])
def test_partials_are_their_reference(way, shape, scale, softcap, dtype):
    x, w, labels = problem(*shape, dtype)
    labels = labels % shape[2]
    # bf16: the logits are rounded; in their gradient, and in sums over the vocabulary, that adds up
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
    check(PARTIALS, cross_entropy.reference, (x, w, labels, ZERO, scale, softcap, 2 * shape[2] * x.element_size()), outputs=[1, 2, 3],
          wanted=[0, 1], tolerance=tolerance)  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_both_are_torchs(way, smoothing, softcap, z_loss):
    x, w, labels = problem(11, 7, 40)
    count = (labels != -100).sum().double()

    def theirs(x, w):
        z = 0.7 * (x @ w.t())
        z = softcap * torch.tanh(z / softcap) if softcap else z
        extra = (torch.where(labels != -100, z.logsumexp(-1).square(), 0.0)).sum() / count
        return F.cross_entropy(z, labels, label_smoothing=smoothing) + z_loss * extra

    def again(x, w):
        partials = PARTIALS(x, w, labels, ZERO, 0.7, softcap, 4 * 40 * 8)
        return cross_entropy.row_losses(*partials, labels, 40, -100, smoothing, z_loss).sum() / count

    def at_once(x, w):
        return FULL(x, w, labels, count, -100, smoothing, z_loss, 0.7, softcap, True, False, 4 * 40 * 8)[0]

    for mine in (again, at_once):
        check(lambda x, w: 3 * mine(x, w), lambda x, w: 3 * theirs(x, w), (x, w), tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_once_in_low_precision(way, dtype):
    x, w, labels = problem(40, 24, 300, dtype)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for wide_sum in (False, True):
        how = (-100, 0.0, 0.0, 1.0, 0.0, True, wide_sum, 10 * 300 * 4)
        inputs = (x, w, labels, torch.tensor(30.0), *how)
        check(lambda *a: FULL(*a)[0], cross_entropy.full_reference, inputs, wanted=[0, 1], tolerance=tolerance)


def test_a_cut_vocabulary_is_the_whole(way):
    x, w, labels = problem(9, 6, 31)
    whole = cross_entropy.row_losses(*cross_entropy.reference(x, w, labels, ZERO), labels, 31, -100, 0.1, 1e-3)
    cuts = [0, 10, 10, 24, 31]  # one of them empty
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    parts = [PARTIALS(leaves[0], leaves[1][a:b], labels, torch.tensor(a)) for a, b in itertools.pairwise(cuts)]
    most = torch.stack([top for top, *_ in parts]).amax(0)
    terms: list[list[torch.Tensor]] = [[] for _ in parts]
    for part, mine in zip(parts, terms, strict=True):  # what every shard hands to the all-reduce of the sums, in its order
        cross_entropy.combine(part, lambda top: most, lambda t, mine=mine: mine.append(t) or t)
    sums = [torch.stack(t).sum(0) for t in zip(*terms, strict=True)]
    combined = cross_entropy.row_losses(most, *sums, labels, 31, -100, 0.1, 1e-3)
    assert relative(combined, whole) < 1e-13
    exact = x.clone().requires_grad_(), w.clone().requires_grad_()
    reference = cross_entropy.row_losses(*cross_entropy.reference(*exact, labels, ZERO), labels, 31, -100, 0.1, 1e-3)
    seed = draw(9, seed=5)
    for mine, theirs in zip(torch.autograd.grad(combined, leaves, seed), torch.autograd.grad(reference, exact, seed), strict=True):
        assert relative(mine, theirs) < 1e-12


def test_memory_orders(way):
    x, w, labels = problem(6, 5, 12)
    for y in layouts(x).values():
        check(PARTIALS, cross_entropy.reference, (y, w.t().contiguous().t(), torch.stack([labels, labels], 1)[:, 0], ZERO),
              outputs=[1, 2, 3], wanted=[0, 1])  # fmt: skip


def test_what_needs_no_gradient(way):
    x, w, labels = problem(6, 5, 12)
    for wanted in ([0], [1]):
        check(PARTIALS, cross_entropy.reference, (x, w, labels, ZERO), outputs=[1, 2, 3], wanted=wanted)
    loss, _, dw = FULL(x.clone().requires_grad_(), w, labels, torch.tensor(3.0), weight_grad=False)
    loss.backward()
    assert dw.numel() == 0
    with pytest.raises(ValueError, match="weight_grad is off"):
        FULL(x, w.clone().requires_grad_(), labels, torch.tensor(3.0), weight_grad=False)


def test_extremes(way):
    w = torch.eye(4, dtype=torch.float32)
    x = torch.tensor([[1e4, -1e4, 0.0, 0.0], [-torch.inf, 0.0, 1.0, 2.0], [-1e30, -1e30, -1e30, -1e30]])
    x[1, 0] = -1e38
    labels = torch.tensor([1, 3, 2])
    losses = cross_entropy.row_losses(*PARTIALS(x, w, labels, ZERO), labels, 4)
    assert torch.allclose(losses, F.cross_entropy(x @ w.t(), labels, reduction="none"))
    all_ignored = FULL(x, w, torch.full((3,), -100), torch.tensor(1.0))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in all_ignored)


@pytest.mark.silent
def test_nothing_in_nothing_out(way):
    x, w = torch.zeros(0, 4, requires_grad=True), torch.zeros(7, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    FULL(x, w, labels, torch.tensor(1.0))[0].backward()
    sum(t.sum() for t in PARTIALS(x, w, labels, ZERO)[1:]).backward()
    assert torch.equal(w.grad, torch.zeros(7, 4))


def test_logits_never_exist_whole():
    x, w, labels = problem(1000, 4, 64)
    chunks = cross_entropy.Chunks(x, w, labels, ZERO, 1.0, 0.0, 64 * 8 * 200)
    assert chunks.buffer.shape == (128, 64) and [at.stop for at, _ in chunks][-1] == 1000
    assert cross_entropy.Chunks(x, w, labels, ZERO, 1.0, 0.0, 1).buffer.shape == (1, 64)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"expected \[r, h\], \[v, h\]"):
        PARTIALS(torch.ones(2, 3), torch.ones(4, 5), torch.zeros(2, dtype=torch.int64), ZERO)


def test_tracing_sees_two_nodes():
    x, w, labels = problem(6, 5, 12, torch.bfloat16)
    names = ["autoshard.head_partials.default", "autoshard.head_partials_backward.default"]
    check_traced(PARTIALS, (x, w, labels, ZERO), names, [0, 1])
    check_traced(FULL, (x, w, labels, torch.tensor(4.0)), ["autoshard.linear_cross_entropy.default"], [0, 1])
