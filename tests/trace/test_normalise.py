"""The normal form, family by family: many spellings in, few out, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard.trace.capture import Captured, capture
from autoshard.trace.graph import Graph
from autoshard.trace.legal import verify_normal

from .test_meaning import Two, agrees


def targets(captured: Captured) -> list[str]:
    return [op.target for op in captured.graph.ops]


class Shapes(Two):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        a = a.repeat(2, 1)[: len(x)] + a.tile(1, 2)[:, :8] + a.repeat_interleave(2, 0)[::2] + a.flatten().unflatten(0, (-1, 8))
        a = a + torch.stack(a.unbind(0)).movedim(0, 1).T + a.unsqueeze(-1).squeeze(-1).swapaxes(0, 1).mT
        b, c = a.split([3, 5], -1)
        d = torch.cat((c, b), -1)
        e, f = d.chunk(2, 1)
        g = F.pad(e, (1, 2)).narrow(1, 1, 4) + f.expand(2, 8, 4)[1].reshape(-1, 4).view_as(f).contiguous()
        return (g * g.sin()).sum() + d.select(1, -1).sum() + d.diff(dim=1).square().sum() + d.roll(1, 0)[0, 0]


class Scattered(Two):
    def forward(self, x: Tensor) -> Tensor:
        h, rows = self.a(x), self.b(x)
        some = (x[:, 0] > -0.3)[:, None]
        a = h.masked_scatter(some, rows) + h.masked_scatter(some.expand(-1, 8), rows.sin()) + h.masked_scatter(x > 0.1, rows.t())
        again = torch.cat(h.split([3, 1, 4]), 0) + torch.cat(h.split([3, 1, 4])[::-1], 0)
        again = again + torch.cat(list(h.view(2, 4, 8)), 0) + torch.cat(list(h.view(8, 2, 4).transpose(0, 1)), 1)
        return (a * a.cos()).sum() + again.square().sum()


def test_scattering_by_a_mask_takes_rows_and_a_split_put_together_is_nothing() -> None:
    found = targets(agrees(Scattered()))
    assert found.count("aten.index.Tensor") == 3 and found.count("aten.cat.default") == 2


class Products(Two):
    def forward(self, x: Tensor) -> Tensor:
        h, w = self.a(x), self.b.weight
        a = torch.addmm(self.a.bias, h, w, beta=0.5, alpha=2) + torch.baddbmm(h[None], h[None], w[None], beta=0)[0]
        a = a + torch.addbmm(h, h[None], w[None]) + torch.addmv(h[:, 0], h, self.a.bias)[:, None] + torch.dot(h[0], h[1])
        a = a + (h @ self.a.bias)[:, None] + torch.outer(h[:, 0], h[0]) + torch.einsum("ij,kj->ik", h, w) + h @ w.T
        return (a * a.cos()).sum()


class Reductions(Two):
    def forward(self, x: Tensor) -> Tensor:
        d = self.a(x)
        rows = d.sum(-1, dtype=torch.float64) + d.min(1).values + d.var(1) + d.std(1) + d.logsumexp(1) + d.norm(dim=1)
        rows = rows + d.max() + d.amax((0, 1)) + d.mean() + d.mean((0, 1), keepdim=True)[0] + d.cumsum(0)[:, 1]
        counts = (d > 0).int().cumsum(0, dtype=torch.int32) + (d > 0).sum(0, dtype=torch.int32)
        rows = rows + counts.sum() + (d > 1).sum().sum(dtype=torch.int32)
        return rows.sum() + (d.softmax(-1) * d.log_softmax(0, dtype=torch.float64)).sum() + (d > 0).sum() + (d > 0).float().mean()


class Pointwise(Two):
    def forward(self, x: Tensor) -> Tensor:
        d = self.a(x)
        f = (1 - d) + torch.rsub(d, 2, alpha=3) + d.sub(d.sin(), alpha=2) + d.masked_fill(d > 0, 0.5) + torch.where(d > 0, d, 0.0)
        f = f * 1 + 0 + d.clamp(-1, 1) + d.pow(2) + d.tril() + F.gelu(d, approximate="tanh") + F.silu(d) + F.softplus(d)
        keep = (d > 0) & ~(d > 1) | (x > 0)
        g = F.mse_loss(f, d) + F.smooth_l1_loss(f, d) + F.binary_cross_entropy_with_logits(d, torch.sigmoid(d.detach()))
        g = g + F.kl_div(F.log_softmax(f, -1), F.softmax(d, -1)) + F.cosine_similarity(f, d).sum() + f.topk(2, -1)[0].sum()
        return (f * keep).sum() + g + torch.full_like(f, 2.0).sum() + f.new_ones(3).sum() + torch.linspace(0, 1, 5).sum()


@pytest.mark.parametrize("model", [Shapes, Products, Reductions, Pointwise])
def test_spellings_agree(model: type[nn.Module]) -> None:
    verify_normal(agrees(model()))


class Losses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 11)
        self.register_buffer("weight", torch.rand(11))

    def forward(self, x: Tensor) -> Tensor:
        z, y, total = self.out(x), (x[..., 0].abs() * 5).long().clamp(0, 10), 0
        y[0] = -100
        soft = z.detach().softmax(-1)
        for reduction in ("mean", "sum", "none"):
            for smoothing in (0.0, 0.1):
                for weight in (None, self.weight):
                    total = total + F.cross_entropy(z, y, weight=weight, reduction=reduction, label_smoothing=smoothing).sum()
            total = total + F.nll_loss(F.log_softmax(z, -1), y, reduction=reduction).sum()
            total = total + F.cross_entropy(z, soft, weight=self.weight, reduction=reduction, label_smoothing=0.2).sum()
        z, y = z.view(2, -1, 11).transpose(1, 2), y.view(2, -1)  # classes in dim 1
        total = total + F.cross_entropy(z, y.clamp(min=0), ignore_index=3) + F.nll_loss(z, y.clamp(min=0))
        return total + F.cross_entropy(z.unsqueeze(-1), y.unsqueeze(-1), weight=self.weight) + F.cross_entropy(z[1, :, 0], y[1, 0])


def test_cross_entropy_in_all_its_forms() -> None:
    agrees(Losses())


class CountedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.out(self.embed(ids)).view(-1, 11), labels.view(-1))


def test_the_loss_keeps_batch_and_sequence_apart_and_its_count_depends_on_labels_only() -> None:
    ids = torch.arange(6).view(2, 3)
    graph = capture(CountedLoss(), (), {"ids": ids, "labels": ids}).graph
    assert not any(op.target == "aten.reshape.default" for op in graph.ops)
    div = graph.producer()[graph.loss]
    assert div.target == "aten.div.Tensor"
    assert ancestors(graph, div.args[1].name) == {"labels"}


def ancestors(graph: Graph, name: str) -> set[str]:
    """The sources that a value is made of."""
    producer = graph.producer()
    if name not in producer:
        return {name}
    return set().union(*(ancestors(graph, n) for n in producer[name].inputs))


class Conv1d(nn.Module):
    """GPT-2's linear: flattens, multiplies, unflattens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, 8), self.weight).view(*x.shape[:-1], 6)
        return F.dropout(F.gelu(y).view(-1, 6), 0.1).view(*x.shape[:-1], 6).square().sum()


def test_flattened_linears_keep_their_dims() -> None:
    captured = agrees(Conv1d(), 2, 3, 8)
    matmul = next(op for op in captured.graph.ops if op.target == "aten.matmul.default")
    assert captured.graph.values[matmul.name].tensor.shape == (2, 3, 6)


class Alignments(nn.Module):
    """CTC: its inner sizes depend on the lengths of the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.out(x).log_softmax(-1).transpose(0, 1)
        targets = (x[:, :3, 0].abs() * 9).long() % 4 + 1
        lengths, sizes = (x[:, 0, 1].abs() * 9).long() % 3 + 1, torch.full((len(x),), x.shape[1])
        each = F.ctc_loss(z, targets, sizes, lengths, reduction="none")
        return (
            F.ctc_loss(z, targets, sizes, lengths)
            + each.square().sum()
            + F.ctc_loss(z, targets, [7] * len(x), [2] * len(x), reduction="sum")
        )


def test_ctc_is_kept_whole() -> None:
    assert targets(agrees(Alignments(), 3, 7, 8)).count("autoshard.opaque.default") == 3


# ---- attention


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv, self.bias = kind, nn.Linear(8, 24), nn.Parameter(torch.randn(1, 2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(3, 6, 2, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.mix(q, k, v).square().sum() + self.bias.sum()

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sdpa, ones = F.scaled_dot_product_attention, torch.ones(6, 6, dtype=torch.bool)
        padding = torch.ones(3, 1, 6, 6, dtype=torch.bool)
        padding[1, :, 2] = False  # a fully masked row
        far = torch.full((6, 6), float("-inf"), dtype=q.dtype).triu(1)
        match self.kind:
            case "none":
                return sdpa(q, k, v)
            case "causal":
                return sdpa(q, k, v, is_causal=True, scale=0.3)
            case "tril":
                return sdpa(q, k, v, attn_mask=ones.tril())
            case "additive":
                return sdpa(q, k, v, attn_mask=far)
            case "all":
                return sdpa(q, k, v, attn_mask=ones)
            case "window":
                return sdpa(q, k, v, attn_mask=ones.tril().triu(-2))
            case "dead row":
                return sdpa(q, k, v, attn_mask=padding)
            case "both":
                return sdpa(q, k, v, attn_mask=ones.tril() & (q.detach()[:, :1, :, :1] > -9).transpose(2, 3))
            case "bias":
                return sdpa(q, k, v, attn_mask=self.bias)
            case "dropped":
                return sdpa(q, k, v, attn_mask=padding, dropout_p=0.2)
            case "three dims":
                return sdpa(q[:, 0], k[:, 0], v[:, 0], is_causal=True)
            case "five dims":
                return sdpa(q[None], k[None], v[None], attn_mask=far.masked_fill(~padding[0, 0], -1e9))
            case "two dims":
                return sdpa(q[0, 0], k[0, 0], v[0, 0])
            case "grouped":
                return sdpa(q, k[:, :1], v[:, :1], enable_gqa=True, is_causal=True)
            case "repeated":
                k, v = (t[:, :1, None].expand(3, 1, 2, 6, 4).reshape(3, 2, 6, 4) for t in (k, v))
                return sdpa(q, k, v, is_causal=True)
            case "cross":
                return sdpa(q, k[:, :, :4], torch.cat((v, v), -1)[:, :, :4], is_causal=True)
        raise AssertionError(self.kind)


CASES = {  # → (mask is None, causal) of the op, or None where attention is spelled out
    "none": (True, False), "causal": (True, True), "tril": (True, True), "additive": (True, True), "all": (True, False),
    "window": (False, False), "dead row": (False, False), "both": (False, True), "bias": None, "dropped": (False, False),
    "three dims": (True, True), "five dims": (True, True), "two dims": (True, False), "grouped": (True, True), "repeated": (True, True),
    "cross": (True, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_attention(kind: str) -> None:
    captured = agrees(Attention(kind), 3, 6, 8)
    ops = [op for op in captured.graph.ops if op.target == "autoshard.attention.default"]
    assert [(op.args[3] is None, op.args[4]) for op in ops] == ([CASES[kind]] if CASES[kind] else [])
    if kind in ("grouped", "repeated"):
        assert captured.graph.values[ops[0].args[1].name].tensor.shape == (3, 1, 6, 4)


def test_masks_too_large_to_fold_are_still_recognised() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))
            n = torch.arange(x.shape[1])
            causal = n[None, None, None, :] <= n[None, None, :, None]
            window = n[None, None, None, :] > n[None, None, :, None] - 64
            mask = causal & window & torch.ones_like(causal)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(len(x), -1, -1, -1)).sum()

    with torch.device("meta"):
        model = Long()
    captured = capture(model, (torch.empty(2, 65536, 4),))
    (op,) = (op for op in captured.graph.ops if op.target == "autoshard.attention.default")
    assert op.args[4] is True
    assert captured.graph.producer()[op.args[3].name].target == "aten.gt.Tensor"
    assert sum(c.numel() * c.element_size() for c in captured.constants.values()) < 2**21


def test_causal_masks_of_a_whole_batch_are_recognised() -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))
            n = torch.arange(x.shape[1])
            keys, queries = n[None, None, None, :].expand(len(x), 1, 1, -1), n[None, None, :, None].expand(len(x), 1, -1, 1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keys <= queries).sum()

    with torch.device("meta"):
        model = Batched()
    (op,) = (op for op in capture(model, (torch.empty(3, 4096, 4),)).graph.ops if op.target == "autoshard.attention.default")
    assert op.args[3] is None and op.args[4] is True


# ---- folding


class Tables(Two):
    def forward(self, x: Tensor) -> Tensor:
        n = torch.arange(x.shape[1], dtype=torch.float64)
        table = torch.outer(n, n).cos()[None].expand(len(x), -1, -1)
        rows = torch.arange(len(x))[:, None]
        return (self.a(x) * table[:, 1]).sum() + (self.b(x)[rows, torch.arange(2, 6)[None]] * 2).sum()


def test_constants_fold_without_the_batch_size() -> None:
    captured = agrees(Tables(), 5, 8)
    assert "aten.index.Tensor" not in targets(captured)  # indexing by ranges is a slice
    assert all(5 not in c.shape for c in captured.constants.values())
    assert "aten.arange.start_step" not in targets(captured)


class BufferTable(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(8, 8).tril())

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).masked_fill(self.table == 0, 2.0).sum()


def test_buffers_are_never_folded() -> None:
    captured = agrees(BufferTable())
    assert not captured.constants
    assert "aten.eq.Scalar" in targets(captured)


# ---- data-dependent sizes


class Selects(Two):
    def forward(self, x: Tensor) -> Tensor:
        h, total = self.a(x), torch.zeros_like(x)
        for e in range(3):
            (row,) = torch.where(x[:, e] > 0)
            total = total.index_add(0, row, self.b(h[row]).tanh() * (e + 1))
        return total.square().sum() + h[h > 0].sum()


def test_data_dependent_regions_become_opaque_ops() -> None:
    captured = agrees(Selects())
    opaque = [op for op in captured.graph.ops if op.target == "autoshard.opaque.default"]
    assert len(opaque) == 4 and set(captured.opaque) == {op.args[0] for op in opaque}
    linear = [op for op in captured.graph.ops if op.target == "aten.linear.default"]
    assert len(linear) == 1, "what has static shapes stays outside"


def test_capture_is_deterministic(tmp_path: Any) -> None:
    first, second = (str(capture(Selects(), (torch.ones(4, 8),))) for _ in range(2))
    assert first == second
    capture(Tables(), (torch.ones(4, 8),), dump=str(tmp_path))
    assert (tmp_path / "00_dropout.txt").read_text().startswith("# after dropout")
