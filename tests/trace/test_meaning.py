"""What export changes in silence, one model each: capture must keep the meaning (or test_refusals.py must show it refused)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoshard.trace.capture import capture

from .agree import assert_agrees
from .checks import Checks


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Two(nn.Module):
    """Two linears to write a forward with."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)


def agrees(model: nn.Module, *shape: int) -> Any:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return assert_agrees(model.double(), (batch(*(shape or (8, 8))),), tolerance=1e-11)


# ---- gradient modes


class NestedModes(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.a(x) * 2
            with torch.enable_grad():
                y = self.b(z + self.a(x))
                w = self.a(y)
            q = w + y
        return (z * self.a(x) + y.sin() * q).sum()


class SwitchedMode(Two):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        a = self.a(x)
        torch.set_grad_enabled(True)
        return (a * self.b(x)).sum()


class DecoratedMode(Two):
    @torch.no_grad()
    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), x * 2

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.parts(self.b(x))
        return (self.b(a) * b).sum()


class WritesWithoutGradient(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("rows", torch.ones(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0))
            self.rows[0] = h[1]
            self.rows[1:3].copy_(h[:2])
            t = torch.zeros(8, 8)
            t += h
            t.clamp_(max=0.3)
        return (self.b(h) * self.mean * self.rows * t).sum()


@pytest.mark.parametrize("model", [NestedModes, SwitchedMode, DecoratedMode, WritesWithoutGradient])
def test_gradient_modes(model: type[nn.Module]) -> None:
    agrees(model())


# ---- state


class Counters(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.ones(8))
        self.register_buffer("fixed", torch.full((8,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.count += 1
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)  # a new tensor in the buffer's place
        return (self.b(h) * self.average * self.fixed).sum() * self.count


def test_buffers_that_change_are_updates_and_others_stay() -> None:
    captured = agrees(Counters())
    assert set(captured.graph.updates) == {"count", "average"}
    assert [v.path for v in captured.graph.sources("buffer")] == ["count", "average", "fixed"]


class InPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        v = h[:, :4]
        v.mul_(2.0)
        h[0] = 1
        h[1, 2:5] += self.b(x)[0, 2:5]
        h.t()[3] = 0
        h.masked_fill_(h > 1.5, 0.3)
        o = torch.zeros_like(h)
        o[:, ::2] = h[:, 1::2]
        o.index_add_(0, torch.tensor([0, 1]), h[:2])
        return (o * h).sum() + h.sum()


def test_in_place_ops_on_views() -> None:
    agrees(InPlace())


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.a, self.b = nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False, momentum=0.3)
        self.c, self.frozen = nn.BatchNorm1d(8, track_running_stats=False), nn.BatchNorm1d(8).eval()
        self.group, self.rms, self.layer = nn.GroupNorm(2, 8), nn.RMSNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.frozen.running_mean += 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.c(self.b(self.a(self.linear(x)).tanh() * 2) + x * x.sin())
        h = self.group(self.frozen(h)) + self.rms(self.linear(x))
        h = self.instance(h.view(2, 4, -1)).view(-1, 8)
        return (self.layer(h) * x).square().sum()


def test_norms_and_running_statistics() -> None:
    captured = agrees(Norms())
    assert set(captured.graph.updates) == {f"{m}.{b}" for m in "ab" for b in ("running_mean", "running_var", "num_batches_tracked")}


class CastsItsParts(Two):
    """Casts submodules inside forward to what they are already."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        self.a = self.a.to(x.dtype)
        h = self.norm.to(x.device).double()(self.a(x).to(x.dtype))
        return self.b.to(h)(h).square().sum()


def test_casting_a_part_to_what_it_is_changes_nothing() -> None:
    agrees(CastsItsParts())


# ---- autograd Functions, checkpointing, hooks


class Tripled(torch.autograd.Function):
    """Returns a tensor, a mask and a number; its gradient is three times the true one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, k: float) -> tuple[Tensor, Tensor, int]:
        ctx.save_for_backward(x, w)
        ctx.k = k
        return x * w * k, x > 0, 7

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        return grad * w * ctx.k * 3, (grad * x).sum(0) * ctx.k, None


bound_early = Tripled.apply


class UsesFunctions(Two):
    def forward(self, x: Tensor) -> Tensor:
        a, mask, seven = Tripled.apply(self.a(x), self.b.bias, 2.0)
        b, _, _ = bound_early(a, self.b.bias, 3.0)
        assert seven == 7
        return (b * mask * seven).sum() + self.b(x).sum()


class HalfExp(torch.autograd.Function):
    """In the newer style, with an output that carries no gradient."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp(), x.detach() * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
        return grad * ctx.saved_tensors[0] * 0.5


class UsesNewStyle(Two):
    def forward(self, x: Tensor) -> Tensor:
        a, b = HalfExp.apply(self.a(x))
        return (a + b * self.b(x)).sum()


@pytest.mark.parametrize("model", [UsesFunctions, UsesNewStyle])
def test_autograd_functions_keep_their_backward(model: type[nn.Module]) -> None:
    captured = agrees(model())
    assert any(op.target == "autoshard.opaque.default" for op in captured.graph.ops)


class Checkpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        def block(t: Tensor) -> Tensor:
            return F.dropout(self.a(t).tanh(), 0.3)

        return checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=True).square().sum()


def test_checkpointing_captures_as_if_absent() -> None:
    captured = agrees(Checkpointed())
    assert sum(op.target == "aten.linear.default" for op in captured.graph.ops) == 2


class Hooked(Two):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(lambda module, args, out: out * 2)
        self.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.register_forward_hook(lambda module, args, out: out * 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).square().sum()


def test_forward_hooks_are_traced() -> None:
    agrees(Hooked())


# ---- randomness


class Drops(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.a(x).t(), 0.3).t()  # drawn in the memory order of its input
        h = F.dropout(h[:, ::2].clone(), 0.2, inplace=True)
        F.dropout(h, 0.5)  # its result is dead, its draw is not
        torch.rand(3)
        h = F.dropout(h.reshape(2, 2, -1).expand(3, 2, 2, -1), 0.1)
        h = F.dropout(h, 1.0) + F.dropout(h, 0.0) + h
        torch.randn(2, 2), torch.empty(3).uniform_()
        return h.square().sum() + self.b(x).sum()


class Noises(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h * (torch.rand(len(x), 1, dtype=x.dtype) + 0.8).floor() + torch.randn_like(h.t()).t() * 0.1
        h = h + x.new_empty(len(x), 1).bernoulli_(0.7).div_(0.7) + torch.empty_like(h).uniform_(-2, 3) + h.detach().bernoulli(0.3)
        h = h + torch.randint(2, 9, (len(x), 1)) - torch.empty_like(h).exponential_(0.5).log() + torch.empty_like(h).normal_(1, 2)
        return h.square().sum() + self.b(x).sum()


class Branches(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if torch.rand([]) < 0.0:
            h = h * 0
        if torch.rand(1) >= 0:
            h = h + 1
        if torch.empty(()).uniform_(0, 1) > 1.5:
            h = h * 5
        if not (torch.rand([]) <= -0.1):
            h = h * 2
        return (h * self.b(x)).sum()


class TorchLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.mix = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), nn.MultiheadAttention(8, 2, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x.view(2, -1, 8))
        out, weights = self.mix(h, h, h)
        return out.square().sum() + weights.sum()


@pytest.mark.parametrize("model", [Drops, Noises, Branches, TorchLayers])
def test_random_draws_replay_the_plain_stream(model: type[nn.Module]) -> None:
    agrees(model())


def test_dropout_masks_are_numbered_in_execution_order() -> None:
    graph = agrees(Drops()).graph
    masks = [op.args for op in graph.ops if op.target == "autoshard.dropout_mask.default"]
    assert [m[3] for m in masks] == [0, 1, 4]
    assert masks[0][0] == (8, 8) and masks[0][4] == (1, 8)


# ---- inputs and parameters


def test_aliased_inputs_stay_two_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            return (self.embed(ids) * labels.unsqueeze(-1)).sum()

    ids = torch.arange(6).view(2, 3)
    captured = capture(Model(), (), {"ids": ids, "labels": ids})
    assert [v.path for v in captured.graph.sources("input")] == ["kwargs.ids", "kwargs.labels"]
    assert {r for op in captured.graph.ops for r in op.inputs} >= {"ids", "labels"}


class TiedAndFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 8, padding_idx=2), nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0].abs() * 5).long().clamp(0, 10)
        return F.cross_entropy(self.out(self.frozen(self.embed(ids))), ids)


def test_tied_frozen_and_padded_parameters() -> None:
    graph = agrees(TiedAndFrozen()).graph
    assert graph.tied == {"out.weight": "embed.weight"}
    assert {v.path: v.grad for v in graph.sources("param")} == {"embed.weight": True, "frozen.weight": False, "frozen.bias": False}


def test_meta_and_fake_models_capture_without_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def loss(y: Tensor) -> Tensor:
        return y.square().mean()

    with torch.device("meta"):
        model = nn.Linear(1 << 20, 1 << 20)
    for device in ("cpu", "meta"):
        captured = capture(model, (torch.empty(2, 1 << 20, device=device),), loss=loss)
        assert captured.graph.values["weight"].tensor.shape == (1 << 20, 1 << 20)
    with FakeTensorMode():
        fake = nn.Linear(1 << 20, 1 << 20)
        captured = capture(fake, (torch.empty(2, 1 << 20),), loss=loss)
    assert captured.graph.ops[0].target == "aten.linear.default"
    assert model.weight.device.type == "meta"


def test_provenance_names_the_line_and_the_module() -> None:
    graph = capture(NestedModes(), (torch.ones(8, 8),)).graph
    linear = next(op for op in graph.ops if op.target == "aten.linear.default")
    assert linear.module == "a"
    lines, first = inspect.getsourcelines(NestedModes)
    at = next(n for n, line in enumerate(lines) if "z = self.a(x)" in line)
    assert linear.source == f"tests/trace/test_meaning.py:{first + at}"


def test_provenance_reaches_into_helper_functions() -> None:
    def helper(x: Tensor) -> Tensor:
        return x.cos()  # here

    class Model(Two):
        def forward(self, x: Tensor) -> Tensor:
            return helper(self.a(x)).sum()

    cos = next(op for op in capture(Model(), (torch.ones(2, 8),)).graph.ops if op.target == "aten.cos.default")
    assert cos.source == f"tests/trace/test_meaning.py:{helper.__code__.co_firstlineno + 1}"
    assert cos.module == ""


def test_outputs_are_recorded_by_name() -> None:
    class Model(Two):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"loss": self.a(x).sum(), "hidden": (self.b(x), x)}

    graph = capture(Model(), (torch.ones(2, 8),)).graph
    assert list(graph.outputs) == ["hidden.0", "hidden.1"]
    assert graph.outputs["hidden.1"] == "args_0"


def test_replaced_plain_tensors_are_noted_and_put_back() -> None:
    class Model(Two):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(8)

        def forward(self, x: Tensor) -> Tensor:
            self.scale = self.scale + 1
            return (self.a(x) * self.scale).sum()

    model = Model()
    captured = capture(model, (torch.ones(2, 8),))
    assert any("scale" in note for note in captured.graph.notes)
    assert torch.equal(model.scale, torch.ones(8))


# ---- checks


def test_checks_that_only_raise_are_taken_to_pass_and_noted() -> None:
    graph = agrees(Checks()).graph
    assert all(op.target.split(".")[1] in ("linear", "add", "mul", "square", "sum") for op in graph.ops)
    lines, first = inspect.getsourcelines(Checks)
    for line in (first + n for n, text in enumerate(lines) if text.strip().startswith(("assert", "if"))):
        assert any(f"tests/trace/checks.py:{line} is taken to pass" in note for note in graph.notes), line
