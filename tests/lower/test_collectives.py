from __future__ import annotations

import torch

from autoshard.layout import P, R
from autoshard.lower.collectives import Spot, move


def test_a_whole_value_of_infinities_enters_a_pending_sum_once() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    terms = [move(mask, R, P, Spot("tp", 2, rank), False, first=torch.tensor(int(rank == 0))) for rank in range(2)]
    assert torch.equal(sum(terms), mask), terms
