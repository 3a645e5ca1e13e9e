from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from autoshard.errors import BatchError
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


# ---- indices that the model doesn't know ------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"dp": 2}, {"pp": 2, "tp": 2}], ids=str)
def test_indices_out_of_range_are_refused_under_any_plan(mesh):
    from .test_features import Causal, batch, played

    trainer, good = played(Causal(), mesh), batch()
    table = r"kwargs.ids leads to index 32, but the table table.weight has 32 rows\n  at .*test_features.py:\d+\n  hint: expected 0 to 31$"
    classes = r"kwargs.labels leads to index 32, but there are 32 classes\n .*\n  hint: expected 0 to 31, or -100 for what is left out"
    for name, value, says in (
        ("ids", 32, table),
        ("ids", -1, "leads to index -1"),
        ("labels", 32, classes),
        ("labels", -2, "leads to index -2"),
    ):  # fmt: skip
        bad = {k: v.clone() for k, v in good.items()}
        bad[name][3, 2] = value
        for step in (trainer.train_step, trainer.eval_step):
            with pytest.raises(BatchError, match=says):
                step(**bad)
        with pytest.raises(IndexError):
            Causal()(**bad)
    assert not any(p.grad is not None for p in trainer.parameters())
    good["labels"][0, :3] = -100
    torch.testing.assert_close(trainer.train_step(**good), Causal()(**good)["loss"].detach(), rtol=1e-10, atol=1e-12)


def test_what_is_computed_of_the_batch_is_looked_at_not_the_batch():
    """Labels that are shifted away, ids that are clamped: as plain torch takes them."""
    from autoshard.api import parallelize

    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.other = torch.nn.Embedding(9, 4), torch.nn.Embedding(5, 4)

        def forward(self, ids, labels):
            x = self.table(ids) + self.other(ids.clamp(0, 4))
            logits = x @ self.table.weight.t()
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    ids = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = 99
    sharded = parallelize(Shifted(), "dp=1", kwargs={"ids": ids, "labels": labels}, device="cpu")
    torch.testing.assert_close(sharded.train_step(ids=ids, labels=labels), Shifted()(ids, labels).detach())
    labels[1, 1] = 99
    with pytest.raises(BatchError, match="leads to index 99, but there are 9 classes"):
        sharded.train_step(ids=ids, labels=labels)
