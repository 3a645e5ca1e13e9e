"""What users get wrong, each once: the error's class, what it says, where it says it is, and what it says to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoshard
from autoshard.errors import (
    AutoshardError,
    BatchError,
    CaptureError,
    CheckpointError,
    ClusterFileError,
    MeshError,
    NoPlanError,
    OptimizerError,
    PinError,
    PlanFileError,
    StalePlanError,
    StateError,
)
from autoshard.plan.plan import Plan
from autoshard.plan.search import search
from autoshard.trace.capture import capture


class Small(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x))).square().mean()


class Decides(Small):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # decides
            x = -x
        return super().forward(x)


class Numpy(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.detach().numpy().sum())  # leaves torch


class Unknown(Small):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        return self.two(torch.linalg.qr(hidden)[0] @ hidden).square().mean()  # no rule: runs whole, and the plan says so


class NoLoss(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def batch(n: int = 8, width: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(n, width)}


def graph(model: nn.Module | None = None) -> Any:
    return capture(model or Small(), kwargs=batch()).graph


@dataclass
class Mistake:
    name: str
    made: Callable[[Path], Any]
    error: type[AutoshardError]
    says: str
    where: str = ""
    hint: bool = True


def file(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def stale(folder: Path) -> None:
    plan = search(graph(), None, {"dp": 1})
    plan.check(capture(Small(16), kwargs=batch(width=16)).graph)


def broken_plan(folder: Path) -> None:
    text = search(graph(), None, {"dp": 1}).to_yaml()
    Plan.load(file(folder, "plan.yaml", text.replace("microbatches: 1", "microbatches: -1\nmicrobatch: 3")))


NOTHING = {"storage": {"ones.weight": "S(0)"}, "ops": {"lineer": "I, I -> I"}}


MISTAKES = [
    Mistake("control flow that depends on data", lambda f: capture(Decides(), kwargs=batch()), CaptureError, "data", "test_errors.py:"),
    Mistake("leaves torch", lambda f: capture(Numpy(), kwargs=batch()), CaptureError, "", "test_errors.py:"),
    Mistake("no scalar loss", lambda f: capture(NoLoss(), kwargs=batch()), CaptureError, "one floating number is expected"),
    Mistake("no tensors", lambda f: capture(Small(), kwargs={}), BatchError, "no argument is a tensor"),
    Mistake("a mesh of other size", lambda f: autoshard.parallelize(Small(), "dp=2 tp=2", kwargs=batch()), MeshError, "4 ranks, but 1"),
    Mistake("a mesh that isn't one", lambda f: autoshard.parallelize(Small(), "dp=two", kwargs=batch()), MeshError, "dp=two"),
    Mistake("an unknown cluster", lambda f: autoshard.Cluster.load("h100y4"), ClusterFileError, "h100y4"),
    Mistake("a plan that doesn't fit", lambda f: search(graph(), None, {"dp": 1}, memory=1000), NoPlanError, "memory|fits|needs"),
    Mistake("a pin of nothing", lambda f: search(graph(), None, {"dp": 1}, pins={"scedule": "gpipe"}), PinError, "did you mean schedule"),
    Mistake("pins of nothing", lambda f: search(graph(), None, {"dp": 1}, pins=NOTHING), PinError, "(?s)2 pins .* one.weight.* linear"),
    Mistake("a cluster without its x", lambda f: autoshard.Cluster.load("cpu4"), ClusterFileError, "did you mean cpux4"),
    Mistake("a stale plan", stale, StalePlanError, "another graph|was made for"),
    Mistake("a broken plan file", broken_plan, PlanFileError, r"(?s)plan\.yaml:\d+:1: unknown key.*plan\.yaml:\d+:15", hint=False),
    Mistake("a file that is no plan", lambda f: Plan.load(file(f, "p.yaml", "[1, 2")), PlanFileError, r"p\.yaml:\d+:\d+", hint=False),
    Mistake(
        "a cluster with several faults",
        lambda f: autoshard.Cluster.load(file(f, "c.yaml", "name: x\nname: y\ndevices: -3\nbogus: 1\n")),
        ClusterFileError, r"(?s)faults in.*c\.yaml:2:1: key .name. a second time.*c\.yaml:\d+:1: unknown key", hint=False,
    ),
    Mistake("another batch shape's value", lambda f: plain_step(torch.randn(8, 9)), AutoshardError, "9"),
    Mistake("a whole-tensor optimizer", lambda f: sharded().optimizer(torch.optim.LBFGS), OptimizerError, "LBFGS"),
    Mistake("an empty group", lambda f: sharded().optimizer(torch.optim.AdamW, [("head.*", {"lr": 1})]), OptimizerError, "head"),
    Mistake("weights of another model", lambda f: sharded().load_state_dict({"a": torch.ones(1)}), StateError, "unexpected", hint=False),
    Mistake("no checkpoint there", lambda f: sharded().load(f / "none"), CheckpointError, "", "none", hint=False),
]  # fmt: skip


def sharded() -> Any:
    return autoshard.parallelize(Small(), "dp=1", kwargs=batch(), device="cpu")


def plain_step(x: Tensor) -> None:
    sharded().train_step(x=x)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_an_error_says_what_where_and_what_to_do(mistake: Mistake, tmp_path: Path) -> None:
    with pytest.raises(mistake.error) as caught:
        mistake.made(tmp_path)
    error = caught.value
    assert isinstance(error, AutoshardError) and 3 <= error.exit_code <= 6
    assert re.search(mistake.says, str(error)), str(error)
    assert mistake.where in str(error), str(error)
    assert not mistake.hint or "hint:" in str(error), str(error)
    assert len(str(error).splitlines()) < 40, str(error)


def test_an_op_without_a_rule_runs_whole_and_the_plan_says_so() -> None:
    plan = search(graph(Unknown()), None, {"tp": 2})
    assert any("qr" in note and "test_errors.py" in note for note in plan.notes), plan.notes
