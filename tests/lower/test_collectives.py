from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from autoshard.layout import P, R
from autoshard.lower import collectives
from autoshard.lower.collectives import Spot, all_gather, move, reduce_scatter


def test_a_whole_value_of_infinities_enters_a_pending_sum_once() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    terms = [move(mask, R, P, Spot("tp", 2, rank), False, first=torch.tensor(int(rank == 0))) for rank in range(2)]
    assert torch.equal(sum(terms), mask), terms


@pytest.mark.parametrize("shape", [(4, 3), (1, 4, 3), (1, 1, 4, 3), (2, 4, 3)], ids=str)
def test_parts_are_put_together_and_taken_along_a_dim(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    dim, local = len(shape) - 2, ((1, (2, 2), 1),)
    whole = torch.randn(shape, dtype=torch.float64)
    shards, spot = whole.chunk(2, dim), Spot("tp", 2, 1)
    copies: list[str] = []
    op = SimpleNamespace(
        wait_tensor=lambda x: x,
        all_gather_into_tensor=lambda x, n, axis: torch.cat([s.contiguous() for s in shards]),
        reduce_scatter_tensor=lambda x, how, n, axis: 2 * x.chunk(2)[1],
    )
    monkeypatch.setattr(collectives, "Op", op)
    for name in ("merge", "divide"):
        real = getattr(collectives, name)
        monkeypatch.setattr(collectives, name, lambda *a, real=real, name=name: (copies.append(name), real(*a))[1])
    assert torch.equal(all_gather(shards[1], dim, local, spot), whole)
    assert torch.equal(reduce_scatter(whole, dim, local, spot), 2 * shards[1])
    assert copies == ([] if shape[0] == 1 or dim == 0 else ["merge", "divide"]), "what lies in order on the wire isn't copied"
