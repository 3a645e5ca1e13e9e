"""The most direct typing: run a program, and compare what the ranks hold at block boundaries, values and gradients, with the whole.

A value of layout R or I must be equal on all ranks, shards must tile it and terms must sum to it; its gradient must be the whole
gradient in the layout's gradient type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from autoshard.layout import Type, gradient
from autoshard.lower.program import Program
from autoshard.runtime.executor import Step
from autoshard.runtime.in_process import InProcess
from autoshard.trace.captured import Captured

from .sample import Coords, assemble

Held = dict[str, dict[Coords, Tensor]]
"""value|layout → what each rank holds."""


@dataclass
class Record:
    values: Held = field(default_factory=dict)
    gradients: Held = field(default_factory=dict)


def played(program: Program, model: nn.Module, kwargs: dict[str, Any]) -> Record:
    """One training step of all ranks, with everything that crosses a block's boundary."""
    record = Record()
    forward, total = Step.forward, Step.gradient

    def coords(step: Step) -> Coords:
        return step.x.rank.coords["dp"], step.x.rank.coords["tp"]

    def recording_forward(self: Step, call: Any, env: dict[str, Tensor], key: Any) -> Iterator[Any]:
        yield from forward(self, call, env, key)
        for name in call.outputs:
            record.values.setdefault(name, {})[coords(self)] = env[name].detach().clone()

    def recording_gradient(self: Step, grads: dict[str, Tensor], name: str) -> Tensor:
        found = total(self, grads, name)
        record.gradients.setdefault(name, {})[coords(self)] = found.detach().clone()
        return found

    with mock.patch.object(Step, "forward", recording_forward), mock.patch.object(Step, "gradient", recording_gradient):
        InProcess(program, model).train_step(**kwargs)
    return record


def whole(captured: Captured, model: nn.Module, kwargs: dict[str, Any]) -> tuple[set[str], dict[str, Tensor], dict[str, Tensor]]:
    """The parameters' names; every value of the graph on one device; the gradients of those that have one."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {v.name: own[v.path].detach().clone().requires_grad_(v.grad) for v in captured.graph.sources("param", "buffer")}
    values = captured.run({**tensors, **captured.flatten((), kwargs)})
    wanted = [n for n, t in values.items() if t.requires_grad]
    found = torch.autograd.grad(values[captured.graph.loss], [values[n] for n in wanted], allow_unused=True)
    whole_values = {n: t.detach() for n, t in values.items()}
    parameters = {v.name for v in captured.graph.sources("param")}
    return parameters, whole_values, {n: g for n, g in zip(wanted, found, strict=True) if g is not None}


def differences(
    record: Record, parameters: set[str], values: dict[str, Tensor], gradients: dict[str, Tensor], sizes: tuple[int, int]
) -> list[str]:
    """What at the boundaries isn't the whole in the layout claimed."""
    found = []
    for what, held, expected in (("value", record.values, values), ("gradient", record.gradients, gradients)):
        scale = 1 + max(float(t.abs().max()) for t in expected.values() if t.is_floating_point() and t.numel() and t.isfinite().all())
        scale = scale - 1 if what == "gradient" else scale
        for env, parts in held.items():
            name, _, text = env.partition("|")
            if name not in expected or not text or name in parameters:  # a parameter's uses have each a part of its gradient
                continue
            layout = tuple(Type.parse(t) for t in text.split(","))
            if what == "gradient":
                layout = tuple(map(gradient, layout))
            made = assemble(parts, expected[name].shape, layout, sizes)
            if isinstance(made, str):
                found.append(f"{what} {env}: {made}")
            elif made.numel() and float((made.double() - expected[name].double()).abs().max()) > 1e-9 * scale:
                found.append(f"{what} {env}: differs from the whole")
    return found
