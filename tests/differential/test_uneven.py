"""Batches that ranks or microbatches don't divide: loss, gradients and parameters equal one device's all the same.

Rows are dealt out as evenly as it goes: 5 over 2 ranks are 3 and 2, 3 over 4 ranks are 1, 1, 1 and none.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from autoshard.trace.capture import capture
from tests import zoo
from tests.zoo import Case
from tests.zoo.case import BATCH, Built

from .matrix import MESHES, Subject, Trial, judge, plan_of
from .reference import FLOAT64, build, precision, reference

SETTINGS = dataclasses.replace(FLOAT64, steps=2)
CASES = [
    ("llama", 5, "dp2.tp2", 1, "best"), ("plain_ignored", 6, "dp2", 3, "random0"), ("plain_ignored", 3, "dp4", 1, "best"),
    ("plain_sdpa_dropout", 5, "pp2.dp2.tp2", 5, "best"), ("plain_batch_norm", 7, "dp2", 1, "best"), ("mixtral", 3, "dp4", 3, "random1"),
    ("plain_loop_moe", 5, "dp2", 1, "random2"), ("plain_encoder_decoder", 1, "dp2", 1, "random0"), ("bert", 5, "pp2", 5, "best"),
]  # fmt: skip
"""(family, rows, mesh, microbatches, plan)."""


def shortened(case: Case, rows: int) -> Built:
    """The case's model with the first rows of its batch."""
    model, kwargs = case.build()
    return model, {k: v[:rows].clone() if isinstance(v, torch.Tensor) and len(v) == BATCH else v for k, v in kwargs.items()}


@pytest.mark.parametrize(("family", "rows", "mesh", "microbatches", "plan"), CASES)
def test_uneven_batches_are_exact(family: str, rows: int, mesh: str, microbatches: int, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MESHES, "dp4", {"dp": 4})
    case = dataclasses.replace(zoo.case(family), build=functools.partial(shortened, zoo.case(family), rows))
    model, kwargs = build(case, SETTINGS)
    with precision(SETTINGS):
        captured = capture(model, kwargs=kwargs, loss=case.loss)
    made = plan_of(Trial(family, mesh, microbatches, plan), captured.graph)
    assert made.microbatches == microbatches
    worst = judge(Subject(case, model, kwargs, captured, reference(case, SETTINGS)), made, SETTINGS, ranks=0)[0]
    assert worst.ratio <= 1, worst
