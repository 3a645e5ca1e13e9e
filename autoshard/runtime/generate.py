"""Greedy continuation, as a check of a trained model: the whole forward for every token, at one padded length.

In: a sharded model whose output holds logits [batch, sequence, vocabulary], rows of tokens. Out: the rows with what follows. No cache:
the model must be causal, so that what is not yet there, to the right, changes nothing.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BatchError
from .trainable import Wanted

if TYPE_CHECKING:
    from .module import Sharded


def generate(run: Sharded, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None, others: dict[str, Any]) -> Tensor:
    """[batch, prompt] → [batch, prompt + new]; a row that came to `eos_token_id` is filled with it. `others`: the model's further
    arguments, for the padded length. What it can't be called without (labels) is given the tokens: the loss isn't used."""
    if input_ids.ndim != 2 or input_ids.is_floating_point() or not input_ids.shape[1] or max_new_tokens < 0:
        raise BatchError(f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}", hint="give whole numbers [batch, prompt]")
    rows, start = input_ids.shape
    each = run.program.mesh.size("dp") * run.program.microbatches
    ids = input_ids.new_zeros(-(-rows // each) * each, start + max_new_tokens)
    ids[:, :start] = input_ids[[min(i, rows - 1) for i in range(len(ids))]]
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    logits = Wanted("logits", True, loss=mean_of_logits)
    for at in range(start, start + max_new_tokens):
        name, more = arguments(run, ids)
        _, found = run._evaluate((), {name: ids, **more, **others}, logits)
        following = found["logits"][:, at - 1].argmax(-1).to(ids)
        if eos_token_id is not None:
            following = torch.where(ended, eos_token_id, following)
            ended |= following == eos_token_id
        ids[:, at] = following
        if eos_token_id is not None and bool(ended[:rows].all()):
            return ids[:rows, : at + 1]
    return ids[:rows]


def arguments(run: Sharded, ids: Tensor) -> tuple[str, dict[str, Tensor]]:
    """The keyword of the tokens, and what else the model can't be called without."""
    parameters = inspect.signature(run.signature()).parameters
    name = "input_ids" if "input_ids" in parameters else next(iter(parameters))
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return name, {other: ids for other in needed if other != name}


def mean_of_logits(output: Any) -> Tensor:
    """Stands in for the loss, which nobody reads."""
    return logits_of(output).float().mean()


def logits_of(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise BatchError("the model's output has no logits [batch, sequence, vocabulary]", hint='return them as .logits or ["logits"]')
    return found
