"""What a rank takes of a whole tensor, and that it is made in one copy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from autoshard.layout import I, Layout, S, dim_positions
from autoshard.lower.program import Slot
from autoshard.runtime.trainable import _shard
from autoshard.trace.graph import Tensor as Spec

from .memory import Peak

HEADS = ((1, 6, 8), (1, 4, 8))  # two segments: the parts aren't ranges
MINOR = ((16, 5, 1),)
LAYOUTS: list[Layout] = [
    (I, I), (S(0), I), (S(1), S(2)), (S(1), S(1)), (S(0, HEADS), I), (S(1, MINOR), S(0)), (S(0, HEADS), S(1, MINOR)),
    (S(2, HEADS), S(0, HEADS)), (S(0, HEADS), S(2)),
]  # fmt: skip
CPU = torch.device("cpu")


def slots(shape: tuple[int, ...], layout: Layout, sizes: tuple[int, int]) -> list[Slot]:
    return [Slot("w", Spec(shape, "float32"), layout, True, sizes, coords) for coords in itertools.product(*map(range, sizes))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_shards_are_the_positions_held(layout, transposed):
    shape = (80, 80, 80)
    whole = torch.arange(80**3, dtype=torch.float32).reshape(shape)
    whole = whole.permute(2, 0, 1) if transposed else whole
    seen = torch.zeros(shape, dtype=torch.int64)
    for slot in slots(shape, layout, (2, 3)):
        index = np.ix_(*(dim_positions(n, d, layout, slot.sizes, slot.coords) for d, n in enumerate(shape)))
        assert torch.equal(slot.take(whole), torch.from_numpy(whole.numpy()[index]))
        made = _shard(whole, slot, CPU)
        assert tuple(made.shape) == slot.local and made.is_contiguous() and torch.equal(made, slot.take(whole))
        assert made.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        seen[index] += 1
    with Peak() as peak:
        _shard(whole, slot, CPU)
    size = made.numel() * 4
    assert size <= peak.bytes <= size + 3 * 80 * 8 + 4096  # positions beside it
    copies = 6 // np.prod([n for t, n in zip(layout, (2, 3), strict=True) if t.kind == "S"], dtype=int)
    assert bool((seen == copies).all())


def test_a_rank_that_holds_nothing():
    (*_, last) = slots((2, 4), (S(0), I), (3, 1))
    assert last.local == (0, 4) and _shard(torch.ones(2, 4), last, CPU).shape == (0, 4)
