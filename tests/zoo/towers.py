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


def masked() -> Batch:
    return {"input_ids": tokens(), "labels": uneven_labels(tokens())}


def ended() -> Batch:
    """As `translation`, but every row has a label."""
    return translation() | {"labels": tokens(seed=5).clamp_min(3)}


def waves() -> Batch:
    return {"input_values": draw(BATCH, 128), "labels": classes()}


def spectrograms() -> Batch:
    return {"input_values": draw(BATCH, 16, 16), "labels": classes()}


def spoken() -> Batch:
    return {"input_features": draw(BATCH, 16, 8), "labels": uneven_labels(tokens(seed=5))}


def outlines() -> Batch:
    labels = torch.randint(0, 10, (BATCH, 16, 16), generator=torch.Generator().manual_seed(6))
    labels[1, :5] = 255
    return {"pixel_values": draw(BATCH, 3, 16, 16), "labels": labels}


def captions() -> Batch:
    return {"input_ids": tokens(), "pixel_values": draw(BATCH, 3, 16, 16), "labels": uneven_labels(tokens())}


def placed(size: int, features: int = 4) -> Callable[[], Batch]:
    """Texts that begin with the places of a picture's features, and the pictures."""

    def batch() -> Batch:
        ids = tokens().clamp_min(6)
        ids[:, :features] = 5
        return {"input_ids": ids, "pixel_values": draw(BATCH, 3, size, size), "labels": uneven_labels(tokens())}

    return batch


def prefixed() -> Batch:
    return placed(16)() | {"token_type_ids": (torch.arange(SEQ) > 5).long().repeat(BATCH, 1)}


def large_pictures() -> Batch:
    return {"pixel_values": draw(BATCH, 3, 32, 32), "labels": classes()}


def spans() -> Batch:
    return {"input_ids": tokens(), "start_positions": classes(), "end_positions": classes(SEQ)}


def videos() -> Batch:
    return {"pixel_values": draw(BATCH, 4, 3, 16, 16), "labels": classes()}


def alone() -> Batch:
    return {"pixel_values": draw(BATCH, 3, 16, 16)}


@dataclass(frozen=True)
class Tower:
    """`head`: the class that makes the model of a config: AutoModelFor…, or one by its whole name. The last fields are those of Case."""

    head: str
    config: dict[str, Any]
    batch: Callable[[], Batch]
    whole_batch: bool = False
    random: bool = False


PATCHES = {key: IMAGE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size")} | {
    "patch_size": 4,
}  # fmt: skip
PAIR = {"text_config": TEXT, "vision_config": PATCHES}
WHISPER = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1}

FAMILIES: dict[str, Tower] = {
    "roberta": Tower("MaskedLM", BASE, masked),
    "t5": Tower("Seq2SeqLM", T5, translation),
    "bart": Tower("Seq2SeqLM", SEQ2SEQ, translation),
    "vit": Tower("ImageClassification", IMAGE, pictures),
    "whisper": Tower("SpeechSeq2Seq", WHISPER, speech),
    "clip": Tower("AutoModel", PAIR | {"projection_dim": 16}, pairs, whole_batch=True),
}

GATED = T5 | {"feed_forward_proj": "gated-gelu"}
SMALL = {"image_size": 16, "num_channels": 3, "num_labels": 10}
STAGES = SMALL | {"patch_size": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2}
PYRAMID = SMALL | {"depths": [1, 1], "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2], "num_encoder_blocks": 2}
SHIFTED = SMALL | {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2}
SOUND = BASE | {
    "conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [4, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0, "num_labels": 10,
}  # fmt: skip
XL = {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
FUNNEL = {"vocab_size": VOCAB, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]}
MROPE = {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
MAE = {"decoder_num_attention_heads": 4, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 64}
SPEECH = {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64, "max_target_positions": 64}
PLACES = {"image_token_id": 5, "image_token_index": 5}
SMALL_CLIP = PATCHES | {"model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16}
LARGE_SIGLIP = PATCHES | {"model_type": "siglip_vision_model", "patch_size": 8, "vision_use_head": False, "projection_dim": 32}
MOBILE = {
    "image_size": 32,
    "patch_size": 2,
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
    "num_labels": 10,
}
PLANES = {"num_mel_bins": 16, "max_length": 16, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "num_labels": 10}

FURTHER: dict[str, Tower] = {
    # encoder and decoder
    "mbart": Tower("Seq2SeqLM", SEQ2SEQ, ended),
    "pegasus": Tower("Seq2SeqLM", SEQ2SEQ, translation),
    "marian": Tower("Seq2SeqLM", SEQ2SEQ | {"pad_token_id": 0}, translation),
    "m2m_100": Tower("Seq2SeqLM", SEQ2SEQ, translation),
    "blenderbot": Tower("Seq2SeqLM", SEQ2SEQ, translation),
    "mt5": Tower("Seq2SeqLM", GATED, translation),
    "umt5": Tower("Seq2SeqLM", GATED, translation),
    "longt5": Tower("Seq2SeqLM", T5 | {"local_radius": 3}, translation),
    "speech_to_text": Tower("SpeechSeq2Seq", SEQ2SEQ | SPEECH, spoken),
    # encoders
    "squeezebert": Tower("MaskedLM", BASE | {"embedding_size": 32}, masked),
    "mobilebert": Tower("MaskedLM", BASE | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}, masked),
    "rembert": Tower("MaskedLM", BASE | {"input_embedding_size": 16, "output_embedding_size": 24}, masked),
    "funnel": Tower("MaskedLM", FUNNEL, masked),
    "fnet": Tower("MaskedLM", BASE, masked),
    "esm": Tower("MaskedLM", BASE | {"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"}, masked),
    "xlnet": Tower("XLNetForQuestionAnsweringSimple", XL, spans),
    # images; stochastic depth where a family has it
    "deit": Tower("DeiTForImageClassification", IMAGE, pictures),
    "beit": Tower("ImageClassification", IMAGE | {"use_relative_position_bias": True}, pictures, random=True),
    "dinov2": Tower("ImageClassification", IMAGE, pictures),
    "dinov2_with_registers": Tower("ImageClassification", IMAGE, pictures),
    "ijepa": Tower("ImageClassification", IMAGE, pictures),
    "swin": Tower("ImageClassification", SHIFTED, pictures, random=True),
    "swinv2": Tower("ImageClassification", SHIFTED, pictures, random=True),
    "convnext": Tower("ImageClassification", STAGES, pictures),
    "poolformer": Tower("ImageClassification", PYRAMID | {"padding": [1, 1]}, pictures),
    "segformer": Tower("SemanticSegmentation", PYRAMID | {"sr_ratios": [2, 1], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
                                                          "decoder_hidden_size": 32}, outlines, whole_batch=True, random=True),
    "mobilevit": Tower("ImageClassification", MOBILE | {"num_attention_heads": 4, "num_labels": 10}, large_pictures, whole_batch=True),
    "vit_mae": Tower("PreTraining", IMAGE | MAE, alone, random=True),
    "vivit": Tower("VideoClassification", IMAGE | {"num_frames": 4, "tubelet_size": [2, 4, 4]}, videos),
    "timesformer": Tower("VideoClassification", IMAGE | {"num_frames": 4}, videos),
    # sound
    "audio-spectrogram-transformer": Tower("AudioClassification", BASE | PLANES, spectrograms),
    "wav2vec2": Tower("AudioClassification", SOUND, waves),
    "hubert": Tower("AudioClassification", SOUND, waves),
    # images and text
    "siglip": Tower("AutoModel", PAIR, pairs, whole_batch=True),
    "blip": Tower("ImageTextToText", {"text_config": TEXT | {"bos_token_id": 1}, "vision_config": PATCHES, "image_text_hidden_size": 16},
                  captions),
    "llava": Tower("ImageTextToText", {"text_config": BASE | {"model_type": "llama", "num_key_value_heads": 2}, "vision_config": SMALL_CLIP,
                                       "image_seq_length": 4} | PLACES, placed(8)),
    "paligemma": Tower("ImageTextToText", {"text_config": BASE | {"model_type": "gemma", "num_key_value_heads": 2, "head_dim": 8},
                                           "vision_config": LARGE_SIGLIP, "projection_dim": 32} | PLACES, prefixed),
    "git": Tower("CausalLM", BASE | {"vision_config": PATCHES}, captions),
    "qwen2_vl": Tower("ImageTextToText", {"text_config": BASE | MROPE, "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32,
                                                                                        "num_heads": 4}}, masked),
}  # fmt: skip


def build(name: str) -> Built:
    import transformers

    tower = (FAMILIES | FURTHER)[name]
    config = quiet(transformers.AutoConfig.for_model(name, **tower.config))
    head = getattr(transformers, tower.head, None) or getattr(transformers, f"AutoModelFor{tower.head}")
    torch.manual_seed(0)
    make = head.from_config if hasattr(head, "from_config") else head._from_config
    model = make(config, dtype=torch.float32).train()
    vary(model)
    return model, tower.batch()


def case(name: str) -> Case:
    tower = (FAMILIES | FURTHER)[name]
    return Case(functools.partial(build, name), random=tower.random, whole_batch=tower.whole_batch)
