"""The order of a graph's ops: the program's, and the same in every process where the program has none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard.plan.plan import fingerprint
from autoshard.plan.search import search
from autoshard.trace.capture import capture

from .test_meaning import Two, agrees


class Kinds(nn.Module):
    """Loops over `kinds` wherever a model can: what it does with each may come in any order, as in a loop over a set."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = kinds
        self.heads = nn.ModuleDict({kind: nn.Linear(8, 8) for kind in kinds})
        self.embed, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        for kind in kinds:
            self.register_buffer(f"{kind}_turn", torch.full((8,), float(len(kind))))

    def table(self, x: Tensor, kind: str) -> Tensor:
        angle = torch.arange(len(x))[:, None] * getattr(self, f"{kind}_turn")
        return angle.cos() + angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tables, masks, parts, rows = {}, {}, {}, {}
        for kind in self.kinds:
            tables[kind] = self.table(x, kind)
            if kind == "full":
                masks[kind] = torch.tensor([1.0, 2.0]).repeat(4) * x[0, 0]
            else:
                masks[kind] = torch.tensor([3.0, len(kind)]).repeat(4)
        with torch.no_grad():
            same = {kind: torch.arange(8) * 0.5 for kind in self.kinds}
        parts = {kind: F.dropout(self.heads[kind](x), 0.1 + len(kind) / 100) for kind in self.kinds}
        for kind in self.kinds:
            (at,) = torch.where(masks[kind] > len(kind))
            rows[kind] = parts[kind][at].sum(0)
        for kind in sorted(self.kinds):
            x = x + parts[kind] * tables[kind] * masks[kind] + rows[kind] * same[kind]
        return self.out(x).square().sum()


KINDS = ("full", "sliding", "chunked")


def test_iterations_in_any_order_make_one_graph_and_one_plan() -> None:
    x = torch.randn(8, 8)
    found = {}
    for kinds in (KINDS, KINDS[::-1], ("sliding", "full", "chunked")):
        captured = capture(Kinds(kinds), (x,))
        text = search(captured.graph, mesh={"dp": 2, "tp": 2}).to_yaml() if len(found) < 2 else None
        found[kinds] = (str(captured), fingerprint(captured.graph), sorted(captured.opaque), list(captured.constants), text)
        assert next(iter(captured.graph.sources("param"))).path == "embed.weight"
    first = found[KINDS]
    for kinds, other in found.items():
        assert other[:4] == first[:4], kinds
        assert other[4] in (None, first[4]), kinds


@pytest.mark.parametrize("kinds", [KINDS, KINDS[::-1]])
def test_whatever_the_order_the_draws_are_those_of_the_model(kinds: tuple[str, ...]) -> None:
    captured = agrees(Kinds(kinds), 8, 8)
    masks = [op.args[3] for op in captured.graph.ops if op.target == "autoshard.dropout_mask.default"]
    assert masks == [0, 1, 2], "numbered in the graph's order"
    drawn = [draw.args[1] for draw in captured.draws]
    assert drawn == [0.1 + len(kind) / 100 for kind in kinds], "drawn in the model's"


def test_a_program_that_has_an_order_keeps_it() -> None:
    class Heads(Two):
        """Straight-line code that could run in any order, a loop whose iterations follow each other, one whose don't."""

        def __init__(self) -> None:
            super().__init__()
            self.layers, self.heads = (nn.ModuleList(nn.Linear(8, 8) for _ in range(11)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            z, y = x.sin(), x.cos()
            late, early = self.b(z), self.a(y)
            x = late * early
            for layer in self.layers:
                x = (layer(x) + layer(x).cos()).tanh()
            return torch.stack([head(F.dropout(x, 0.5)).exp() for head in self.heads]).sum()

    captured = agrees(Heads(), 8, 8)
    reads = [op.args[1].name for op in captured.graph.ops if op.target == "aten.linear.default"]
    layers = [f"layers_{i}_weight" for i in range(11) for _ in range(2)]
    assert reads == ["b_weight", "a_weight", *layers, *(f"heads_{i}_weight" for i in range(11))]
    assert [op.target for op in captured.graph.ops[:2]] == ["aten.sin.default", "aten.cos.default"]
    assert [draw.index for draw in captured.draws] == list(range(11))


SCRIPT = """
from tests.zoo import hf
from autoshard.plan.search import search
from autoshard.trace.capture import capture
hf.FAMILIES["gemma3_text"] |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
model, kwargs = hf.case("gemma3_text").build()
captured = capture(model, kwargs=kwargs)
print(captured)
print(search(captured.graph, mesh={"dp": 2, "tp": 2}, microbatches=2).to_yaml())
"""


def test_a_hugging_face_model_that_loops_over_a_set_is_the_same_in_every_process() -> None:
    pytest.importorskip("transformers")
    started = []
    for seed in ("0", "1"):  # of which the first has full attention first, the second sliding
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        started.append(subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True))
    first, second = (process.communicate()[0] for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert "attention" in first
    assert first == second
