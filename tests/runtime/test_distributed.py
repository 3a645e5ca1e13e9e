from __future__ import annotations

import os

import pytest
import torch

from autoshard.errors import BatchError, MeshError
from autoshard.kernels import backend
from autoshard.runtime.comm import Comm
from autoshard.runtime.in_process import InProcess
from autoshard.runtime.module import Sharded

from ..kernels.conftest import triton  # noqa: F401  (a fixture)
from .by_hand import Plain, batch, program
from .ranks import ranks

CPU = torch.device("cpu")


def follow(trainer):
    """Loss, gradients, norm and state of two steps, as plain lists."""
    optimizer = trainer.optimizer(torch.optim.AdamW, lr=0.05)
    seen = []
    for _ in range(2):
        loss = trainer.train_step(**batch(torch.float64))
        gradients = {k: g.tolist() for k, g in trainer.gradients().items()}
        seen.append((loss.item(), gradients, trainer.clip_grad_norm_(0.5).item()))
        optimizer.step()
        optimizer.zero_grad()
    return seen, trainer.eval_step(**batch(torch.float64)).item(), {k: t.tolist() for k, t in trainer.state_dict().items()}


def one_rank(options, compile=False):
    plain = Plain(torch.float64)
    if os.environ["RANK"] != "0":
        with torch.no_grad():
            plain.a.add_(1)  # other ranks' weights differ, and rank 0's count
    return follow(Sharded(program(dtype="float64", **options), plain, device=CPU, compile=compile))


@pytest.mark.parametrize("options", [{}, {"schedule": "gpipe", "split": True}], ids=str)
def test_real_ranks_equal_played_ones(options):
    expected = follow(InProcess(program(dtype="float64", **options), Plain(torch.float64)))
    for found in ranks(4, one_rank, options):
        assert found == expected  # the same ops in the same order: bit for bit


def poisoned_on(victim, value, norm):
    """A gradient that isn't finite in one rank's shard alone: which steps each rank takes, and what they change."""
    trainer = Sharded(program(), Plain(), device=CPU, compile=False)
    optimizer = trainer.optimizer(torch.optim.AdamW, lr=0.05)
    assert (optimizer.kernel is not None) == backend.interpreting()
    taken = []
    for bad in (False, True, False):
        before = [p.detach().clone() for p in trainer.parameters()]
        trainer.train_step(**batch())
        if bad and trainer.comm.rank == victim:
            next(p for p in trainer.parameters() if p.grad is not None).grad.view(-1)[-1] = value
        if norm is not None:
            trainer.clip_grad_norm_(1.0, norm)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters(), strict=True)))
    return taken, optimizer.skipped, optimizer.tells


@pytest.mark.parametrize(("victim", "value", "norm"), [(3, "nan", None), (0, "inf", None), (1, "nan", float("inf"))])
def test_all_ranks_leave_out_what_one_finds_not_finite(victim, value, norm):
    found = ranks(4, poisoned_on, victim, float(value), norm)
    assert found == [([True, False, True], 1, rank == 0) for rank in range(4)]


@pytest.mark.parametrize("norm", [None, 2.0])
def test_all_ranks_leave_it_out_where_kernels_step(norm, triton):  # noqa: F811
    found = ranks(4, poisoned_on, 2, float("nan"), norm)
    assert found == [([True, False, True], 1, rank == 0) for rank in range(4)]


def agree():
    comm = Comm(CPU)
    assert comm.share("plän" if comm.rank == 0 else "") == "plän"
    assert comm.share("" if comm.rank == 1 else "x", source=1) == ""

    def work():
        if comm.rank >= 1:
            raise BatchError(f"bad on {comm.rank}") if comm.rank == 1 else KeyError("x")

    with pytest.raises(BatchError, match="bad on 1"):
        comm.together(work)
    with pytest.raises(RuntimeError if comm.rank != 2 else KeyError, match="x"):
        comm.together(lambda: {}["x"] if comm.rank == 2 else None)
    assert comm.together(lambda: comm.rank) == comm.rank


def test_ranks_agree_on_texts_and_errors():
    ranks(3, agree)


def wrong_size():
    with pytest.raises(MeshError, match="4 ranks, but 2 are running"):
        Sharded(program(), Plain(), device=CPU)


def test_a_world_of_another_size_is_refused():
    ranks(2, wrong_size)
