"""Parts that the plain models are put together from: attentions, feed-forward layers, norms, and one decoder that takes any of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factory = Callable[[int, int], nn.Module]
"""(hidden, heads) → module."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


class Attention(nn.Module):
    """Three projections and SDPA."""

    def __init__(self, hidden: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(linear(x), self.heads) for linear in (self.q, self.k, self.v))
        return self.out(merge_heads(self.mix(q, k, v)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class EagerAttention(Attention):
    """Scores, tril buffer, softmax and dropout spelled out."""

    def __init__(self, hidden: int, heads: int, dropout: float = 0.0, longest: int = 32) -> None:
        super().__init__(hidden, heads)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seq = q.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.shape[-1]))
        scores = scores.masked_fill(self.mask[:, :, :seq, :seq] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ v


class DroppedAttention(Attention):
    """SDPA that drops out its weights."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2 if self.training else 0.0)


class AlibiAttention(Attention):
    """No positions but a bias that falls with distance, a slope a head."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = torch.tensor([2.0 ** (-8.0 * (head + 1) / self.heads) for head in range(self.heads)], dtype=q.dtype, device=q.device)
        position = torch.arange(q.shape[2], device=q.device)
        distance = (position[None, :] - position[:, None]).to(q.dtype)
        bias = slopes[:, None, None] * distance
        bias = bias.masked_fill(distance > 0, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


class FusedAttention(nn.Module):
    """One projection, cut as q ‖ k ‖ v."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class InterleavedAttention(FusedAttention):
    """One projection, cut as heads · (q ‖ k ‖ v)."""

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = self.qkv(x).view(batch, seq, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class GroupedAttention(nn.Module):
    """q apart, k and v fused, half as many kv heads, repeated by hand."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, heads // 2
        self.q, self.kv = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.heads)
        k, v = self.kv(x).split(self.kv.out_features // 2, dim=-1)
        k, v = (split_heads(part, self.groups).repeat_interleave(2, dim=1) for part in (k, v))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class RotaryAttention(GroupedAttention):
    """Rotary positions by cos and sin of halves, kept in buffers; kv heads grouped by SDPA itself."""

    def __init__(self, hidden: int, heads: int, longest: int = 32) -> None:
        super().__init__(hidden, heads)
        width = hidden // heads
        angles = torch.outer(torch.arange(longest), 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        seq = x.shape[2]
        return x * self.cos[:seq] + torch.cat((-right, left), -1) * self.sin[:seq]

    def forward(self, x: Tensor) -> Tensor:
        q = self.rotate(split_heads(self.q(x), self.heads))
        k, v = (split_heads(part, self.groups) for part in self.kv(x).chunk(2, dim=-1))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, self.rotate(k), v, is_causal=True, enable_gqa=True)))


class ComplexRotaryAttention(RotaryAttention):
    """The same positions as products of complex numbers, neighbours paired."""

    def rotate(self, x: Tensor) -> Tensor:
        seq, width = x.shape[2], x.shape[3]
        turns = torch.complex(self.cos[:seq, : width // 2], self.sin[:seq, : width // 2])
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)


class MLP(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x))))


class GatedMLP(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, 2 * hidden, bias=False), nn.Linear(hidden, 2 * hidden, bias=False)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FusedGatedMLP(nn.Module):
    """Gate and up as one projection."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LoopMoE(nn.Module):
    """Top-2 of 4 experts: a loop over them, each finding its tokens with torch.where and adding its part with index_add."""

    def __init__(self, hidden: int, heads: int, experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.top, self.router = top, nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(GatedMLP(hidden, heads) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(F.softmax(self.router(rows), dim=-1), self.top, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == index)
            total = total.index_add(0, row, expert(rows[row]) * weights[row, slot, None])
        return total.view_as(x)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, attention: Factory, mlp: Factory, norm: Callable[[int], nn.Module], parallel: bool) -> None:
        super().__init__()
        self.parallel = parallel
        self.norm1, self.attention, self.mlp = norm(hidden), attention(hidden, heads), mlp(hidden, heads)
        self.norm2 = nn.Identity() if parallel else norm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            h = self.norm1(x)
            return x + self.attention(h) + self.mlp(h)
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Embedding, blocks, head; `forward(ids, labels)` → the mean cross entropy of each next token, -100 ignored."""

    def __init__(
        self, vocab: int, hidden: int = 32, heads: int = 4, layers: int = 2, *, attention: Factory = Attention, mlp: Factory = MLP,
        norm: Callable[[int], nn.Module] = nn.LayerNorm, parallel: bool = False, tied: bool = False, positions: int = 16,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        nn.init.normal_(self.embed.weight, std=0.2)
        self.position = nn.Parameter(torch.randn(positions, hidden) * 0.02) if positions else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(hidden, heads, attention, mlp, norm, parallel) for _ in range(layers))
        self.norm, self.head = norm(hidden), nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def logits(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.position is not None:
            x = x + self.position[: ids.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.logits(ids)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
