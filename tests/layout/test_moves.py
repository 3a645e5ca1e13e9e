"""A move between two dims' shards, on uneven parts and on complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autoshard.layout import split_sizes
from autoshard.lower.collectives import Spot, all_to_all
from autoshard.mesh import Mesh
from autoshard.runtime.coroutine import coroutine
from autoshard.runtime.in_process import Player


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_all_to_all(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, dtype=dtype)
    rows, columns = split_sizes(5, 2), split_sizes(7, 2)

    def traced(rank: int, part: torch.Tensor) -> torch.fx.GraphModule:
        spot = Spot("tp", 2, rank)
        return make_fx(lambda t: (all_to_all(t, 0, 1, ((1, rows, 1),), ((1, columns, 1),), spot),), tracing_mode="fake")(part)

    runs = [coroutine(traced(rank, part))(part) for rank, part in enumerate(x.split(rows))]
    results = Player(Mesh(("tp",), (2,)), runs, str).play()
    for (found,), expected in zip(results, x.split(columns, 1), strict=True):
        assert torch.equal(found, expected)
