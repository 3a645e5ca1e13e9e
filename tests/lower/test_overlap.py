"""Communication beside computation: collectives start early and are waited for late, matmuls reduce their own result in pieces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from autoshard.errors import PinError
from autoshard.lower import compile
from autoshard.lower.beside import beside
from autoshard.lower.early import INDUCTOR, WAIT, is_collective, reorder
from autoshard.lower.program import Program, bind
from autoshard.plan.cluster import Cluster
from autoshard.plan.plan import Plan
from autoshard.plan.search import random_plan, search
from autoshard.trace.capture import Captured, capture
from tests.runtime import checkpoints
from tests.runtime.ranks import ranks

Op, aten = torch.ops._c10d_functional, torch.ops.aten
MATMUL = aten.mm.default
PIECES = torch.ops.autoshard.matmul_all_reduce.default


def graphs(program: Program) -> Iterator[fx.Graph]:
    own = program.ranks[0]
    for call in (*own.gathers, *own.blocks):
        for part in (call.module.forward, call.module.backward_input, call.module.backward_weight, call.module.backward):
            if part is not None:
                yield part.graph


def descendants(node: fx.Node) -> set[fx.Node]:
    found, stack = set(), [node]
    while stack:
        new = [user for user in stack.pop().users if user not in found]
        found.update(new)
        stack += new
    return found


@pytest.mark.parametrize(
    ("mesh", "seed"), [({"tp": 2}, 1), pytest.param({"dp": 2, "tp": 2}, 2, marks=pytest.mark.slow), ({"dp": 2}, 3)], ids=str
)
def test_nothing_that_could_run_meanwhile_waits(mesh: dict[str, int], seed: int) -> None:
    captured = checkpoints.subject(torch.float64)[2]
    plan = random_plan(captured.graph, mesh=mesh, microbatches=1, seed=seed)
    as_traced = Plan.from_yaml(plan.to_yaml().replace("overlap: true", "overlap: false"))
    assert plan.overlap and not as_traced.overlap
    seen = 0
    for before, after in zip(graphs(compile(captured, as_traced)), graphs(compile(captured, plan)), strict=True):
        after.lint()
        assert Counter(str(n.target) for n in before.nodes) == Counter(str(n.target) for n in after.nodes)
        names = [[n.name for n in g.nodes if is_collective(n)] for g in (before, after)]
        assert names[0] == names[1], "ranks meet in the same order"
        assert [n.name for n in before.nodes if n.op == "placeholder"] == [n.name for n in after.nodes if n.op == "placeholder"]
        nodes = list(after.nodes)
        waits = [n for n in nodes if n.target is WAIT]
        if waits:
            late = nodes[nodes.index(waits[-1]) + 1 : -1]
            assert set(late) <= set().union(*map(descendants, waits))
            seen += 1
    assert seen > 2


def block(x: Tensor, dy: Tensor, w1: Tensor, w2: Tensor, u: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """A backward as autograd writes it: each weight's gradient before its input's."""
    dw2 = dy.t() @ u
    dz = (dy @ w2) * torch.sigmoid(u)
    dw1 = dz.t() @ x
    dx = Op.wait_tensor(Op.all_reduce(dz @ w1, "sum", group))
    return dx * 2 + 1, dw1, dw2


def arguments() -> tuple[Tensor, ...]:
    return tuple(torch.randn(*s) for s in ((64, 32), (64, 32), (48, 32), (32, 48), (64, 48)))


def test_gradients_of_weights_run_beside_the_reduction_of_the_inputs() -> None:
    graph = make_fx(lambda *a: block(*a, "tp"), tracing_mode="fake")(*arguments())
    heavy = {MATMUL: "mm", WAIT: "wait", Op.all_reduce.default: "reduce"}

    def order() -> str:
        return " ".join(heavy[n.target] for n in graph.graph.nodes if n.target in heavy)

    assert order() == "mm mm mm mm reduce wait"
    reorder(graph)
    assert order() == "mm mm reduce mm mm wait"
    assert not beside(graph.graph), "the weights' gradients hide it, whole"


def compiled(options: dict[str, Any] | None) -> str:
    from torch._inductor.utils import run_and_get_code
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    with torch.no_grad(), torch._inductor.config.patch(compile_threads=1, force_disable_caches=True):
        run = torch.compile(lambda *a: block(*a, name), fullgraph=True, dynamic=False, options=options)
        _, (code,) = run_and_get_code(run, *arguments())
    found = re.findall(
        r"extern_kernels\.(mm)|_c10d_functional\.(all_reduce)_\.|_c10d_functional\.(wait)_tensor\.", code[code.index("def call(") :]
    )
    return " ".join(re.sub(r"(wait )+", "wait ", " ".join(a or b or c for a, b, c in found) + " ").split())


@pytest.mark.slow
def test_the_compiler_keeps_it_so() -> None:
    (mine,) = ranks(1, compiled, INDUCTOR)
    assert mine == "mm mm all_reduce mm mm wait"


def product(x: Tensor, w: Tensor, group: str) -> Tensor:
    out = (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[1])
    return Op.wait_tensor(Op.all_reduce(out, "sum", group)) + 1


def both() -> list[tuple[bool, bool]]:
    dist.init_process_group("gloo")
    found = []
    for rows in (2048, 3001):
        x, w = torch.randn(2, rows, 6, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
        graph = make_fx(lambda x, w: product(x, w, "tp"), tracing_mode="fake")(x, w)
        for node in graph.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default
        groups = {"tp": dist.group.WORLD.group_name}  # type: ignore[union-attr]
        plain, pieces = (bind(graph, groups, torch.device("cpu"), overlap) for overlap in (False, True))
        placed = [PIECES in {n.target for n in g.graph.nodes} for g in (plain, pieces)] == [False, True]
        found.append((placed, torch.allclose(plain(x, w), pieces(x, w), rtol=1e-13, atol=1e-13)))
    return found


def test_pieces_are_the_whole() -> None:
    assert ranks(2, both) == [[(True, True)] * 2] * 2


def test_what_is_read_elsewhere_or_too_small_stays() -> None:
    w = torch.randn(6, 5)

    def replaced(function: Any, rows: int) -> int:
        graph = make_fx(function, tracing_mode="fake")(torch.randn(rows, 6), w)
        return beside(graph.graph)

    def read(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return Op.wait_tensor(Op.all_reduce(y, "sum", "tp")), y.sum()

    def another(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return Op.wait_tensor(Op.all_reduce(x @ w, "sum", "tp")), Op.wait_tensor(Op.all_reduce(w, "sum", "dp"))

    assert replaced(lambda x, w: Op.wait_tensor(Op.all_reduce(x @ w, "sum", "tp")), 2048) == 1
    assert replaced(lambda x, w: Op.wait_tensor(Op.all_reduce(x @ w, "sum", "tp")), 2047) == 0
    assert replaced(lambda x, w: Op.wait_tensor(Op.all_reduce(x @ w, "max", "tp")), 2048) == 0
    assert replaced(read, 2048) == replaced(another, 2048) == 0


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(4096), nn.Linear(4096, 14336, bias=False), nn.Linear(14336, 4096, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = layer(x)
        return x.float().square().mean()


def stack() -> Captured:
    with torch.device("meta"):
        return capture(Stack().to(torch.bfloat16), args=(torch.randn(2, 4096, 4096, dtype=torch.bfloat16),))


def test_the_planner_reduces_where_it_hides() -> None:
    captured = stack()
    cluster = Cluster.load("h100x2")
    plan, apart = (search(captured.graph, cluster, mesh={"tp": 2}, pins={"overlap": overlap}) for overlap in (True, False))
    assert plan.overlap and not apart.overlap
    assert plan.predicted["step_seconds"] < apart.predicted["step_seconds"]
    modules = {call.module.key: call.module for call in compile(captured, plan).ranks[0].blocks}
    bound = [bind(m.forward, {"tp": "0"}, torch.device("cpu"), overlap=True) for m in modules.values()]
    assert sum(n.target is PIECES for g in bound for n in g.graph.nodes) >= 1
    with pytest.raises(PinError, match="overlap: expected true or false, found 'yes'"):
        search(captured.graph, cluster, mesh={"tp": 2}, pins={"overlap": "yes"})
