"""Plain modules written as people publish them: a diffusion transformer, a perceiver, a multi-task model, and what they are made of.

`CASES[name].build()` → (model, kwargs), as in plain.py. Each has something that a decoder has not: noise drawn inside forward, modulation
by a timestep, attention from a few latents to many inputs, several inputs and several losses.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers
from .case import BATCH, SEQ, VOCAB, Built, Case, tokens, uneven_labels
from .plain import Bidirectional, CrossAttention, seeded


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Attention and MLP whose norms' shift, scale and gate come from the condition (adaLN-Zero)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention, self.mlp = Bidirectional(hidden, heads), layers.MLP(hidden, 4)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Predicts the noise that its own forward adds to images at its own random times, given a class that is sometimes dropped."""

    def __init__(self, hidden: int = 32, heads: int = 4, patch: int = 4, size: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.hidden, self.patch, self.classes = hidden, patch, classes
        self.stem = nn.Conv2d(3, hidden, patch, stride=patch)
        self.register_buffer("position", torch.randn(1, (size // patch) ** 2, hidden, generator=torch.Generator().manual_seed(1)))
        self.time = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.label = nn.Embedding(classes + 1, hidden)
        self.blocks = nn.ModuleList(DiTBlock(hidden, heads) for _ in range(3))
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.last, self.out = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden)), nn.Linear(hidden, 3 * patch * patch)
        self.register_buffer("kept", torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float())

    def embed_time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.hidden // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = t[:, None].to(dtype) * frequencies[None]
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        b, channels, h, w = images.shape
        t = torch.randint(0, 1000, (b,), device=images.device)
        noise = torch.randn_like(images)
        kept = self.kept[t].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * images + (1 - kept).sqrt() * noise
        labels = torch.where(torch.rand(b, device=images.device) < 0.1, self.classes, labels)
        x = self.stem(noisy).flatten(2).transpose(1, 2) + self.position
        c = self.embed_time(t, x.dtype) + self.label(labels)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.last(c).chunk(2, dim=1)
        x = self.out(modulate(self.norm(x), shift, scale))
        p = self.patch
        x = x.view(b, h // p, w // p, p, p, channels)
        return F.mse_loss(torch.einsum("nhwpqc->nchpwq", x).reshape(b, channels, h, w), noise)


class Perceiver(nn.Module):
    """A few learned latents read a long input again and again, and think between; regression of each of several targets."""

    def __init__(self, hidden: int = 32, heads: int = 4, latents: int = 6, features: int = 5) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, hidden) * 0.02)
        self.embed = nn.Linear(features, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(4))
        self.read = nn.ModuleList(CrossAttention(hidden, heads) for _ in range(2))
        self.think = nn.ModuleList(layers.Block(hidden, heads, Bidirectional, layers.MLP, nn.LayerNorm, False) for _ in range(4))
        self.query = nn.Parameter(torch.randn(3, hidden) * 0.02)
        self.answer, self.head = CrossAttention(hidden, heads), nn.Linear(hidden, 2)

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        data = self.embed(inputs)
        x = self.latents.expand(len(data), -1, -1)
        for i, read in enumerate(self.read):
            x = x + read(self.norms[2 * i](x), self.norms[2 * i + 1](data))
            for block in self.think[2 * i : 2 * i + 2]:
                x = block(x)
        found = self.head(self.answer(self.query.expand(len(x), -1, -1), x))
        return {"loss": F.smooth_l1_loss(found, targets, beta=0.5), "found": found}


class ManyLosses(nn.Module):
    """One trunk, three heads: tokens, a class of the whole, a score; weights of the losses learned; two inputs besides the tokens."""

    def __init__(self, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.kind = nn.Embedding(VOCAB, hidden, padding_idx=0), nn.Embedding(3, hidden)
        self.facts = nn.Linear(4, hidden)
        self.blocks = nn.ModuleList(layers.Block(hidden, heads, Bidirectional, layers.MLP, nn.LayerNorm, False) for _ in range(2))
        self.pool = nn.Linear(hidden, 1)
        self.tokens, self.label, self.score = nn.Linear(hidden, VOCAB), nn.Linear(hidden, 7), nn.Linear(hidden, 1)
        self.weights = nn.Parameter(torch.zeros(3))

    def forward(self, ids: Tensor, kinds: Tensor, facts: Tensor, labels: Tensor, classes: Tensor, scores: Tensor) -> dict[str, Any]:
        x = self.embed(ids) + self.kind(kinds) + self.facts(facts).unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        weight = self.pool(x).masked_fill((ids == 0).unsqueeze(-1), float("-inf")).softmax(1)
        pooled = (weight * x).sum(1)
        losses = torch.stack([
            F.cross_entropy(self.tokens(x).flatten(0, 1), labels.flatten(), ignore_index=-100),
            F.cross_entropy(self.label(pooled), classes, label_smoothing=0.1),
            F.binary_cross_entropy_with_logits(self.score(pooled).squeeze(-1), scores),
        ])  # fmt: skip
        return {"loss": (losses * torch.exp(-self.weights) + self.weights).sum(), "losses": losses}


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(6))


@seeded
def diffusion() -> Built:
    return DiT(), {"images": noise(BATCH, 3, 16, 16), "labels": integers(10, BATCH)}


@seeded
def perceiver() -> Built:
    return Perceiver(), {"inputs": noise(BATCH, 40, 5), "targets": noise(BATCH, 3, 2, seed=3)}


@seeded
def many_losses() -> Built:
    ids = tokens()
    batch = {"ids": ids, "kinds": integers(3, BATCH, SEQ), "facts": noise(BATCH, 4), "labels": uneven_labels(ids)}
    return ManyLosses(), batch | {"classes": integers(7, BATCH), "scores": noise(BATCH, seed=3).sigmoid()}


CASES: dict[str, Case] = {
    "public_dit": Case(diffusion, random=True),
    "public_perceiver": Case(perceiver),
    "public_losses": Case(many_losses),
}
