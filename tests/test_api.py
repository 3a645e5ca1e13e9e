from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoshard
from autoshard.api import _same_graph, parallelize
from autoshard.errors import CaptureError
from tests.runtime.ranks import ranks

TIGHT = {"rtol": 1e-10, "atol": 1e-12}  # float64; the order of sums differs


class Small(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout(p)) for _ in range(2)
        )
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, ids, labels):
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def batch(rows: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 32, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "labels": ids.roll(-1, 1)}


def same_as_plain(sharded, plain, steps=2, **data) -> None:
    optimizer, reference = sharded.optimizer(torch.optim.AdamW, lr=0.01), torch.optim.AdamW(plain.parameters(), lr=0.01)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, reference)]
    for _ in range(steps):
        loss = plain(**data)
        loss.backward()
        torch.testing.assert_close(sharded.train_step(**data), loss.detach(), **TIGHT)
        gradients = sharded.gradients()
        for name, param in plain.named_parameters():
            torch.testing.assert_close(gradients[name], param.grad, **TIGHT)
        total = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        torch.testing.assert_close(sharded.clip_grad_norm_(0.1), total, **TIGHT)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        for schedule in schedules:
            schedule.step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(sharded.state_dict()[name], tensor, **TIGHT)


def test_importing_the_package_imports_no_torch():
    code = (
        "import autoshard, sys; dir(autoshard); autoshard.Plan, autoshard.Cluster, autoshard.MeshError; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    for name in autoshard.__all__:
        assert getattr(autoshard, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        autoshard.nothing


def test_one_rank_needs_no_process_group():
    plain = Small()
    sharded = parallelize(Small(), "dp=1", kwargs=batch(), device="cpu")
    same_as_plain(sharded, plain, **batch())
    assert not torch.distributed.is_initialized()


def test_nothing_is_there_before_the_first_batch():
    sharded = parallelize(Small(), {"dp": 1}, device="cpu")
    with pytest.raises(autoshard.CaptureError, match="nothing is captured yet"):
        sharded.plan
    sharded.train_step(**batch())
    assert sharded.plan.microbatches >= 1


def test_a_new_shape_is_captured_once_and_reported(caplog):
    plain, sharded = Small(), parallelize(Small(), "dp=1", kwargs=batch(), device="cpu")
    with caplog.at_level(logging.INFO, logger="autoshard"):
        for data in (batch(4), batch(8), batch(4)):
            torch.testing.assert_close(sharded.train_step(**data), plain(**data).detach(), **TIGHT)
    assert sum("a new input shape" in r.message for r in caplog.records) == 1


def test_a_later_batch_that_does_not_divide_is_cut_finer(caplog):
    plain, sharded = Small(), parallelize(Small(), "dp=1", kwargs=batch(8), device="cpu", microbatches=4)
    for rows, says in ((8, ""), (6, "a batch of 6 doesn't divide into 4 microbatches: it runs in 6"), (3, "it runs in 3")):
        torch.testing.assert_close(sharded.train_step(**batch(rows)), plain(**batch(rows)).detach(), **TIGHT)
        plain(**batch(rows)).backward()
        assert says in caplog.text
    assert [p.plan.microbatches for p in sharded.source.programs] == [4, 6, 3]
    for name, gradient in sharded.gradients().items():  # of three batches, one after another
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, **TIGHT)


def test_microbatches_that_cannot_be(caplog):
    with pytest.raises(autoshard.BatchError, match=r"a batch of 8 doesn't divide into 3 microbatches\n  hint: give one of 1, 2, 4, 8"):
        parallelize(Small(), "dp=1", kwargs=batch(8), device="cpu", microbatches=3)
    plan = parallelize(Small(), "dp=1", kwargs=batch(8), device="cpu", microbatches=2).plan
    with pytest.raises(autoshard.BatchError, match="the plan has 2 microbatches, but 4"):
        parallelize(Small(), "dp=1", kwargs=batch(8), device="cpu", microbatches=4, plan=plan)

    class Whole(Small):
        def forward(self, ids, labels):
            return super().forward(ids, labels).exp()

    assert parallelize(Whole(), "dp=1", kwargs=batch(8), device="cpu", microbatches=2).plan.microbatches == 1
    assert "microbatches=2 isn't followed" in caplog.text and "exp" in caplog.text


def test_mistakes_are_told():
    with pytest.raises(autoshard.CaptureError, match="the model is a function"):
        parallelize(lambda x: x, "dp=1", kwargs=batch(), device="cpu")
    with pytest.raises(autoshard.BatchError, match=r"batch_dims names 'ids', which is no argument\n  hint: the arguments are kwargs.ids"):
        parallelize(Small(), "dp=1", kwargs=batch(), device="cpu", batch_dims={"ids": 0})
    sharded = parallelize(Small(), "dp=1", kwargs=batch(), device="cpu")
    with pytest.raises(autoshard.BatchError, match="train_step"):
        sharded(**batch())
    with pytest.raises(autoshard.BatchError, match="no output 'logits'"):
        sharded.eval_step(**batch(), outputs="logits")
    with pytest.raises(autoshard.OptimizerError, match="class is expected, found one of SGD"):
        sharded.optimizer(torch.optim.SGD(sharded.parameters()))
    with pytest.raises(autoshard.OptimizerError, match="AdamW has no 'weight_deca', which the group '\\*' sets"):
        sharded.optimizer(torch.optim.AdamW, groups=[("*", {"weight_deca": 0.0})])
    with pytest.raises(autoshard.MeshError, match="the device is cuda, but there is no GPU"):
        parallelize(Small(), "dp=1", kwargs=batch(), device="cuda")


def test_evaluation_has_no_dropout():
    plain, sharded = Small(p=0.5), parallelize(Small(p=0.5), "dp=1", kwargs=batch(), device="cpu")
    first, second = sharded.train_step(**batch()), sharded.train_step(**batch())
    assert first != second
    sharded.manual_seed(0)
    assert sharded.train_step(**batch()) == first
    torch.testing.assert_close(sharded.eval_step(**batch()), plain.eval()(**batch()).detach(), **TIGHT)


def test_a_plan_is_a_file_too(tmp_path):
    sharded = parallelize(Small(), "dp=1", kwargs=batch(), device="cpu")
    sharded.plan.save(tmp_path / "plan.yaml")
    again = parallelize(Small(), "dp=1", kwargs=batch(), device="cpu", plan=tmp_path / "plan.yaml")
    assert again.plan.to_yaml() == sharded.plan.to_yaml()
    with pytest.raises(autoshard.StalePlanError):
        parallelize(Small(), "dp=1", kwargs=batch(4), device="cpu", plan=sharded.plan)


@pytest.mark.parametrize(
    ("mesh", "error"),
    [
        ("dp=3", "dp=3 .* has 3 ranks, but 1 are running"),
        ({"dp": 2, "tp": 2}, "4 ranks, but 1"),
        ({"qp": 1}, "'qp' is not one that a plan can use"),
        ("cpux4", "4 ranks, but 1"),
        (7, "a mesh is given as int"),
    ],
)
def test_meshes_that_do_not_fit(mesh, error):
    with pytest.raises(autoshard.MeshError, match=error):
        parallelize(Small(), mesh, device="cpu")


def on_a_mesh(axes, options):
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    plain = Small()
    sharded = parallelize(Small(), mesh, kwargs=batch(), microbatches=2, **options)
    same_as_plain(sharded, plain, **batch())
    torch.testing.assert_close(sharded.eval_step(**batch(4)), plain(**batch(4)).detach(), **TIGHT)
    torch.testing.assert_close(sharded.train_step(**batch(4)), plain(**batch(4)).detach(), **TIGHT)
    return sharded.plan.to_yaml()


@pytest.mark.parametrize("axes", [{"dp": 2}, {"tp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_real_ranks_equal_the_plain_model(axes):
    plans = ranks(2 if len(axes) == 1 else 4, on_a_mesh, axes, {})
    assert len(set(plans)) == 1


def fails_alike():
    class Bad(Small):
        def forward(self, ids, labels):
            if torch.distributed.get_rank() == 1:
                raise ValueError("only here")
            return super().forward(ids, labels)

    with pytest.raises(Exception, match="only here"):
        parallelize(Bad(), "dp=2", kwargs=batch(), device="cpu")


def dealt_out():
    sharded = parallelize(Small(), "dp=2", kwargs=batch(), device="cpu")
    rank = torch.distributed.get_rank()
    for step in (sharded.train_step, sharded.eval_step):
        for rows in (slice(4 * rank, 4 * rank + 4), slice(0, 4 + rank)):
            with pytest.raises(autoshard.BatchError, match="rank 1 is given another batch than rank 0"):
                step(**{name: tensor[rows] for name, tensor in batch().items()})
    torch.testing.assert_close(sharded.train_step(**batch()), Small()(**batch()).detach(), **TIGHT)


def test_a_batch_that_is_dealt_out_to_the_ranks_is_refused():
    ranks(2, dealt_out)


def test_what_fails_on_one_rank_is_raised_on_all():
    ranks(2, fails_alike)


class OfItsRank(Small):
    """Computes something else on rank 1, as a model does that looks at the rank or at chance."""

    def forward(self, ids, labels):
        return super().forward(ids, labels) * (1.0 + int(os.environ["RANK"]))


def captures_another_graph() -> None:
    with pytest.raises(CaptureError, match="this rank captures the model as graph"):
        parallelize(OfItsRank(), "dp=2", kwargs=batch(), device="cpu")


def test_ranks_that_capture_different_graphs_are_refused() -> None:
    _same_graph("a", "a")
    with pytest.raises(CaptureError, match="as graph b, rank 0 as a"):
        _same_graph("b", "a")
    ranks(2, captures_another_graph)
