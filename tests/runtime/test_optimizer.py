from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, optim

from autoshard.errors import OptimizerError
from autoshard.runtime.in_process import InProcess
from autoshard.runtime.optimizer import ELEMENTWISE, ShardedOptimizer

from .by_hand import Plain, batch, program


def params(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(5, 3, generator=g).to(dtype))) for name in ("layer.weight", "layer.bias")]


@pytest.mark.parametrize("cls", ELEMENTWISE, ids=lambda cls: cls.__name__)
def test_a_shard_steps_as_its_part_of_the_whole(cls):
    whole, half = nn.Parameter(params()[0][1].detach().clone()), nn.Parameter(params()[0][1].detach()[:2].clone())
    reference, ours = cls([whole], lr=0.1), ShardedOptimizer(cls, [("w", half)], lr=0.1)
    for step in range(3):
        whole.grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        half.grad = whole.grad[:2].clone()
        reference.step()
        ours.step()
    assert torch.equal(half, whole[:2])


class Norms(optim.SGD):
    """Says nothing about itself."""


class Signs(optim.SGD):
    elementwise = True


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (optim.LBFGS, "inner products over all parameters"),
        (optim.Adafactor, "whole matrices"),
        (Norms, "not known to work element by element"),
    ],
)
def test_what_looks_at_whole_tensors_is_refused(cls, why):
    with pytest.raises(OptimizerError, match=why):
        ShardedOptimizer(cls, params(), lr=0.1)
    ShardedOptimizer(Signs, params(), lr=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_have_float32_masters(dtype):
    named = params(dtype)
    exact = [p.detach().float().requires_grad_() for _, p in named]
    ours, reference = ShardedOptimizer(optim.AdamW, named, lr=1e-4), optim.AdamW(exact, lr=1e-4)
    for step in range(20):  # each step alone is too small for bfloat16 to see
        for (_, p), e in zip(named, exact, strict=True):
            p.grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
            e.grad = p.grad.float()
        ours.step()
        reference.step()
    for (_, p), e in zip(named, exact, strict=True):
        assert torch.equal(p, e.to(dtype))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_gradients_that_are_not_finite_are_seen_in_any_dtype(dtypes):
    named = [(f"p{i}", nn.Parameter(torch.ones(3, dtype=dtype))) for i, dtype in enumerate(dtypes)]
    named += [("empty", nn.Parameter(torch.ones(0))), ("idle", nn.Parameter(torch.ones(2)))]
    ours = ShardedOptimizer(optim.SGD, named, lr=0.1)
    for last in (torch.finfo(dtypes[1]).max, float("nan"), float("-inf")):  # the largest number is finite, its square isn't
        for _, p in named[:3]:
            p.grad = torch.ones_like(p)
        named[1][1].grad[-1] = last
        ours.step()
    assert ours.skipped == 2
    ours.zero_grad()
    ours.step()  # nothing to step
    assert ours.skipped == 2


def test_groups_by_name_and_schedulers():
    ours = ShardedOptimizer(optim.AdamW, params(), [("*.bias", {"weight_decay": 0.0})], ["layer.weight", "layer.bias"], lr=1.0)
    assert [(len(g["params"]), g["weight_decay"]) for g in ours.param_groups] == [(1, 0.0), (1, 0.01)]
    schedule = optim.lr_scheduler.StepLR(ours, 1, 0.1)
    ours.step()
    schedule.step()
    assert [g["lr"] for g in ours.inner.param_groups] == [0.1, 0.1]
    with pytest.raises(OptimizerError, match=r"matches 'head\.\*'"):
        ShardedOptimizer(optim.AdamW, params(), [("head.*", {})], ["layer.weight"], lr=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip(dtype):
    def train(optimizer, named, steps):
        for step in steps:
            for _, p in named:
                p.grad = torch.full_like(p, float(step + 1))
            optimizer.step()
            optimizer.zero_grad()

    named, again = params(dtype), params(dtype)
    first = ShardedOptimizer(optim.AdamW, named, lr=0.01)
    train(first, named, range(3))
    second = ShardedOptimizer(optim.AdamW, again, lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch's share their tensors, too
    for (_, p), (_, q) in zip(named, again, strict=True):
        if dtype == torch.float32:
            q.data.copy_(p)
        assert torch.equal(p, q)
    for optimizer, of in ((first, named), (second, again)):
        train(optimizer, of, range(3, 5))
    for (_, p), (_, q) in zip(named, again, strict=True):
        assert torch.equal(p, q)


def test_loaded_weights_reach_the_masters():
    plain = Plain(torch.bfloat16)
    ours = InProcess(program(dtype="bfloat16"), plain)
    optimizer = ours.optimizer(optim.SGD, lr=0.0)
    other = {name: t + 1 for name, t in plain.state_dict().items()}
    ours.load_state_dict(other)
    ours.train_step(**batch(torch.bfloat16))
    optimizer.step()
    assert torch.equal(ours.state_dict()["a"], other["a"])
