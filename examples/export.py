"""The GPT of gpt.py as a Hugging Face GPT-2: the same function under other names.

`to_hugging_face(weights, config, folder)` writes config.json and model.safetensors that `transformers` loads; `difference` loads them
back, and compares the logits with the plain model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from gpt import GPT, Config
from torch import Tensor

NAMES = {
    "token_embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    "norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    "head.weight": "lm_head.weight",
}


def renamed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """GPT-2's name of a weight. Its linears in blocks keep their matrices as [in, out]."""
    if name in NAMES:
        return NAMES[name], tensor
    if not name.startswith("blocks."):
        module, _, kind = name.rpartition(".")
        return f"{NAMES[module]}.{kind}", tensor
    _, layer, inner = name.split(".", 2)
    module, _, kind = inner.rpartition(".")
    linear = kind == "weight" and tensor.ndim == 2
    return f"transformer.h.{layer}.{NAMES[module]}.{kind}", tensor.T.contiguous() if linear else tensor


def to_hugging_face(weights: Mapping[str, Tensor], config: Config, folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = GPT2Config(
        vocab_size=config.vocab, n_positions=config.seq, n_embd=config.hidden, n_layer=config.layers, n_head=config.heads,
        activation_function="gelu", tie_word_embeddings=config.tied, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(sizes)
    model.load_state_dict(dict(renamed(name, tensor.cpu()) for name, tensor in weights.items()), strict=True)
    model.save_pretrained(folder)


@torch.no_grad()
def difference(weights: Mapping[str, Tensor], config: Config, folder: Path, tokens: Tensor) -> float:
    """The largest difference of a logit between what `transformers` loads from the folder and the plain model."""
    from transformers import AutoModelForCausalLM

    plain = GPT(config).eval()
    plain.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()})
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = plain(tokens) - loaded(input_ids=tokens).logits
    return float(found.abs().max())
