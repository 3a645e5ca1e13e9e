"""Bytes on one device: what stands there all step long, and what the schedule makes live at once.

In: bytes of parameters by dtype, saved bytes per stage and microbatch, an instruction list. Out: `StageMemory`, with its breakdown.

>>> stage = StageMemory(params=2e9, grads=2e9, optimizer=optimizer_bytes({"bfloat16": 2e9}), activations=5e9, buffers=0)
>>> f"{stage.optimizer / 1e9:g} GB of optimizer state, {stage.total / 1e9:.1f} GB in all"
'12 GB of optimizer state, 21.3 GB in all'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...trace.graph import ITEMSIZE
from ..schedules import COMPUTE, Action

FRAGMENTATION = 1.06
"""Reserved over allocated bytes of torch's caching allocator. Applied to what is allocated and freed as the step goes on (activations):
parameters, gradients and optimizer state are allocated once. 3 to 10 % is usual with expandable segments off; the middle is taken."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Peak bytes of one pipeline stage on one device. `buffers`: model buffers, constants and communication buckets."""

    params: float = 0.0
    grads: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    buffers: float = 0.0
    fragmentation: float = FRAGMENTATION

    @property
    def total(self) -> float:
        return self.params + self.grads + self.optimizer + self.buffers + self.activations * self.fragmentation

    def breakdown(self) -> dict[str, float]:
        """The parts that add up to `total`."""
        lost = self.activations * (self.fragmentation - 1)
        parts = {"params": self.params, "grads": self.grads, "optimizer": self.optimizer, "activations": self.activations}
        return {**parts, "buffers": self.buffers, "fragmentation": lost}

    def __add__(self, other: StageMemory) -> StageMemory:
        """Several stages on one device."""
        return StageMemory(
            params=self.params + other.params,
            grads=self.grads + other.grads,
            optimizer=self.optimizer + other.optimizer,
            activations=self.activations + other.activations,
            buffers=self.buffers + other.buffers,
            fragmentation=max(self.fragmentation, other.fragmentation),
        )


def optimizer_bytes(param_bytes_by_dtype: Mapping[str, float], *, moments: int = 2, master: bool = True) -> float:
    """State of AdamW (two moments) for trainable parameters of those bytes.

    Moments are float32, or of the parameter's dtype if that is wider; parameters narrower than float32 also have a float32 master copy.
    """
    total = 0.0
    for dtype, size in param_bytes_by_dtype.items():
        item = ITEMSIZE[dtype]
        elements = size / item
        total += elements * max(item, 4) * moments
        if master and item < 4:
            total += elements * 4
    return total


def gradient_bytes(param_bytes_by_dtype: Mapping[str, float], accumulate: str | None = None) -> float:
    """Gradients of trainable parameters: of their dtype, or of `accumulate` if that is given (float32 accumulation, say)."""
    if accumulate is None:
        return float(sum(param_bytes_by_dtype.values()))
    return sum(size / ITEMSIZE[dtype] * ITEMSIZE[accumulate] for dtype, size in param_bytes_by_dtype.items())


def activation_bytes(
    actions: Sequence[Action],
    saved: Mapping[int, float],
    *,
    kept: Mapping[int, float] | None = None,
    received: Mapping[int, float] | None = None,
    working: float = 0.0,
) -> list[float]:
    """The most activation bytes that one rank holds during each action of its list; `max` of it is the peak.

    Per stage: `saved` is what a forward leaves for its backward, `kept` what an I leaves for its W, `received` one message, which lives
    from its receive to the end of the computation that takes it. `working` is the transient peak inside a computation.
    """
    kept, received = kept or {}, received or {}
    live = 0.0
    waiting: dict[tuple[int, int], float] = {}
    found: list[float] = []
    for action in actions:
        kind, stage, place = action.kind, action.stage, (action.stage, action.mb)
        during = live
        if kind in ("RF", "RB"):
            waiting[place] = waiting.get(place, 0.0) + received.get(stage, 0.0)
            live += received.get(stage, 0.0)
            during = live
        elif kind in COMPUTE:
            old = {"F": 0.0, "W": kept.get(stage, 0.0)}.get(kind, saved.get(stage, 0.0))
            new = {"F": saved.get(stage, 0.0), "I": kept.get(stage, 0.0)}.get(kind, 0.0)
            during = live + max(new - old, 0.0) + working
            live += new - old - (0.0 if kind == "W" else waiting.pop(place, 0.0))
        found.append(during)
    return found


def in_flight(actions: Sequence[Action]) -> dict[int, int]:
    """Per stage of one rank: the most microbatches whose forward has run and whose backward (all of it) hasn't.

    >>> from autoshard.plan.schedules import build
    >>> [in_flight(actions) for actions in build("1f1b", 3, 8, [(0, 1), (1, 2)])]
    [{0: 3}, {1: 2}, {2: 1}]
    """
    live: dict[int, int] = {}
    peak: dict[int, int] = {}
    for action in actions:
        if action.kind == "F":
            live[action.stage] = live.get(action.stage, 0) + 1
            peak[action.stage] = max(peak.get(action.stage, 0), live[action.stage])
        elif action.kind in ("B", "W"):
            live[action.stage] = live.get(action.stage, 0) - 1
    return peak
