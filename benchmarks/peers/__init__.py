"""Implementations of a work, ours and our peers': each makes a step from the same weights and the same batches.

In: a `Task` (the work, the model's spelling, dtype, ranks, options). Out: `Made`: a step that can be called again and again.
An implementation is asked for by name, with options in brackets: `ours[compile=false,pins.zero=false]` gives `parallelize` these arguments.

>>> [str(s) for s in parse("ours[microbatches=2,pins.zero=false],plain-compile")]
['ours[microbatches=2,pins.zero=false]', 'plain-compile']
>>> parse("ours[microbatches=2,pins.zero=false]")[0].options
{'microbatches': 2, 'pins': {'zero': False}}
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..ranks import Ranks
from ..works import Batch, Work


class Absent(Exception):
    """The implementation can't do this work here; the message says what is missing."""


@dataclass(frozen=True)
class Spec:
    """Which implementation, and how."""

    name: str
    text: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


@dataclass(frozen=True)
class Task:
    work: Work
    model: str
    dtype: torch.dtype
    ranks: Ranks
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.ranks.device


@dataclass
class Made:
    """`prepare`: a global batch → what `step` takes, outside the time that counts. `step`: forward, backward, optimizer; the loss.
    `work`, `devices`: what a step does, and how many share it. `shared`: whether the loss is to be averaged over the ranks."""

    step: Callable[[Any], Tensor]
    work: Work
    devices: int = 1
    prepare: Callable[[Batch], Any] = lambda batch: batch
    shared: bool = False
    sharded: Any = None
    precise: bool = True
    """Computes in the work's dtype, so that losses can be compared closely."""


def adamw(device: torch.device) -> dict[str, Any]:
    return {"lr": 1e-5, "fused": True} if device.type == "cuda" else {"lr": 1e-5}


def loss_of(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.loss


def parts(batch: Batch, count: int, index: int | None = None) -> list[Batch]:
    """A batch in equal parts, or one of them."""
    pieces = {name: tensor.chunk(count) for name, tensor in batch.items()}
    return [{name: piece[i].contiguous() for name, piece in pieces.items()} for i in (range(count) if index is None else [index])]


def stepper(call: Callable[..., Any], optimizer: torch.optim.Optimizer, count: int = 1) -> Callable[[list[Batch]], Tensor]:
    """A step over equal microbatches as one writes it."""

    def step(batches: list[Batch]) -> Tensor:
        total: Tensor | None = None
        for batch in batches:
            loss = loss_of(call(**batch))
            (loss if count == 1 else loss / count).backward()
            total = loss.detach() if total is None else total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        assert total is not None
        return total / count

    return step


def compiled(target: Any, task: Task, **how: Any) -> Any:
    """torch.compile, unless the options say otherwise."""
    return torch.compile(target, dynamic=False, **how) if task.options.get("compile", True) else target


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's layers: the longest list of modules in it."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


# ---- which there are ------------------------------------------------------------------------------------------------


def names() -> list[str]:
    return list(_makers())


def parse(text: str) -> list[Spec]:
    """Names with options, separated by commas. Raises ValueError."""
    found = []
    for part in _split(text):
        name, _, inside = part.strip().partition("[")
        if name not in names():
            raise ValueError(f"no implementation {name!r}; expected some of {', '.join(names())}")
        options: dict[str, Any] = {}
        for pair in filter(None, _split(inside.removesuffix("]"))):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"the option {pair!r} of {name} has no value; expected key=value")
            *path, last = key.strip().split(".")
            at = options
            for step in path:
                at = at.setdefault(step, {})
            at[last] = _value(value.strip())
        found.append(Spec(name, part.strip(), options))
    # whoever initialises torch.distributed for one process comes last: ours would talk through it
    return sorted(found, key=lambda spec: spec.name.startswith("megatron"))


def _split(text: str) -> list[str]:
    """At commas outside of brackets.

    >>> _split('ours[pins.kernels=["rotary", "rms_norm"]],megatron')
    ['ours[pins.kernels=["rotary", "rms_norm"]]', 'megatron']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _value(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def make(spec: Spec, task: Task) -> Made:
    """Raises Absent where the implementation can't be had."""
    return _makers()[spec.name](task)


def _makers() -> dict[str, Callable[[Task], Made]]:
    from . import megatron, ours, plain

    return {
        "ours": ours.own,
        "ours-masters": ours.masters,
        "ours-fp8": ours.fp8,
        "plain-compile": plain.compile,
        "plain-eager": plain.eager,
        "half-compile": plain.half,
        "ddp-compile": plain.ddp,
        "fsdp2-compile": plain.fsdp2,
        "megatron": megatron.bf16,
        "megatron-fp8-delayed": megatron.delayed,
        "megatron-fp8-tensorwise": megatron.tensorwise,
    }
