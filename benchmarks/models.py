"""Models to measure: a plain Llama, written as one writes it for one GPU (with experts if the shape has them), and Hugging Face's.

`build` makes the one or the other for a `Shape`. Those of text take `(input_ids, labels)`, Hugging Face's ViT `(pixel_values, labels)`.
The plain one returns the loss, Hugging Face's an output that has it. The decoders predict each token from those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16
"""Pixels on the side of a ViT's patch."""

# shapes:  x [b s d]   q [b h s e]   k, v [b k s e]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of its batch. `family`: llama, gpt2, bert or vit; of a llama, `experts` a layer, `topk` to a token. A vit
    has `seq` patches and a class token, and `vocab` classes."""

    layers: int = 16
    hidden: int = 2048
    ffn: int = 8192
    heads: int = 32
    kv: int = 8
    vocab: int = 128256
    seq: int = 4096
    batch: int = 2
    theta: float = 500000.0
    experts: int = 0
    topk: int = 2
    family: str = "llama"
    dropout: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        """Of a batch, as the layers see them."""
        return self.batch * (self.seq + (self.family == "vit"))


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


class Experts(nn.Module):
    """Each token goes through the `topk` experts that the router likes best, weighted among these."""

    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.topk = c.topk
        self.router = nn.Linear(c.hidden, c.experts, bias=False)
        self.experts = nn.ModuleList(MLP(c) for _ in range(c.experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        best, chosen = self.router(rows).float().topk(self.topk, -1)
        weight = best.softmax(-1).to(x.dtype)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            out = out.index_add(0, row, expert(rows[row]) * weight[row, place, None])
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self, c: Shape) -> None:
        super().__init__()
        self.norm1, self.attention = RMSNorm(c.hidden), Attention(c)
        self.norm2, self.mlp = RMSNorm(c.hidden), Experts(c) if c.experts else MLP(c)

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
    return HUGGING_FACE[c.family](c)


def _sdpa(config: Any) -> Any:
    config._attn_implementation = "sdpa"
    return config


def _llama(c: Shape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": c.hidden, "intermediate_size": c.ffn, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv, "vocab_size": c.vocab, "max_position_embeddings": c.seq, "use_cache": False,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": c.theta},
    }  # fmt: skip
    if not c.experts:
        return LlamaForCausalLM(_sdpa(LlamaConfig(**sizes)))
    sizes |= {"num_local_experts": c.experts, "num_experts_per_tok": c.topk, "output_router_logits": True, "sliding_window": None}
    config = _sdpa(MixtralConfig(**sizes))
    config._experts_implementation = "grouped_mm"
    return MixtralForCausalLM(config)


def _gpt2(c: Shape) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=c.vocab, n_positions=c.seq, n_embd=c.hidden, n_layer=c.layers, n_head=c.heads, n_inner=c.ffn, use_cache=False,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(_sdpa(config))


def _bert(c: Shape) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=c.vocab, hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.ffn,
        max_position_embeddings=c.seq, hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout,
    )  # fmt: skip
    return BertForMaskedLM(_sdpa(config))


def _vit(c: Shape) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.ffn, num_labels=c.vocab,
        image_size=PATCH * math.isqrt(c.seq), patch_size=PATCH, hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout,
    )  # fmt: skip
    return ViTForImageClassification(_sdpa(config))


HUGGING_FACE: dict[str, Callable[[Shape], nn.Module]] = {"llama": _llama, "gpt2": _gpt2, "bert": _bert, "vit": _vit}


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
