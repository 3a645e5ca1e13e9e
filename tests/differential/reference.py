"""The plain side of a comparison: one device, the model as it stands, torch's own optimizer.

`follow(trainer, kwargs, settings)` drives anything with a sharded model's verbs and returns an `Outcome`; `Plain` gives a module
those verbs, so both sides go through the same lines. In float64 every float32 cast of the model is promoted (see
`autoshard.trace.promote`), which is what `precision` switches on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tests.zoo import Case


@dataclass(frozen=True)
class Settings:
    """How a pair of runs is made and how far apart it may end: ‖Δ‖ ≤ relative · max(‖x‖, floor · largest ‖x‖), see compare.py."""

    dtype: str
    relative: float
    floor: float
    steps: int = 5
    lr: float = 1e-3
    eps: float = 1e-8
    """AdamW's. A gradient that is zero but for rounding moves its parameter by rounding / eps · lr: eps must stand far above it."""


FLOAT64 = Settings("float64", relative=1e-9, floor=1e-6)
FLOAT32 = Settings("float32", relative=1e-4, floor=1e-3, eps=1e-4)
"""Floor: rounding alone is 1e-7 of the largest gradient, which 1e-4 · 1e-3 of it just lets pass where the true gradient is zero."""
RANKS = Settings("float64", relative=1e-12, floor=1e-3, steps=2, eps=1e-4)
"""Real ranks against the in-process player: the same arithmetic but for the order in which a collective sums (1e-16 a term)."""


class Trainer(Protocol):
    def train_step(self, **kwargs: Any) -> Tensor: ...
    def gradients(self) -> dict[str, Tensor]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def optimizer(self, cls: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer: ...


@dataclass(frozen=True)
class Outcome:
    losses: list[Tensor]
    """One a step."""
    gradients: dict[str, Tensor]
    """Of the first step."""
    state: dict[str, Tensor]
    """Parameters and persistent buffers after the last step."""


class Plain:
    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor] | None) -> None:
        self.model, self.loss = model, loss

    def train_step(self, **kwargs: Any) -> Tensor:
        output = self.model(**kwargs)
        loss = self.loss(output) if self.loss else own_loss(output)
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def optimizer(self, cls: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        return cls([p for p in self.model.parameters() if p.requires_grad], **options)


def own_loss(output: Any) -> Tensor:
    """The scalar itself, `.loss` or ["loss"]."""
    if isinstance(output, Tensor):
        return output
    return output["loss"] if isinstance(output, dict) else output.loss


def follow(trainer: Trainer, kwargs: dict[str, Any], settings: Settings) -> Outcome:
    """Train on one batch for the settings' steps. torch's generator is seeded before each, so that exact dropout can be replayed."""
    optimizer = trainer.optimizer(torch.optim.AdamW, lr=settings.lr, eps=settings.eps)
    losses, gradients = [], {}
    for step in range(settings.steps):
        torch.manual_seed(100 + step)
        losses.append(trainer.train_step(**kwargs).detach().clone())
        if step == 0:
            gradients = {name: gradient.detach().clone() for name, gradient in trainer.gradients().items() if gradient is not None}
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(losses, gradients, {name: value.detach().clone() for name, value in trainer.state_dict().items()})


def build(case: Case, settings: Settings) -> tuple[nn.Module, dict[str, Any]]:
    return case.double() if settings.dtype == "float64" else case.build()


def precision(settings: Settings) -> contextlib.AbstractContextManager[Any]:
    """Where the model is captured and run."""
    if settings.dtype != "float64":
        return contextlib.nullcontext()
    from autoshard.trace.promote import promote_float32

    return promote_float32()


def reference(case: Case, settings: Settings) -> Outcome:
    model, kwargs = build(case, settings)
    with precision(settings):
        return follow(Plain(model, case.loss), kwargs, settings)
