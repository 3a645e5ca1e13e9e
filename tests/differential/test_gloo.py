"""The public way on real ranks: each calls `parallelize` for itself, and all equal the plain model."""

from __future__ import annotations

import pytest

from tests import zoo

from .matrix import MESHES, Trial, plan_of, subject
from .ranks import on_ranks
from .reference import FLOAT64, Trainer, build, precision


@pytest.mark.parametrize(
    ("family", "mesh", "microbatches", "plan"),
    [("plain_tied", "dp2.tp2", 4, "random0"), ("plain_fused", "tp2.pp2", 4, "best"), ("gpt2", "dp2", 1, "random1")],
)
def test_parallelize_equals_the_plain_model(family: str, mesh: str, microbatches: int, plan: str) -> None:
    trial = Trial(family, mesh, microbatches, plan)
    shared = subject(family, FLOAT64)
    chosen = plan_of(trial, shared.captured.graph)

    def make() -> Trainer:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        from autoshard.api import parallelize

        dist.init_process_group("gloo")
        axes = init_device_mesh("cpu", tuple(MESHES[mesh].values()), mesh_dim_names=tuple(MESHES[mesh]))
        model, kwargs = build(zoo.case(family), FLOAT64)
        with precision(FLOAT64):
            return parallelize(model, axes, kwargs=kwargs, loss=shared.case.loss, plan=chosen)

    for difference in on_ranks(trial.ranks, make, shared.kwargs, FLOAT64, shared.expected):
        assert difference.ratio <= 1, str(difference)
