"""Megatron-Core with Transformer Engine, at its documented settings: fused kernels, sequence parallel beside tensor parallel, grouped
experts, FP8 by two recipes.

Its weights are those of the model that the others run, its loss the mean over the same labels.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import build
from ..ranks import free_port
from ..works import Batch
from . import Absent, Made, Task, adamw
from .engine import transformer_engine
from .weights import load, take

COEFFICIENT = 1e-3
"""Of the loss that balances experts, as in Hugging Face's Mixtral (the plain model has none)."""


def bf16(task: Task) -> Made:
    return _make(task, None)


def delayed(task: Task) -> Made:
    return _make(task, "delayed")


def tensorwise(task: Task) -> Made:
    return _make(task, "tensorwise")


def _make(task: Task, recipe: str | None) -> Made:
    _check(task, recipe)
    work, device, size = task.work, task.device, task.ranks.size
    _initialise(task)
    model = _model(task, recipe)
    reference = build(task.model, work.shape, task.dtype, device)
    load(model, take(reference.state_dict(), task.model, work.shape), work.shape.family == "llama", task.ranks.rank, size)
    del reference
    optimizer = torch.optim.AdamW(model.parameters(), **adamw(device))
    # where the sequence is divided, so are the gradients of what every rank has whole
    partial = [p for p in model.parameters() if getattr(p, "sequence_parallel", False)] if size > 1 else []

    def step(batches: list[dict[str, Tensor]]) -> Tensor:
        total: Tensor | None = None
        for b in batches:
            each = model(b["ids"], b["positions"], None, labels=b["labels"]).float()
            loss = (each * b["weight"]).sum()
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        _share(partial)
        optimizer.step()
        optimizer.zero_grad()
        assert total is not None
        return total

    return Made(step, work, size, lambda batch: _prepare(batch, work.count), precise=recipe is None)


def _check(task: Task, recipe: str | None) -> None:
    """Raises Absent."""
    family, axes = task.work.shape.family, task.work.axes
    if family not in ("llama", "gpt2"):
        raise Absent(f"its {family} isn't spelled here")
    if any(axes.size(axis) > 1 for axis in ("pp", "dp")):
        raise Absent("only tensor parallelism is spelled here")
    for package in ("megatron.core", "transformer_engine"):
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise Absent(f"{package} isn't installed")
    if task.device.type != "cuda":
        raise Absent("needs a GPU")


def _initialise(task: Task) -> None:
    transformer_engine()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1, device_id=task.device)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=task.ranks.size)
    model_parallel_cuda_manual_seed(1)


def _model(task: Task, recipe: str | None) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    c = task.work.shape
    gated = c.family == "llama"
    config = _config(task, recipe)
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=c.experts or None, moe_grouped_gemm=bool(c.experts))
    model = GPTModel(
        config, transformer_layer_spec=spec, vocab_size=c.vocab, max_sequence_length=c.seq,
        position_embedding_type="rope" if gated else "learned_absolute", share_embeddings_and_output_weights=not gated,
        rotary_base=int(c.theta), parallel_output=True,
    )  # fmt: skip
    # the router computes in the model's dtype as well
    return model.to(task.device, task.dtype).train()


def _config(task: Task, recipe: str | None) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    c = task.work.shape
    gated, low = c.family == "llama", task.dtype == torch.bfloat16
    options: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": recipe} if recipe else {}
    if c.experts:
        options |= {
            "num_moe_experts": c.experts, "moe_router_topk": c.topk, "moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss" if task.model == "hf" else "none", "moe_aux_loss_coeff": COEFFICIENT,
            "moe_permute_fusion": True, "moe_ffn_hidden_size": c.ffn,
        }  # fmt: skip
    return TransformerConfig(
        num_layers=c.layers, hidden_size=c.hidden, num_attention_heads=c.heads, num_query_groups=c.kv, ffn_hidden_size=c.ffn, bf16=low,
        params_dtype=task.dtype, pipeline_dtype=task.dtype, normalization="RMSNorm" if gated else "LayerNorm", gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu, add_bias_linear=not gated, bias_activation_fusion=True,
        layernorm_epsilon=1e-6 if gated else 1e-5, apply_rope_fusion=gated, attention_dropout=c.dropout, hidden_dropout=c.dropout,
        tensor_model_parallel_size=task.ranks.size, sequence_parallel=task.ranks.size > 1, cross_entropy_loss_fusion=True,
        gradient_accumulation_fusion=False, persist_layer_norm=True, bias_dropout_fusion=True, **options,
    )  # fmt: skip


def _share(partial: list[nn.Parameter]) -> None:
    """Sum gradients over the tensor-parallel ranks, in one message."""
    grads = [p.grad for p in partial if p.grad is not None]
    if grads:
        whole = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(whole)
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(whole.split([g.numel() for g in grads]), grads, strict=True)])


def _prepare(batch: Batch, count: int) -> list[dict[str, Tensor]]:
    """Every position's label is the next token; `weight` makes the sum over labels their mean."""
    ids = batch["input_ids"]
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    weight = (labels != -100).float()
    whole = {
        "ids": ids,
        "positions": torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous(),
        "labels": labels.clamp(min=0),
        "weight": weight / weight.sum(),
    }
    pieces = {name: tensor.chunk(count) for name, tensor in whole.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(count)]
