from __future__ import annotations

import os

import pytest
import torch

from autoshard.errors import BatchError, MeshError
from autoshard.runtime.comm import Comm
from autoshard.runtime.in_process import InProcess
from autoshard.runtime.module import Sharded

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
