"""Deferred against ordinary construction, bit for bit, of every family that transformers has and that can be made small.

    python -m tests.runtime.every_family [FAMILY…]

Families that can't be built with the small sizes below, with or without autoshard, are passed over and counted.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Any

import torch

from tests import zoo

from .deferring import check_same

LARGEST = 30_000_000
"""Parameters; what is still larger with the sizes below is passed over."""
SIZES: dict[int, str] = {
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads",
    4: "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads num_experts num_local_experts "
    "n_routed_experts state_size",
    8: "head_dim",
    32: "hidden_size d_model n_embd image_size moe_intermediate_size embedding_size",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff max_position_embeddings n_positions",
    67: "vocab_size",
}


def small(config: Any) -> Any:
    for size, keys in SIZES.items():
        for key in keys.split():
            if type(getattr(config, key, None)) is int:
                setattr(config, key, size)
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_diff_dict"):
            small(value)
        elif key.endswith("_token_id") and isinstance(value, int) and value >= 67:
            setattr(config, key, 0)
    return config


def maker(family: str) -> Any:
    """Builds the family's base model; None where ordinary construction fails or is too large."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    try:
        config = small(CONFIG_MAPPING[family]())
        found = MODEL_MAPPING[type(config)]
        cls = found[0] if isinstance(found, (tuple, list)) else found
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > LARGEST:
            return None
        cls(config)
    except Exception:
        return None
    return lambda: cls(config)


def main(families: list[str]) -> int:
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    families = families or [f for f in transformers.CONFIG_MAPPING if f not in (*zoo.LISTED, *zoo.FURTHER)]
    same, passed, failed = 0, 0, 0
    for family in families:
        build = maker(family)
        if build is None:
            passed += 1
            continue
        try:
            check_same(build)
            same += 1
        except Exception:
            failed += 1
            print(f"{family}:\n{traceback.format_exc(limit=-3)}", flush=True)
    print(f"{same} families are the same, {failed} aren't, {passed} can't be built small")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
