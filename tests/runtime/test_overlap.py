"""What runs beside the loop: when, in which order, with the same numbers bit for bit, and without races."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from autoshard.lower import compile
from autoshard.lower.program import Program
from autoshard.plan.plan import Plan
from autoshard.plan.search import random_plan, search
from autoshard.runtime.executor import AHEAD, Step
from autoshard.runtime.in_process import InProcess
from autoshard.runtime.lane import Lane
from autoshard.runtime.module import Sharded
from autoshard.trace.capture import capture

from . import checkpoints
from .by_hand import _split
from .races import Watched
from .ranks import ranks

DOUBLE = torch.float64


def plan(mesh: dict[str, int], microbatches: int = 2, zero: bool = True, schedule: str = "1f1b", seed: int | None = None) -> Plan:
    """Of the small model, every block a bucket."""
    graph = checkpoints.subject(DOUBLE)[2].graph
    pins: dict[str, Any] = {"zero": zero, "buckets": 1, "schedule": schedule}
    if seed is None:
        return search(graph, mesh=mesh, microbatches=microbatches, pins=pins)
    return random_plan(graph, mesh=mesh, microbatches=microbatches, seed=seed)


def trainer(program: Program) -> InProcess:
    return InProcess(program, copy.deepcopy(checkpoints.subject(DOUBLE)[0]))


def steps(run: Any) -> list[Any]:
    """Losses, gradients and parameters of two steps, with gradients of two batches added up in the second."""
    kwargs = checkpoints.subject(DOUBLE)[1]
    optimizer, seen = run.optimizer(torch.optim.SGD, lr=0.1), []
    for times in (1, 2):
        seen += [run.train_step(**kwargs) for _ in range(times)]
        seen += [*run.gradients().values()]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *run.state_dict().values()]


def late(run: InProcess) -> InProcess:
    """Reduces everything at G, into new memory."""
    for x in run.training.executors:
        x.completed, x.unshared = {}, set()
        for call in x.rank.gathers:
            call.module.backward_in_place = None
    return run


CASES = [
    ({"dp": 2}, {}),
    ({"dp": 2}, {"microbatches": 1, "zero": False}),
    ({"dp": 2}, {"microbatches": 4, "zero": False}),
    ({"dp": 2, "tp": 2}, {"zero": False}),
    ({"pp": 2, "dp": 2}, {"microbatches": 4}),
    ({"pp": 2, "dp": 2}, {"schedule": "gpipe", "zero": False}),
    ({"pp": 2, "dp": 2}, {"split": True, "microbatches": 1}),
    ({"pp": 2, "dp": 2}, {"split": True, "seed": 4}),
    ({"dp": 2, "tp": 2}, {"seed": 2}),
]


def chosen(mesh: dict[str, int], options: dict[str, Any]) -> Plan:
    options = dict(options)
    split = options.pop("split", False)
    found = plan(mesh, **options)
    if split:
        found.instructions = [_split(actions) for actions in found.instructions]
    return found


@pytest.mark.parametrize(("mesh", "options"), CASES, ids=str)
def test_when_it_runs_changes_no_bit(mesh: dict[str, int], options: dict[str, Any]) -> None:
    captured, found = checkpoints.subject(DOUBLE)[2], chosen(mesh, options)
    run = trainer(compile(captured, found))
    assert all(x.completed for x in run.training.executors)
    expected = steps(late(trainer(compile(captured, found))))
    for mine, theirs in zip(steps(run), expected, strict=True):
        assert torch.equal(mine, theirs)


def played(run: InProcess) -> list[str]:
    """What rank 0 runs in a step: forwards and backwards of gathers and blocks, by name."""
    seen: list[str] = []

    def forward(self: Any, call: Any, env: Any, key: Any) -> Any:
        if self.x.rank.rank == 0 and key is not None:
            seen.append(f"{'P' if key[0] < 0 else 'F'}{key[1]}")
        return (yield from steps_forward(self, call, env, key))

    def backward(self: Any, call: Any, *rest: Any) -> Any:
        if self.x.rank.rank == 0:
            calls = self.x.rank.gathers if call in self.x.rank.gathers else self.x.calls
            seen.append(f"{'G' if calls is self.x.rank.gathers else 'B'}{calls.index(call)}")
        return (yield from steps_backward(self, call, *rest))

    steps_forward, steps_backward = Step.forward, Step.inputs_backward
    with mock.patch.object(Step, "forward", forward), mock.patch.object(Step, "inputs_backward", backward):
        run.train_step(**checkpoints.subject(DOUBLE)[1])
    return seen


@pytest.mark.parametrize("zero", [True, False])
def test_a_bucket_is_reduced_before_the_blocks_before_it_run_backward(zero: bool) -> None:
    run = trainer(compile(checkpoints.subject(DOUBLE)[2], plan({"dp": 2}, zero=zero)))
    x = run.training.executors[0]
    seen = played(run)
    gathers = range(len(x.rank.gathers))
    assert len(gathers) >= 4
    last = {name: len(seen) - 1 - seen[::-1].index(name) for name in seen}
    first = {name: seen.index(name) for name in seen}
    for g in gathers:
        users = [i for i, call in enumerate(x.calls) if set(call.inputs) & set(x.rank.gathers[g].outputs)]
        assert seen.count(f"G{g}") == seen.count(f"P{g}") == 1
        # after its last part, before the next block's backward
        assert last[f"B{users[0]}"] < last[f"G{g}"]
        assert all(last[f"G{g}"] < last[f"B{i}"] for i in range(users[0]) if f"B{i}" in last)
        # before its first use, not long before
        assert first[f"P{g}"] < first[f"F{users[0]}"]
        begun = [i for i in range(users[0]) if i and any(set(x.calls[i].inputs) & set(x.rank.gathers[h].outputs) for h in gathers)]
        assert all(first[f"F{i}"] < first[f"P{g}"] for i in begun[: -AHEAD - 1])


def test_a_gradient_that_stands_for_two_values_is_left_alone() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.place = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.randn(1, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return (self.second(torch.tanh(self.first(x) + self.place)) ** 2).mean()

    torch.manual_seed(0)
    model, x = Positions().double(), torch.randn(4, 8, 6, dtype=DOUBLE)
    captured = capture(model, kwargs={"x": x})
    program = compile(captured, search(captured.graph, mesh={"dp": 4}, microbatches=1, pins={"zero": False}))
    run = InProcess(program, copy.deepcopy(model))
    executor = run.training.executors[0]
    assert {name.split("|")[0] for name in set(executor.maker) - executor.unshared} >= {place(captured.graph)}
    assert executor.unshared, "weights of linears are products, which nobody else has"
    run.train_step(x=x)
    model(x).backward()
    for name, grad in run.gradients().items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-12, atol=1e-12)


def place(graph: Any) -> str:
    return next(v.name for v in graph.sources("param") if v.path == "place")


# ---- real ranks -----------------------------------------------------------------------------------------------------


def on_a_rank(found: Plan, watched: bool) -> Any:
    program = compile(checkpoints.subject(DOUBLE)[2], found)
    lane = Watched()
    with mock.patch.object(Sharded, "_lane", lambda self: lane if watched else Lane()):
        run = Sharded(program, copy.deepcopy(checkpoints.subject(DOUBLE)[0]), device=torch.device("cpu"), compile=False)
    if not watched:
        return [t.tolist() for t in steps(run)]
    kwargs = checkpoints.subject(DOUBLE)[1]
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    with lane:
        for _ in range(3):
            run.train_step(**kwargs)
            optimizer.step()
            optimizer.zero_grad()
    return lane.races, lane.accesses


@pytest.mark.parametrize("options", [{}, {"microbatches": 1, "zero": False}], ids=str)
def test_real_ranks_equal_played_ones(options: dict[str, Any]) -> None:
    found = plan({"dp": 2}, **options)
    expected = [t.tolist() for t in steps(trainer(compile(checkpoints.subject(DOUBLE)[2], found)))]
    assert ranks(2, on_a_rank, found, False) == [expected, expected]


@pytest.mark.parametrize("options", [{}, {"microbatches": 1, "zero": False}], ids=str)
def test_nothing_is_read_before_it_is_there_or_reused_while_it_is_read(options: dict[str, Any]) -> None:
    for races, accesses in ranks(2, on_a_rank, plan({"dp": 2}, **options), True):
        assert not races, races[:5]
        assert min(accesses) > 20


@pytest.mark.parametrize("rule", ["follow", "wait"])
def test_a_race_is_seen(rule: str) -> None:
    with mock.patch.object(Watched, rule, lambda self, ticket=None: None):
        found = ranks(2, on_a_rank, plan({"dp": 2}), True)
    assert all(races for races, _ in found)
