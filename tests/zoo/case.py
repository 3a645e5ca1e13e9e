"""What a model of the zoo is: a recipe that builds the same model and the same global batch each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, SEQ, VOCAB = 8, 12, 67

Built = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """`build()` → (model in train mode, float32; kwargs of its forward). The loss is the model's own unless `loss` makes it of the output.

    `dense`: all weights are matmuls or embeddings that a tensor-parallel plan should cut. `random`: draws in forward, so both sides
    of a comparison must replay one stream. `whole_batch`: not linear in the batch, so microbatching is refused by meaning.
    """

    build: Callable[[], Built]
    loss: Callable[[Any], Tensor] | None = None
    dense: bool = True
    random: bool = False
    whole_batch: bool = False

    def double(self) -> Built:
        """The model and its batch in float64."""
        model, kwargs = self.build()
        return model.double(), {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def tokens(vocab: int = VOCAB, batch: int = BATCH, seq: int = SEQ, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def uneven_labels(ids: Tensor) -> Tensor:
    """The ids with -100 spread so that each row, and each half of the batch, counts a different number of tokens; one row counts none."""
    labels = ids.clone()
    for row in range(len(ids)):
        labels[row, : (5 * row) % ids.shape[1]] = -100
    labels[1] = -100
    return labels
