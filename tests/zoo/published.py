"""More plain modules as people publish them: what each adds, its docstring says. `CASES[name].build()` is as in plain.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers
from .case import BATCH, VOCAB, Built, Case, tokens, uneven_labels
from .plain import seeded
from .public import integers, noise


class ReferenceLlama(nn.Module):
    """Rotary positions as a complex tensor that is no buffer, a dense additive mask of -inf, kv heads repeated by expand."""

    def __init__(self, hidden: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, width = heads, groups, hidden // heads
        self.embed = nn.Embedding(VOCAB, hidden)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "q": nn.Linear(hidden, hidden, bias=False), "k": nn.Linear(hidden, groups * width, bias=False),
                "v": nn.Linear(hidden, groups * width, bias=False), "o": nn.Linear(hidden, hidden, bias=False),
                "mlp": layers.GatedMLP(hidden, heads), "norm1": nn.RMSNorm(hidden), "norm2": nn.RMSNorm(hidden),
            })
            for _ in range(2)
        )  # fmt: skip
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, VOCAB, bias=False)
        angles = torch.outer(torch.arange(32.0, dtype=torch.float64), 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[1]].view(1, x.shape[1], 1, -1)).flatten(3).type_as(x)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        b, n = ids.shape
        x = self.embed(ids)
        mask = torch.full((n, n), float("-inf"), device=ids.device).triu(1).type_as(x)
        for layer in self.layers:
            h = layer["norm1"](x)
            q, k, v = (layer[part](h).view(b, n, heads, -1) for part, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups)))
            q, k = self.rotate(q), self.rotate(k)
            k, v = (t[:, :, :, None].expand(b, n, self.groups, self.heads // self.groups, t.shape[-1]).flatten(2, 3) for t in (k, v))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1]) + mask
            mixed = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)
            x = x + layer["o"](mixed.transpose(1, 2).contiguous().view(b, n, -1))
            x = x + layer["mlp"](layer["norm2"](x))
        return F.cross_entropy(self.head(self.norm(x)).view(-1, VOCAB), labels.view(-1))


class Universal(nn.Module):
    """One layer applied four times, told each time how often: its weights tie all its uses together."""

    def __init__(self, hidden: int = 32, steps: int = 4) -> None:
        super().__init__()
        self.embed, self.step = nn.Embedding(VOCAB, hidden), nn.Embedding(steps, hidden)
        self.layer = layers.Block(hidden, 4, layers.Attention, layers.MLP, nn.LayerNorm, False)
        self.head = nn.Linear(hidden, VOCAB)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for step in self.step.weight:
            x = self.layer(x + step)
        return F.cross_entropy(self.head(x).transpose(1, 2), labels)


class LatentAttention(nn.Module):
    """Keys and values from a narrow latent, absorbed: scores are taken in the latent space; one rotary part for all heads."""

    def __init__(self, hidden: int = 32, heads: int = 4, latent: int = 16) -> None:
        super().__init__()
        self.heads, self.latent = heads, latent
        self.embed, self.q, self.norm = nn.Embedding(VOCAB, hidden), nn.Linear(hidden, heads * 12, bias=False), nn.RMSNorm(latent)
        self.down, self.up = nn.Linear(hidden, latent + 4, bias=False), nn.Linear(latent, heads * 16, bias=False)
        self.out, self.head = nn.Linear(heads * 8, hidden, bias=False), nn.Linear(hidden, VOCAB)

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[1]), torch.tensor([1.0, 0.01])).to(x.dtype)[None, :, None]
        left, right = x[..., ::2], x[..., 1::2]
        return torch.stack((left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()), -1).flatten(-2)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        plain, turned = self.q(x).unflatten(-1, (self.heads, 12)).split([8, 4], -1)
        kv, key = self.down(x).split([self.latent, 4], -1)
        keys, values = self.up.weight.view(self.heads, 16, self.latent).split(8, 1)
        kv = self.norm(kv)
        scores = torch.einsum("bshd,hdc,btc->bsht", plain, keys, kv)
        scores = scores + torch.einsum("bshr,btr->bsht", self.rotate(turned), self.rotate(key.unsqueeze(2)).squeeze(2))
        late = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)[:, None]
        weights = (scores * 12**-0.5).masked_fill(late, float("-inf")).softmax(-1)
        mixed = torch.einsum("bsht,btc,hdc->bshd", weights, kv, values)
        return F.cross_entropy(self.head(x + self.out(mixed.flatten(2))).flatten(0, 1), labels.flatten())


class Residual(nn.Module):
    def __init__(self, width: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1, self.time = nn.GroupNorm(4, width), nn.Conv2d(width, out, 3, padding=1), nn.Linear(time, out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.skip(x)


class UNet(nn.Module):
    """Convolutions down and up with skips between, attention over places in the middle, a transposed convolution, group norms."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, time = width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.down, self.up = nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ConvTranspose2d(width, width, 4, 2, 1)
        sizes = ((width, width), (width, 2 * width), (2 * width, 2 * width), (4 * width, width), (2 * width, width))
        self.parts = nn.ModuleList(Residual(a, b, time) for a, b in sizes)
        self.norm, self.qkv, self.out = nn.GroupNorm(4, 2 * width), nn.Conv2d(2 * width, 6 * width, 1), nn.Conv2d(2 * width, 2 * width, 1)

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, 2, c // 2, h * w).unbind(1)
        weights = torch.einsum("bhci,bhcj->bhij", q * (c // 2) ** -0.5, k).softmax(-1)
        return x + self.out(torch.einsum("bhij,bhcj->bhci", weights, v).reshape(b, c, h, w))

    def forward(self, images: Tensor, times: Tensor, target: Tensor) -> Tensor:
        half = self.width // 2
        angles = times[:, None].to(images.dtype) * torch.exp(-math.log(10000) * torch.arange(half) / half).to(images.dtype)
        t = self.time(torch.cat((angles.sin(), angles.cos()), -1))
        high = self.parts[0](self.first(images), t)
        low = self.parts[1](self.down(high), t)
        x = self.parts[3](torch.cat((self.attend(self.parts[2](low, t)), low), 1), t)
        return F.mse_loss(self.last(self.parts[4](torch.cat((self.up(x), high), 1), t)), target)


class CapacityMoE(nn.Module):
    """Experts of bounded capacity: one-hot dispatch and combination as einsums, places counted by cumsum; what overflows is dropped."""

    def __init__(self, hidden: int = 32, experts: int = 4, inner: int = 64, capacity: int = 6) -> None:
        super().__init__()
        self.experts, self.capacity = experts, capacity
        self.embed, self.router, self.head = nn.Embedding(VOCAB, hidden), nn.Linear(hidden, experts, bias=False), nn.Linear(hidden, VOCAB)
        self.up = nn.Parameter(torch.randn(experts, hidden, inner) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, inner, hidden) * 0.2)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        used, total = torch.zeros(len(x), 1, self.experts, dtype=x.dtype), torch.zeros_like(x)
        for slot in range(2):
            mine = F.one_hot(chosen[..., slot], self.experts).to(x.dtype)
            place = (mine.cumsum(1) - 1 + used) * mine
            used = used + mine.sum(1, keepdim=True)
            mine = mine * (place < self.capacity)
            to = torch.einsum("bse,bsc->bsec", mine, F.one_hot((place * mine).sum(-1).long(), self.capacity).to(x.dtype))
            inner = F.gelu(torch.einsum("becd,edf->becf", torch.einsum("bsec,bsd->becd", to, x), self.up))
            made = torch.einsum("becf,efd->becd", inner, self.down)
            total = total + torch.einsum("bsec,becd->bsd", to * weights[..., slot, None, None], made)
        return F.cross_entropy(self.head(x + total).flatten(0, 1), labels.flatten())


def language(make: type[nn.Module]) -> Case:
    @seeded
    def build() -> Built:
        ids = tokens()
        return make(), {"ids": ids, "labels": uneven_labels(ids)}

    return Case(build)


@seeded
def unet() -> Built:
    return UNet(), {"images": noise(BATCH, 3, 8, 8), "times": integers(1000, BATCH), "target": noise(BATCH, 3, 8, 8, seed=5)}


CASES: dict[str, Case] = {
    "public_llama": language(ReferenceLlama),
    "public_universal": language(Universal),
    "public_mla": language(LatentAttention),
    "public_unet": Case(unet),
    "public_capacity_moe": language(CapacityMoE),
}
