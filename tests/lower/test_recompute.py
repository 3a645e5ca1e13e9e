"""What a block saves: what matmuls read and make, once each, not the pointwise values between; and the whole backward is both its parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from autoshard.lower import compile as lower
from autoshard.mesh import Mesh
from autoshard.plan.search import search
from autoshard.trace.capture import capture


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8, bias=False)
        self.gate, self.up, self.down = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False), nn.Linear(24, 8, bias=False)

    def forward(self, x):
        h = self.stem(x)
        return (h + self.down(F.silu(self.gate(h)) * self.up(h))).square().mean()


def module(merge=False):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    captured = capture(Gated(), (x,))
    program = lower(captured, search(captured.graph, None, Mesh.of({"dp": 1}), None, {"merge": merge}))
    (found,) = [call.module for call in program.ranks[0].blocks if "param:down.weight" in call.inputs]
    return found


def test_pointwise_values_are_made_again():
    found = module()
    saved = next(n for n in found.forward.graph.nodes if n.op == "output").args[0][found.outputs :]
    made = [n for n in saved if n.op != "placeholder"]
    # gate and up, the product that `down`'s weight gradient reads, and what `down` makes: the sum that is squared fuses, as does silu(gate)
    assert sorted(tuple(n.meta["val"].shape) for n in made) == [(6, 8)] + [(6, 24)] * 3
    assert sorted(str(n.target) for n in made) == ["aten.mm.default"] * 3 + ["aten.mul.Tensor"]


def test_of_merged_linears_the_one_result_is_saved():
    found = module(merge=True)
    saved = next(n for n in found.forward.graph.nodes if n.op == "output").args[0][found.outputs :]
    made = {(str(n.target), tuple(n.meta["val"].shape)) for n in saved if n.op != "placeholder"}
    assert made == {("aten.mm.default", (6, 48)), ("aten.mul.Tensor", (6, 24)), ("aten.mm.default", (6, 8))}


def test_the_whole_backward_is_both_parts():
    found = module()
    torch.manual_seed(0)
    inputs = [torch.randn(n.meta["val"].shape) for n in found.forward.graph.nodes if n.op == "placeholder"]
    outputs = found.forward(*inputs)
    saved, grad = outputs[found.outputs :], torch.randn_like(outputs[0])
    parts = found.backward_input(*saved, grad)
    n = len(found.grad_inputs)
    apart = (*parts[:n], *found.backward_weight(*parts[n:]))
    together = found.backward(*saved, grad)
    assert len(apart) == len(together) == 4
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)


class Rotated(nn.Module):
    """q and k are turned before they are multiplied, v isn't."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8, bias=False)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        turn = torch.linspace(0.5, 2, 8)
        q, k, v = self.q(h) * turn, self.k(h) * turn, self.v(h)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).square().mean()


def test_a_saved_part_of_a_merged_result_is_a_copy():
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    captured = capture(Rotated(), (x,))
    program = lower(captured, search(captured.graph, None, Mesh.of({"dp": 1}), None, {"merge": True}))
    (found,) = [call.module for call in program.ranks[0].blocks if "q_weight" in str(call.inputs)]
    inputs = [torch.randn(n.meta["val"].shape) for n in found.forward.graph.nodes if n.op == "placeholder"]
    saved = found.forward(*inputs)[found.outputs :]
    given = {t.untyped_storage().data_ptr() for t in inputs}
    sizes = [t.untyped_storage().nbytes() for t in saved if t.untyped_storage().data_ptr() not in given]
    assert sizes and max(sizes) <= 2 * 6 * 8 * 4, sizes
