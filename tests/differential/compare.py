"""How far apart two outcomes may be, and how far they are: a list of `Difference`, worst first.

- loss of each step: |Δ| ≤ relative · |loss|
- each gradient: ‖Δ‖ ≤ relative · max(‖g‖, floor · the largest ‖g‖ of any parameter)
- each parameter and buffer at the end: ‖Δ‖ ≤ relative · max(‖p‖, lr · √numel); integers equal

What is missing, of another shape or dtype, or not finite is infinitely far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import Outcome, Settings


@dataclass(frozen=True)
class Difference:
    what: str
    delta: float
    allowed: float
    note: str = ""

    @property
    def ratio(self) -> float:
        """Distance in units of what is allowed: at most 1 passes."""
        if not math.isfinite(self.delta):
            return math.inf
        return self.delta / self.allowed if self.allowed else (math.inf if self.delta else 0.0)

    def __str__(self) -> str:
        return f"{self.what}: {self.delta:.3e} apart, {self.allowed:.3e} allowed{f' ({self.note})' if self.note else ''}"


def compare(expected: Outcome, found: Outcome, settings: Settings) -> list[Difference]:
    rows = [
        measure(f"loss of step {i}", a, b, settings.relative * abs(float(a)))
        for i, (a, b) in enumerate(zip(expected.losses, found.losses, strict=True))
    ]
    largest = max((float(g.norm()) for g in expected.gradients.values()), default=0.0)
    for name, gradient in expected.gradients.items():
        allowed = settings.relative * max(float(gradient.norm()), settings.floor * largest)
        rows.append(measure(f"gradient of {name}", gradient, found.gradients.get(name), allowed))
    for name in found.gradients.keys() - expected.gradients.keys() - aliases(expected):
        rows.append(measure(f"gradient of {name}, which has none", torch.zeros_like(found.gradients[name]), found.gradients[name], 0.0))
    for name, value in expected.state.items():
        size = max(float(value.double().norm()), settings.lr * math.sqrt(value.numel())) if value.is_floating_point() else 0.0
        rows.append(measure(f"{name} after {settings.steps} steps", value, found.state.get(name), settings.relative * size))
    return sorted(rows, key=lambda row: -row.ratio)


def aliases(expected: Outcome) -> set[str]:
    """Other names of parameters that have a gradient: tied ones may be reported under each of their names."""
    owners = [expected.state[name] for name in expected.gradients if name in expected.state]
    return {
        name
        for name, value in expected.state.items()
        if name not in expected.gradients and any(value.shape == owner.shape and torch.equal(value, owner) for owner in owners)
    }


def measure(what: str, expected: Tensor, found: Tensor | None, allowed: float) -> Difference:
    if found is None:
        return Difference(what, math.inf, allowed, "missing")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        shapes = f"found {found.dtype}{list(found.shape)}, expected {expected.dtype}{list(expected.shape)}"
        return Difference(what, math.inf, allowed, shapes)
    if not bool(torch.isfinite(expected).all()):
        same = torch.equal(torch.nan_to_num(expected), torch.nan_to_num(found))
        return Difference(what, 0.0 if same else math.inf, allowed, "not finite on one device")
    return Difference(what, float((found.double() - expected.double()).norm()), allowed)
