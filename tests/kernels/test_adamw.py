"""AdamW on flat shards against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch

from autoshard.kernels import adamw  # noqa: F401  (registers the operator)

from .against import draw, relative

OP = torch.ops.autoshard.adamw
HOW = (0.9, 0.95, 1e-8, 0.1)


def run(p, grads, master=None, moments=torch.float32, lr=1e-2, clip=None, skips=(), seed=None, how=HOW):
    m, v = torch.zeros_like(p, dtype=moments), torch.zeros_like(p, dtype=moments)
    step = torch.zeros((), dtype=torch.float32)
    for i, g in enumerate(grads):
        skip = torch.tensor(float(i in skips)) if skips else None
        step.add_(1.0 if skip is None else skip == 0)
        OP(p, g, m, v, master, torch.tensor(lr), step, clip, skip, seed, *how)
    return m, v


def exact(p, grads, lr=1e-2, how=HOW):
    q = torch.nn.Parameter(p.double())
    beta1, beta2, eps, decay = how
    optimizer = torch.optim.AdamW([q], lr=torch.tensor(lr).item(), betas=(beta1, beta2), eps=eps, weight_decay=decay)
    for g in grads:
        q.grad = g.double()
        optimizer.step()
    return q.detach()


@pytest.mark.parametrize("n", [1, 123, 5 * 123 * 3])
@pytest.mark.parametrize("how", [HOW, (0.0, 0.999, 1e-6, 0.0), (0.9, 0.9999, 1e-10, 0.3)])
def test_it_is_torchs(way, n, how):
    p = draw(n, dtype=torch.float32)
    grads = [draw(n, dtype=torch.float32, seed=i) for i in range(1, 5)]
    expected = exact(p, grads, how=how)
    run(p, grads, how=how)
    assert relative(p, expected) <= 1e-6  # a few of float32's ulp


def test_masters_keep_what_bf16_loses(way):
    p = draw(300, dtype=torch.bfloat16)
    master = p.float()
    grads = [draw(300, dtype=torch.bfloat16, seed=i) for i in range(1, 9)]
    expected = exact(master, grads, lr=1e-4)
    run(p, grads, master, lr=1e-4)
    assert relative(master, expected) <= 1e-6
    if way.name == "torch":
        assert torch.equal(p, master.bfloat16())
    else:  # the interpreter casts to bf16 by cutting off; a GPU rounds to nearest
        assert ((p.double() - master.double()).abs() <= 2.0**-7 * master.double().abs()).all()


def test_bf16_alone_and_bf16_moments(way):
    p = draw(300, dtype=torch.bfloat16)
    grads = [draw(300, dtype=torch.bfloat16, seed=i) for i in range(1, 4)]
    expected = exact(p, grads)
    run(p, grads, moments=torch.bfloat16)
    # three roundings of p to 8 bits, and each update (of 1e-2 at most) to 8 bits of its moments
    assert (p.double() - expected).abs().max() <= 3 * 2**-8 * expected.abs().max() + 3e-2 * 2**-5


def test_clipping_multiplies_the_gradient(way):
    p, q = draw(50, dtype=torch.float32), draw(50, dtype=torch.float32)
    grads = [draw(50, dtype=torch.float32, seed=i) for i in range(1, 4)]
    run(p, grads, clip=torch.tensor(0.25))
    run(q, [0.25 * g for g in grads])
    assert torch.allclose(p, q, rtol=1e-6)


def test_a_skipped_step_leaves_no_trace(way):
    p, q = draw(50, dtype=torch.float32), draw(50, dtype=torch.float32)
    good = [draw(50, dtype=torch.float32, seed=i) for i in (1, 2)]
    bad = torch.full((50,), torch.nan)
    moments = run(p, [good[0], bad, good[1]], skips={1})
    assert torch.equal(p, q) is False
    for mine, other in zip((*moments, p), (*run(q, good), q), strict=True):
        assert torch.equal(mine, other)


def test_rounding_by_chance_is_right_on_average(way):
    n = 4000
    p = torch.ones(n, dtype=torch.bfloat16)  # an update of 1/4 of an ulp below 1: to nearest, nothing would ever move
    seed = torch.tensor(5, dtype=torch.int64)
    how = (0.0, 0.0, 0.0, 0.0)
    run(p, [torch.ones(n)], lr=2.0**-10, seed=seed, how=how)
    moved = (p != 1).double().mean()
    assert set(p.tolist()) == {1.0, 1 - 2.0**-8}
    assert abs(moved - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5  # five standard deviations of n draws
    again, other = torch.ones(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    run(again, [torch.ones(n)], lr=2.0**-10, seed=seed, how=how)
    run(other, [torch.ones(n)], lr=2.0**-10, seed=seed + 1, how=how)
    assert torch.equal(again, p) and not torch.equal(other, p)


@pytest.mark.silent
def test_nothing_to_do(way):
    run(torch.zeros(0), [torch.zeros(0)])


def test_mistakes_are_named():
    p = torch.zeros(4)
    with pytest.raises(ValueError, match="expected one shape"):
        run(p, [torch.zeros(3)])
    with pytest.raises(ValueError, match="leave the seed out"):
        run(p, [torch.zeros(4)], seed=torch.tensor(1))
    with pytest.raises(ValueError, match="expected numbers from 0"):
        run(p, [torch.zeros(4)], how=(1.0, 0.9, 0.0, 0.0))


def test_its_schema_says_what_it_changes():
    p = draw(9, dtype=torch.float32)
    one = torch.tensor(1.0)
    torch.library.opcheck(
        OP, (p, p * 2, p * 0, p * 0, p.clone(), one, one, one, one * 0, None, *HOW), test_utils=("test_schema", "test_faketensor")
    )
