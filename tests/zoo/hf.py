"""Hugging Face models, unmodified and tiny: 4 heads, 2 layers (4 where layer types alternate), dropout off, experts as batched matmuls.

`FAMILIES` are those that every plan must train exactly; `FURTHER` is whatever else configures, tried for breadth.
`case(name)` needs transformers; importing this module doesn't.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .case import BATCH, SEQ, VOCAB, Built, Case, tokens, uneven_labels

BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 2}
HEAD = GROUPED | {"head_dim": 8}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE_MLP = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROUPS = {"n_group": 1, "topk_group": 1}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1} | GROUPS
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
WINDOW = {"num_hidden_layers": 4, "sliding_window": 8}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SIDES = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
         {"layers": 2, "attention_heads": 4, "ffn_dim": 64, "layerdrop": 0.0}.items()}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_neox": BASE,
    "opt": {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.0},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": HEAD,
    "gemma2": HEAD | WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": HEAD | WINDOW | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": GROUPED | {"pad_token_id": 0},
    "olmo2": GROUPED,
    "starcoder2": GROUPED,
    "cohere": GROUPED,
    "granite": GROUPED,
    "glm4": HEAD,
    "mixtral": GROUPED | EXPERTS,
    "gpt_oss": HEAD | EXPERTS | WINDOW,
    "bert": BASE,
}

FURTHER: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gptj": GPT | {"rotary_dim": 4},
    "codegen": GPT | {"rotary_dim": 4},
    "gpt_bigcode": GPT,
    "openai-gpt": GPT,
    "ctrl": GPT | {"dff": 64},
    "falcon": BASE | {"ffn_hidden_size": 64},
    "mpt": {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "persimmon": BASE,
    "stablelm": GROUPED,
    "gemma": HEAD,
    "olmo": GROUPED,
    "olmo3": GROUPED | WINDOW,
    "olmoe": GROUPED | SPARSE_MLP,
    "nemotron": GROUPED,
    "cohere2": HEAD | WINDOW,
    "phi": GROUPED,
    "phimoe": GROUPED | EXPERTS,
    "qwen2_moe": GROUPED | SPARSE_MLP | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": HEAD | SPARSE_MLP,
    "qwen3_next": HEAD | SPARSE_MLP | LINEAR | {"shared_expert_intermediate_size": 32, "num_hidden_layers": 4},
    "deepseek_v2": BASE | LATENT | ROUTED | {"first_k_dense_replace": 1},
    "deepseek_v3": BASE | LATENT | ROUTED | {"first_k_dense_replace": 1},
    "minicpm3": BASE | LATENT,
    "ernie4_5": HEAD,
    "ernie4_5_moe": HEAD | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "smollm3": GROUPED,
    "exaone4": HEAD | WINDOW | {"sliding_window_pattern": 2},
    "helium": HEAD,
    "glm": HEAD,
    "glm4_moe": HEAD | ROUTED,
    "granitemoe": GROUPED | EXPERTS,
    "jetmoe": BASE | {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
    "arcee": GROUPED,
    "apertus": GROUPED,
    "bitnet": GROUPED,
    "diffllama": GROUPED,
    "doge": GROUPED,
    "dots1": HEAD | ROUTED,
    "hunyuan_v1_dense": HEAD,
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
    "llama4_text": HEAD | EXPERTS | {"intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    "ministral": HEAD | WINDOW,
    "seed_oss": HEAD,
    "vaultgemma": HEAD | {"sliding_window": 8},
    "biogpt": BASE | {"layerdrop": 0.0},
    "mamba": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "distilbert": {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "electra": BASE | {"embedding_size": 16},
    "albert": BASE | {"embedding_size": 16},
    "camembert": BASE,
    "xlm-roberta": BASE,
    "deberta": BASE,
    "deberta-v2": BASE,
    "mpnet": BASE,
    "nomic_bert": BASE,
    "modernbert": BASE | {"local_attention": 8},
    "convbert": BASE | {"embedding_size": 32},
    "megatron-bert": BASE,
}

MASKED = {
    "bert", "distilbert", "electra", "albert", "camembert", "xlm-roberta", "deberta", "deberta-v2", "mpnet", "nomic_bert",
    "modernbert", "convbert", "megatron-bert",
}  # fmt: skip
SPARSE = {name for name, config in (FAMILIES | FURTHER).items() if any("expert" in key for key in config)}
OFF = ("dropout", "pdrop", "layerdrop")


def configure(name: str) -> Any:
    """The family's config: sizes of the table, every dropout 0, special tokens inside the vocabulary."""
    import transformers

    return quiet(transformers.AutoConfig.for_model(name, **(FAMILIES | FURTHER)[name]))


def quiet(config: Any) -> Any:
    """No cache, no dropout, special tokens inside the vocabulary, experts as batched matmuls; the configs of its parts too."""
    config.use_cache = False
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and key.endswith((*OFF, "dropout_prob", "dropout_rate")):
            setattr(config, key, 0.0)
        if isinstance(value, int) and key.endswith("_token_id") and value >= VOCAB:
            setattr(config, key, 0)
        if hasattr(value, "to_diff_dict"):
            quiet(value)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "batched_mm"
    return config


def build(name: str, padded: bool = False) -> Built:
    """A seeded model and its batch. `padded` adds an attention mask that hides the tail of some rows."""
    import transformers

    auto = transformers.AutoModelForMaskedLM if name in MASKED else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(configure(name), dtype=torch.float32).train()
    vary(model)
    ids = tokens()
    kwargs: dict[str, Any] = {"input_ids": ids, "labels": uneven_labels(ids)}
    if padded:
        lengths = torch.tensor([SEQ - (3 * row) % SEQ for row in range(BATCH)])
        kwargs["attention_mask"] = (torch.arange(SEQ) < lengths[:, None]).long()
    return model, kwargs


@torch.no_grad()
def vary(model: torch.nn.Module) -> None:
    """Move every parameter off its initial value: zero biases and unit norms would hide a shard that is scaled or added twice."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def case(name: str) -> Case:
    base, _, variant = name.partition("+")
    return Case(functools.partial(build, base, padded=variant == "padded"), dense=base not in SPARSE)


PADDED = [f"{name}+padded" for name in ("gpt2", "llama", "bert", "gemma2", "bloom")]
"""Families tried with an attention mask too."""
