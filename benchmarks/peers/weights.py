"""A model's weights in Megatron-Core's modules.

In: the state of a plain or a Hugging Face decoder. Out: `Weights`, whole tensors laid out as Megatron-Core has them; `load` copies each
rank's part of them into a GPTModel, whose layers may be its own or Transformer Engine's (which name the same things differently).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..models import Shape

PLAIN = {
    "embedding": "embed.weight", "final": "norm.", "head": "head.weight", "norm1": "layers.{}.norm1.", "norm2": "layers.{}.norm2.",
    "q": "layers.{}.attention.q.", "k": "layers.{}.attention.k.", "v": "layers.{}.attention.v.", "proj": "layers.{}.attention.o.",
    "gate": "layers.{}.mlp.gate.", "up": "layers.{}.mlp.up.", "down": "layers.{}.mlp.down.", "router": "layers.{}.mlp.router.weight",
    "expert gate": "layers.{}.mlp.experts.{}.gate.", "expert up": "layers.{}.mlp.experts.{}.up.",
    "expert down": "layers.{}.mlp.experts.{}.down.",
}  # fmt: skip
LLAMA = {
    "embedding": "model.embed_tokens.weight", "final": "model.norm.", "head": "lm_head.weight", "norm1": "model.layers.{}.input_layernorm.",
    "norm2": "model.layers.{}.post_attention_layernorm.", "q": "model.layers.{}.self_attn.q_proj.",
    "k": "model.layers.{}.self_attn.k_proj.", "v": "model.layers.{}.self_attn.v_proj.", "proj": "model.layers.{}.self_attn.o_proj.",
    "gate": "model.layers.{}.mlp.gate_proj.", "up": "model.layers.{}.mlp.up_proj.", "down": "model.layers.{}.mlp.down_proj.",
    "router": "model.layers.{}.mlp.gate.weight", "experts up": "model.layers.{}.mlp.experts.gate_up_proj",
    "experts down": "model.layers.{}.mlp.experts.down_proj",
}  # fmt: skip
GPT2 = {
    "embedding": "transformer.wte.weight", "positions": "transformer.wpe.weight", "final": "transformer.ln_f.",
    "norm1": "transformer.h.{}.ln_1.", "norm2": "transformer.h.{}.ln_2.", "qkv": "transformer.h.{}.attn.c_attn.",
    "proj": "transformer.h.{}.attn.c_proj.", "fc1": "transformer.h.{}.mlp.c_fc.", "down": "transformer.h.{}.mlp.c_proj.",
}  # fmt: skip
"""Names by role; one that ends in a dot has a weight and maybe a bias."""

MEGATRON: tuple[tuple[str, str, str], ...] = (
    (r"embedding\.word_embeddings\.weight", "embedding", "rows"),
    (r"embedding\.position_embeddings\.weight", "positions", ""),
    (r"output_layer\.weight", "head", "rows"),
    (r"decoder\.final_layernorm\.(\w+)", "final.{0}", ""),
    (r"decoder\.layers\.(\d+)\.input_layernorm\.(\w+)", "{0}.norm1.{1}", ""),
    (r"decoder\.layers\.(\d+)\.self_attention\.linear_qkv\.layer_norm_(\w+)", "{0}.norm1.{1}", ""),
    (r"decoder\.layers\.(\d+)\.self_attention\.linear_qkv\.(\w+)", "{0}.qkv.{1}", "rows"),
    (r"decoder\.layers\.(\d+)\.self_attention\.linear_proj\.(\w+)", "{0}.proj.{1}", "columns"),
    (r"decoder\.layers\.(\d+)\.(?:pre_mlp_layernorm\.|mlp\.linear_fc1\.layer_norm_)(\w+)", "{0}.norm2.{1}", ""),
    (r"decoder\.layers\.(\d+)\.mlp\.linear_fc1\.(\w+)", "{0}.fc1.{1}", "halves"),
    (r"decoder\.layers\.(\d+)\.mlp\.linear_fc2\.(\w+)", "{0}.fc2.{1}", "columns"),
    (r"decoder\.layers\.(\d+)\.mlp\.router\.weight", "{0}.router", ""),
    (r"decoder\.layers\.(\d+)\.mlp\.experts\.linear_fc1\.weight(\d+)", "{0}.{1}.fc1", "halves"),
    (r"decoder\.layers\.(\d+)\.mlp\.experts\.linear_fc2\.weight(\d+)", "{0}.{1}.fc2", "columns"),
    (r"decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.linear_fc1\.weight", "{0}.{1}.fc1", "halves"),
    (r"decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.linear_fc2\.weight", "{0}.{1}.fc2", "columns"),
)
"""A GPTModel's parameter → which of ours it is, and how tensor parallelism cuts it."""

Weights = dict[str, Tensor]


def load(model: nn.Module, weights: Weights, gated: bool, rank: int = 0, size: int = 1) -> None:
    """Copy this rank's parts into the model. Raises KeyError if either side has what the other hasn't."""
    used: set[str] = set()
    with torch.no_grad():
        for name, param in model.named_parameters():
            source, cut = _source(name)
            if source not in weights:
                raise KeyError(f"Megatron-Core's parameter {name} would be {source!r}, which the model doesn't have")
            used.add(source)
            part = _part(weights[source], cut if gated or cut != "halves" else "rows", rank, size)
            if part.shape != param.shape:
                raise KeyError(f"Megatron-Core's parameter {name} has the shape {tuple(param.shape)}, ours {tuple(part.shape)}")
            param.copy_(part)
    if left := sorted(set(weights) - used):
        raise KeyError(f"Megatron-Core's model has no place for {', '.join(left[:5])}")


def _source(name: str) -> tuple[str, str]:
    for pattern, target, cut in MEGATRON:
        if found := re.fullmatch(pattern, name):
            return target.format(*found.groups()), cut
    raise KeyError(f"Megatron-Core's parameter {name} isn't known")


def _part(whole: Tensor, cut: str, rank: int, size: int) -> Tensor:
    if cut == "rows":
        return whole.chunk(size)[rank]
    if cut == "columns":  # biases there are added after the sum
        return whole.chunk(size, 1)[rank] if whole.dim() > 1 else whole
    if cut == "halves":
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole


def take(state: Mapping[str, Tensor], model: str, c: Shape) -> Weights:
    """The weights of a plain or Hugging Face model of that shape, as Megatron-Core has them."""
    names = PLAIN if model == "plain" else {"llama": LLAMA, "gpt2": GPT2}[c.family]
    found: Weights = {role: state[names[role]] for role in ("embedding", "positions", "head") if role in names}
    pairs = _Pairs(state, names, transposed=c.family == "gpt2")
    found |= pairs("final", "final")
    for i in range(c.layers):
        found |= pairs(f"{i}.norm1", "norm1", i) | pairs(f"{i}.norm2", "norm2", i) | pairs(f"{i}.proj", "proj", i)
        if "qkv" in names:
            for name, fused in pairs(f"{i}.qkv", "qkv", i).items():
                q, k, v = fused.chunk(3)
                found[name] = _by_group(q, k, v, c)
        else:
            qs, ks, vs = (pairs(f"{i}.qkv", role, i) for role in "qkv")
            found |= {name: _by_group(qs[name], ks[name], vs[name], c) for name in qs}
        if c.experts:
            found |= _experts(state, names, i, c)
        elif "fc1" in names:
            found |= pairs(f"{i}.fc1", "fc1", i) | pairs(f"{i}.fc2", "down", i)
        else:
            gate, up = (pairs(f"{i}.fc1", role, i) for role in ("gate", "up"))
            found |= {name: torch.cat([gate[name], up[name]]) for name in gate} | pairs(f"{i}.fc2", "down", i)
    return found


def _experts(state: Mapping[str, Tensor], names: Mapping[str, str], i: int, c: Shape) -> Weights:
    found = {f"{i}.router": state[names["router"].format(i)]}
    for j in range(c.experts):
        if "experts up" in names:
            into, out = state[names["experts up"].format(i)][j], state[names["experts down"].format(i)][j]
        else:
            gate, up, out = (state[names[f"expert {role}"].format(i, j) + "weight"] for role in ("gate", "up", "down"))
            into = torch.cat([gate, up])
        found |= {f"{i}.{j}.fc1": into, f"{i}.{j}.fc2": out}
    return found


class _Pairs:
    """(our name, role, layer) → {our name + ".weight": …, and ".bias" if there is one}."""

    def __init__(self, state: Mapping[str, Tensor], names: Mapping[str, str], transposed: bool) -> None:
        self.state, self.names, self.transposed = state, names, transposed

    def __call__(self, ours: str, role: str, *at: int) -> Weights:
        name = self.names[role].format(*at)
        found = {kind: self.state[name + kind] for kind in ("weight", "bias") if name + kind in self.state}
        return {f"{ours}.{kind}": t.t() if self.transposed and t.dim() == 2 else t for kind, t in found.items()}


def _by_group(q: Tensor, k: Tensor, v: Tensor, c: Shape) -> Tensor:
    """q, k and v of each group of heads together: rows are (group, its queries ‖ key ‖ value, head_dim)."""
    rows = [t.reshape(c.kv, -1, c.head_dim, *t.shape[1:]) for t in (q, k, v)]
    return torch.cat(rows, 1).flatten(0, 2)
