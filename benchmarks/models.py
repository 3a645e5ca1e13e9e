"""Models to measure: a plain Llama, written as one writes it for one GPU, and Hugging Face's of the same shape.

Both take `(input_ids, labels)`, and predict each token from those before it. The plain one returns the loss, Hugging Face's an output
that has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# shapes:  x [b s d]   q [b h s e]   k, v [b k s e]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama and of its batch."""

    layers: int = 16
    hidden: int = 2048
    ffn: int = 8192
    heads: int = 32
    kv: int = 8
    vocab: int = 128256
    seq: int = 4096
    batch: int = 2
    theta: float = 500000.0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def flops(self) -> int:
        """Of one step: 6 for each matmul weight and token, and attention counted causally.

        >>> round(Shape().flops / 1e12, 1)
        67.3
        """
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv)
        active = self.layers * (attention + 3 * self.hidden * self.ffn) + self.hidden * self.vocab
        tokens = self.batch * self.seq
        return 6 * active * tokens + 6 * self.layers * self.heads * self.head_dim * self.seq * tokens


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.heads, self.kv, self.head_dim = c.heads, c.kv, c.head_dim
        self.q = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k = nn.Linear(c.hidden, c.kv * c.head_dim, bias=False)
        self.v = nn.Linear(c.hidden, c.kv * c.head_dim, bias=False)
        self.o = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = rotate(self.q(x).view(b, s, self.heads, self.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k(x).view(b, s, self.kv, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v(x).view(b, s, self.kv, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != self.heads)
        return self.o(out.transpose(1, 2).reshape(b, s, self.heads * self.head_dim))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves paired: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class MLP(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(c.hidden, c.ffn, bias=False)
        self.up = nn.Linear(c.hidden, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.norm1, self.attention = RMSNorm(c.hidden), Attention(c)
        self.norm2, self.mlp = RMSNorm(c.hidden), MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden)
        self.head = nn.Linear(c.hidden, c.vocab, bias=False)
        frequency = c.theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
        angle = torch.outer(torch.arange(c.seq, dtype=torch.float32), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos().to(self.embed.weight.dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(self.embed.weight.dtype), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).float()
        # every position predicts the next one; the last has none
        target = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def hugging_face(c: Shape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=c.hidden, intermediate_size=c.ffn, num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv,
        vocab_size=c.vocab, max_position_embeddings=c.seq, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def build(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """The same weights whenever the arguments are the same."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return {"plain": Llama, "hf": hugging_face}[kind](shape).train()
    finally:
        torch.set_default_dtype(default)
