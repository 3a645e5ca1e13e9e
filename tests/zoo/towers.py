"""Hugging Face models, unmodified and tiny, of more than one stack of blocks over tokens: encoder and decoder, images, sound, two towers.

`FAMILIES` are those that every plan must train exactly; `FURTHER` is tried for breadth. Each is a `Tower`: the class of its model, its
config and its batch. `case(name)` needs transformers; importing this module doesn't.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import BATCH, SEQ, VOCAB, Built, Case, tokens, uneven_labels
from .hf import BASE, SIDES, quiet, vary

Batch = dict[str, Any]
LATER = 9
"""Tokens on the encoder's side: another length than the decoder's."""

IMAGE = {k: v for k, v in BASE.items() if k not in ("vocab_size", "max_position_embeddings")} | {
    "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 10,
}  # fmt: skip
SEQ2SEQ = {"vocab_size": VOCAB, "d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 0} | SIDES
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
TEXT = {k: v for k, v in BASE.items() if k != "max_position_embeddings"} | {"max_position_embeddings": SEQ, "eos_token_id": 2}


def draw(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(n: int = 10) -> Tensor:
    return torch.randint(0, n, (BATCH,), generator=torch.Generator().manual_seed(6))


def masked() -> Batch:
    return {"input_ids": tokens(), "labels": uneven_labels(tokens())}


def translation() -> Batch:
    target = tokens(seed=5)
    lengths = torch.tensor([LATER - (2 * row) % LATER for row in range(BATCH)])
    mask = (torch.arange(LATER) < lengths[:, None]).long()
    return {"input_ids": tokens(seq=LATER, seed=4), "attention_mask": mask, "labels": uneven_labels(target)}


def pictures() -> Batch:
    return {"pixel_values": draw(BATCH, 3, 16, 16), "labels": classes()}


def speech() -> Batch:
    return {"input_features": draw(BATCH, 8, 16), "labels": uneven_labels(tokens(seed=5))}


def pairs() -> Batch:
    """Texts with one end-of-text token each, at different places, and pictures."""
    ids = tokens().clamp_min(3)
    ids[torch.arange(BATCH), torch.arange(BATCH) % 7 + 4] = 2
    return {"input_ids": ids, "pixel_values": draw(BATCH, 3, 16, 16), "return_loss": True}


@dataclass(frozen=True)
class Tower:
    """`auto`: the class that makes the model of a config. The fields that follow are those of Case."""

    auto: str
    config: dict[str, Any]
    batch: Callable[[], Batch]
    whole_batch: bool = False


PATCHES = {k: IMAGE[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")}
WHISPER = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1}

FAMILIES: dict[str, Tower] = {
    "roberta": Tower("MaskedLM", BASE, masked),
    "t5": Tower("Seq2SeqLM", T5, translation),
    "bart": Tower("Seq2SeqLM", SEQ2SEQ, translation),
    "vit": Tower("ImageClassification", IMAGE, pictures),
    "whisper": Tower("SpeechSeq2Seq", WHISPER, speech),
    "clip": Tower("", {"text_config": TEXT, "vision_config": PATCHES, "projection_dim": 16}, pairs, whole_batch=True),
}

TINY_IMAGE = {"image_size": 16, "num_channels": 3, "num_labels": 10}
SOUND = BASE | {
    "conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [4, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0, "num_labels": 10,
}  # fmt: skip
PAIR = {"text_config": TEXT, "vision_config": PATCHES}


def waves() -> Batch:
    return {"input_values": draw(BATCH, 128), "labels": classes()}


def spectrograms() -> Batch:
    return {"input_values": draw(BATCH, 16, 16), "labels": classes()}


def outlines() -> Batch:
    return {"pixel_values": draw(BATCH, 3, 16, 16), "labels": torch.randint(0, 10, (BATCH, 16, 16), generator=torch.Generator().manual_seed(6))}


def masked_pictures() -> Batch:
    return {"pixel_values": draw(BATCH, 3, 16, 16), "bool_masked_pos": classes(2).bool()[:, None] ^ (torch.arange(16) % 3 == 0)}


def captions() -> Batch:
    return {"input_ids": tokens(), "pixel_values": draw(BATCH, 3, 16, 16), "labels": uneven_labels(tokens())}


def spans() -> Batch:
    return {"input_ids": tokens(), "start_positions": classes(), "end_positions": classes(SEQ)}


def videos() -> Batch:
    return {"pixel_values": draw(BATCH, 4, 3, 16, 16), "labels": classes()}


FURTHER: dict[str, Tower] = {
    "deit": Tower("ImageClassification", IMAGE, pictures),
    "beit": Tower("ImageClassification", IMAGE | {"use_relative_position_bias": True}, pictures),
    "dinov2": Tower("ImageClassification", IMAGE, pictures),
    "dinov2_with_registers": Tower("ImageClassification", IMAGE, pictures),
    "ijepa": Tower("ImageClassification", IMAGE, pictures),
    "swin": Tower("ImageClassification", TINY_IMAGE | {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
                  pictures),
    "swinv2": Tower("ImageClassification", TINY_IMAGE | {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                                                         "window_size": 2}, pictures),
    "convnext": Tower("ImageClassification", TINY_IMAGE | {"patch_size": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2}, pictures),
    "segformer": Tower("SemanticSegmentation", TINY_IMAGE | {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2],
        "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "decoder_hidden_size": 32}, outlines, whole_batch=True),
    "poolformer": Tower("ImageClassification", TINY_IMAGE | {"depths": [1, 1], "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2],
                                                             "padding": [1, 1], "num_encoder_blocks": 2}, pictures),
    "vit_mae": Tower("PreTraining", IMAGE | {"decoder_num_attention_heads": 4, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1,
                                             "decoder_intermediate_size": 64}, lambda: {"pixel_values": draw(BATCH, 3, 16, 16)}),
    "vivit": Tower("VideoClassification", IMAGE | {"num_frames": 4, "tubelet_size": [2, 4, 4]}, videos),
    "timesformer": Tower("VideoClassification", IMAGE | {"num_frames": 4}, videos),
    "audio-spectrogram-transformer": Tower("AudioClassification", BASE | {"num_mel_bins": 16, "max_length": 16, "patch_size": 4,
                                           "frequency_stride": 4, "time_stride": 4, "num_labels": 10}, spectrograms),
    "wav2vec2": Tower("AudioClassification", SOUND, waves),
    "hubert": Tower("AudioClassification", SOUND, waves),
    "siglip": Tower("", PAIR, lambda: pairs(), whole_batch=True),
    "blip": Tower("ImageTextToText", {"text_config": TEXT | {"bos_token_id": 1}, "vision_config": PATCHES, "image_text_hidden_size": 16}, captions),
    "git": Tower("CausalLM", BASE | {"vision_config": PATCHES}, captions),
    "qwen2_vl": Tower("ImageTextToText", {"text_config": BASE | {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
                      "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}}, masked),
    "mbart": Tower("Seq2SeqLM", SEQ2SEQ, translation),
    "pegasus": Tower("Seq2SeqLM", SEQ2SEQ, translation),
    "marian": Tower("Seq2SeqLM", SEQ2SEQ | {"pad_token_id": 0}, translation),
    "m2m_100": Tower("Seq2SeqLM", SEQ2SEQ, translation),
    "blenderbot": Tower("Seq2SeqLM", SEQ2SEQ, translation),
    "mt5": Tower("Seq2SeqLM", T5 | {"feed_forward_proj": "gated-gelu"}, translation),
    "umt5": Tower("Seq2SeqLM", T5 | {"feed_forward_proj": "gated-gelu"}, translation),
    "longt5": Tower("Seq2SeqLM", T5 | {"local_radius": 3}, translation),
    "switch_transformers": Tower("Seq2SeqLM", T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, translation),
    "speech_to_text": Tower("SpeechSeq2Seq", SEQ2SEQ | {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64,
                            "max_target_positions": 64}, lambda: {"input_features": draw(BATCH, 16, 8), "labels": uneven_labels(tokens(seed=5))}),
    "squeezebert": Tower("MaskedLM", BASE | {"embedding_size": 32}, masked),
    "mobilebert": Tower("MaskedLM", BASE | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}, masked),
    "rembert": Tower("MaskedLM", BASE | {"input_embedding_size": 16, "output_embedding_size": 24}, masked),
    "funnel": Tower("MaskedLM", {"vocab_size": VOCAB, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]}, masked),
    "fnet": Tower("MaskedLM", BASE, masked),
    "esm": Tower("MaskedLM", BASE | {"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"}, masked),
    "xlnet": Tower("QuestionAnsweringSimple", {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, spans),
}


def build(name: str) -> Built:
    import transformers

    tower = (FAMILIES | FURTHER)[name]
    config = quiet(transformers.AutoConfig.for_model(name, **tower.config))
    auto = getattr(transformers, f"AutoModelFor{tower.auto}") if tower.auto else transformers.AutoModel
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).train()
    vary(model)
    return model, tower.batch()


def case(name: str) -> Case:
    return Case(functools.partial(build, name), whole_batch=(FAMILIES | FURTHER)[name].whole_batch)
