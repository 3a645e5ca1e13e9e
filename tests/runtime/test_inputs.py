from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from autoshard.lower.program import RankInput
from autoshard.runtime.inputs import Reader, StepInputs, draw_masks

from .by_hand import program

CPU = torch.device("cpu")
BY_TIME_AND_DP = (("mb", ()), ("dp", ()))


def masks_of(shape, p, orders=(0,)):
    made = program()
    cuts = (BY_TIME_AND_DP, *((),) * (len(shape) - 1))
    for rank in made.ranks:
        rank.rank_inputs = {f"m{n}": RankInput("dropout", order=n, draw=(shape, (), p, "float32", cuts)) for n in orders}
    return made


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_exact_masks_are_what_torch_draws(p):
    made = masks_of((8, 3), p, (0, 1))
    torch.manual_seed(3)
    expected = [F.dropout(torch.ones(8, 3), p) for _ in range(2)]
    after = torch.rand(2)
    torch.manual_seed(3)
    masks = draw_masks(made.ranks)
    assert torch.equal(torch.rand(2), after)
    for n in range(2):
        assert torch.equal(masks[n], expected[n])


def test_masks_are_cut_as_the_batch_is():
    made = masks_of((8, 3), 0.5)
    masks = draw_masks(made.ranks)
    for rank in made.ranks:
        reader = Reader(made, rank, CPU)
        for mb in range(2):
            name = "x" if rank.stage == 0 else "y"
            data = torch.arange(8.0).unsqueeze(1)
            found = dict(reader.read(StepInputs({"x": data, "y": data}, 0, masks), mb))
            assert torch.equal(found["m0"], masks[0][found[name].flatten().long()])
            assert found[name].flatten().tolist() == [4 * mb + 2 * rank.coords["dp"], 4 * mb + 2 * rank.coords["dp"] + 1]
            assert torch.equal(dict(reader.read(StepInputs({"x": data, "y": data}), mb))["m0"], torch.ones(2, 3))


def test_seeds_differ_between_steps_and_ops_and_not_between_ranks():
    made = program()
    for rank in made.ranks:
        rank.rank_inputs = {f"s{n}": RankInput("seed", order=n) for n in range(2)}
    rows = []
    for rank in made.ranks:
        reader = Reader(made, rank, CPU)
        rows.append([int(t) for seed in range(2) for _, t in reader.read(StepInputs({}, seed), None)])
    assert rows[0] == rows[1] == rows[3]
    assert len(set(rows[0])) == 4
