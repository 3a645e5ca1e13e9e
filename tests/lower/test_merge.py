"""Linears of one input as one matmul: equal to the plain model however their weights are stored, and only where that is legal and pays."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard.errors import PinError, PlanFileError, StateError
from autoshard.lower import compile
from autoshard.plan.cluster import Cluster
from autoshard.plan.merge import weights
from autoshard.plan.plan import Plan
from autoshard.plan.search import search
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import Captured, capture
from tests.differential.compare import compare
from tests.differential.reference import FLOAT64, Outcome, Plain, follow


class Mixed(nn.Module):
    """Of one input: q, k, v of sizes that don't divide, one with a bias; two frozen ones; two adapters of low rank; and one whose weight is
    used again."""

    def __init__(self, hidden: int = 12, rank: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(hidden, hidden)
        self.q, self.k, self.v = nn.Linear(hidden, 9), nn.Linear(hidden, 3, bias=False), nn.Linear(hidden, 6, bias=False)
        self.base, self.other = nn.Linear(hidden, 8, bias=False), nn.Linear(hidden, 4, bias=False)
        self.down, self.side = nn.Linear(hidden, rank, bias=False), nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(rank, 8, bias=False)
        self.again = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(30, hidden)
        for layer in (self.base, self.other):
            layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.stem(x)
        gate = torch.tanh(self.q(h)).unflatten(-1, (3, 3)) * self.k(h).unsqueeze(-1)
        low = self.up(self.down(h) * torch.sigmoid(self.side(h)))
        y = self.out(torch.cat([gate.flatten(-2), gate[..., 0], self.v(h), self.base(h) + low, self.other(h)], -1))
        return (y + self.again(self.again(h))).square().mean()


@functools.cache
def subject() -> tuple[Mixed, dict[str, Tensor], Captured, Outcome]:
    torch.manual_seed(0)
    model, kwargs = Mixed().double(), {"x": torch.randn(8, 4, 12, dtype=torch.float64)}
    return model, kwargs, capture(model, kwargs=kwargs), follow(Plain(copy.deepcopy(model), None), kwargs, FLOAT64)


def planned(mesh: dict[str, int], microbatches: int = 1, **pins: Any) -> Plan:
    ranks = functools.reduce(lambda a, b: a * b, mesh.values())
    return search(subject()[2].graph, Cluster.local(ranks), mesh, microbatches, pins={"merge": True, **pins})


def trainer(plan: Plan) -> InProcess:
    model, _, captured, _ = subject()
    return InProcess(compile(captured, plan), copy.deepcopy(model))


MESHES = [
    ({"dp": 1}, {}), ({"tp": 2}, {}), ({"tp": 3}, {}), ({"dp": 2}, {"zero": False}), ({"dp": 2}, {}), ({"dp": 3}, {}),
    ({"dp": 2, "tp": 2}, {}), ({"dp": 2, "tp": 2}, {"zero": False}), ({"pp": 2, "dp": 2}, {}), ({"dp": 2}, {"buckets": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("mesh", "pins"), MESHES, ids=str)
def test_merged_programs_equal_the_plain_model(mesh: dict[str, int], pins: dict[str, Any]) -> None:
    _, kwargs, captured, expected = subject()
    plan = planned(mesh, 2 if mesh.get("pp") else 1, **pins)
    merged = {path for group in weights(plan.merge, captured.graph) for path in group}
    assert {"base.weight", "other.weight"} <= merged and "again.weight" not in merged, merged
    worst = compare(expected, follow(trainer(plan), kwargs, FLOAT64), FLOAT64)[0]
    assert worst.ratio <= 1, worst


def matmuls(program: Any) -> int:
    return sum("mm.default" in str(n.target) for call in program.ranks[0].blocks for n in call.module.forward.graph.nodes)


def test_there_are_fewer_matmuls() -> None:
    captured = subject()[2]
    groups = {frozenset(g) for g in weights(planned({"dp": 1}).merge, captured.graph)}
    assert groups == {frozenset(("base.weight", "other.weight")), frozenset(f"{n}.weight" for n in ("q", "k", "v", "down", "side"))}
    before, after = (matmuls(compile(captured, planned({"dp": 1}, merge=merge))) for merge in (False, True))
    assert before - after == 5


def test_parameters_and_gradients_are_views_of_one_buffer() -> None:
    model, kwargs, _, _ = subject()
    run = trainer(planned({"tp": 2}))
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    run.train_step(**kwargs)
    run.clip_grad_norm_(1e-3)
    checked = 0
    for state in run.states:
        for paths, whole in state.joined.items():
            parts = [state.params[path] for path in paths]
            assert torch.equal(torch.cat([p.detach() for p in parts]), whole)
            assert {p.untyped_storage().data_ptr() for p in parts} == {whole.untyped_storage().data_ptr()}
            if parts[0].requires_grad:
                assert len({p.grad.untyped_storage().data_ptr() for p in parts}) == 1  # type: ignore[union-attr]
                checked += 1
    assert checked
    optimizer.step()
    run.load_state_dict(model.state_dict())
    for state in run.states:
        for paths, whole in state.joined.items():
            assert torch.equal(torch.cat([state.params[path].detach() for path in paths]), whole)
    for name, tensor in run.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_two_programs_share_a_buffer_or_are_refused() -> None:
    model, kwargs, captured, _ = subject()
    all_of_them, some = planned({"dp": 1}), planned({"dp": 1}, merge=[["q.weight", "k.weight"]])
    assert weights(some.merge, captured.graph) == [("q.weight", "k.weight")]
    apart = planned({"dp": 1}, merge=False)
    for evaluation in (all_of_them, apart):
        run = InProcess(compile(captured, all_of_them), copy.deepcopy(model), evaluation=compile(captured, evaluation))
        torch.testing.assert_close(run.eval_step(**kwargs), run.train_step(**kwargs), rtol=1e-12, atol=0)
    with pytest.raises(StateError, match="should lie in one buffer"):
        InProcess(compile(captured, all_of_them), copy.deepcopy(model), evaluation=compile(captured, some))


def test_pins_notes_and_edited_plans() -> None:
    captured = subject()[2]
    plan = planned({"tp": 2})
    assert Plan.from_yaml(plan.to_yaml()) == plan and plan.merge
    assert any("a weight has other uses: again.weight" in note for note in plan.notes), plan.notes
    assert not planned({"tp": 2}, merge=False).merge
    with pytest.raises(PinError, match=r"parameter 'nothing\.weight'"):
        planned({"tp": 2}, merge=[["q.weight", "nothing.weight"]])
    names = {captured.graph.values[op.inputs[1]].path: op.name for op in captured.graph.ops if "linear" in op.target}
    for odd in (
        ("q.weight", "base.weight"),
        ("q.weight", "again.weight"),
        ("q.weight", "out.weight"),
        ("q.weight",),
        ("q.weight", "q.weight"),
    ):
        plan.merge = [tuple(names[path] for path in odd)]
        with pytest.raises(PlanFileError, match="can't be one matmul"):
            compile(captured, plan)


class Gated(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.scale = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return (x + self.down(F.silu(self.gate(x)) * self.up(x))).square().mean()


@pytest.mark.parametrize(
    ("mesh", "count", "merged"), [({"tp": 1}, 1, True), ({"tp": 2}, 1, True), ({"dp": 2}, 1, False), ({"dp": 2}, 8, True)]
)
def test_the_planner_merges_what_pays(mesh: dict[str, int], count: int, merged: bool) -> None:
    """At an 8B model's sizes. A merged weight that is gathered is a copy, once a step: one microbatch doesn't pay for it."""
    with torch.device("meta"):
        graph = capture(Gated(4096, 14336).to(torch.bfloat16), kwargs={"x": torch.empty(4 * count, 4096, 4096, dtype=torch.bfloat16)}).graph
    ranks = max(mesh.values())
    found = search(graph, Cluster.load(f"h100x{ranks}"), mesh, count)
    assert bool(found.merge) is merged
    pinned = {m: search(graph, Cluster.load(f"h100x{ranks}"), mesh, count, pins={"merge": m}) for m in (True, False)}
    times = {m: plan.predicted["step_seconds"] for m, plan in pinned.items()}
    assert (times[True] < times[False]) is merged
    assert found.predicted["step_seconds"] == min(times.values())
